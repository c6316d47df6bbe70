"""The result of `hjepa-mlx bench` as tables, and two results side by side."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from hjepa_mlx.bench.estimates import NIGHT_HOURS
from hjepa_mlx.errors import UsageError
from hjepa_mlx.tables import Shown

PARTS = ("target", "context", "predictor", "backward", "update")


@dataclass(frozen=True)
class BenchReport(Shown):
    """What `bench` measured, as its JSON holds it; prints itself."""

    facts: dict[str, Any]

    def __rich__(self) -> Group:
        tables: list[RenderableType] = [self._machine(), self._parts(), self._steps()]
        tables += [Text(f"• {line}") for line in self.findings()]
        tables += ["", self._estimates()]
        changes = list(self._changes())
        if changes:
            tables += [
                "What would make 100 epochs fewer hours, one change at a time (projected by GFLOP, "
                "not measured; precisions by their steps' speed):"
            ]
            tables += changes
        return Group(*tables, "", self._projected())

    def findings(self) -> list[str]:
        """What the figures say, in words."""
        facts, step = self.facts, self.facts["step"]
        data, both = facts["data"], facts["end_to_end"]
        best = max(facts["sweep"], key=lambda row: row["images_per_second"])
        data_is_less = data["images_per_second"] < step["images_per_second"]
        found = [
            f"{facts['gflop_per_image']['total']:.1f} GFLOP an image at full resolution, "
            f"{facts['gflop_per_image']['average_over_the_run']:.1f} on average over the run.",
            f"The data pipeline alone gives {_rate(data['images_per_second'])} images/s "
            f"({data['source']}), the step {_rate(step['images_per_second'])}, both together "
            f"{_rate(both['images_per_second'])} ({100 * both['share_of_step']:.0f} % of the "
            f"step's speed, measured alternately): the {'data' if data_is_less else 'step'} is the "
            "limit.",
            f"First step (tracing and compiling) {step['first_step_seconds']:.1f} s; traces after "
            f"warm-up: {step['traces_after_warmup']}.",
            f"Of these batches {best['batch']} is the fastest. The largest that should fit this "
            f"machine's memory: {facts['largest_batch']} (projected; the recipe asks for "
            f"{facts['configured_batch']}).",
            *facts["chosen"],
        ]
        if step["batch"] < facts["configured_batch"]:
            found.append(
                f"A batch of {facts['configured_batch']} would take too long to measure here: "
                f"{step['batch']} stands for it."
            )
        if "sustained" in facts:
            s = facts["sustained"]
            found.append(
                f"After {s['minutes']:g} min the step ran at {_rate(s['last_images_per_second'])} "
                f"images/s instead of {_rate(s['first_images_per_second'])}: "
                f"{s['drop_percent']:.0f} % less."
            )
        power = facts.get("sustained", facts["machine"])["power"]
        if power:
            found.append(f"Slowed down, perhaps: {power}.")
        return found

    def _machine(self) -> Table:
        m = self.facts["machine"]
        table = _table(f"{m['chip']}, {m['device']}, {m['memory_gb']:.0f} GB, MLX {m['mlx']}")
        for name in ("", "matmul GFLOP/s", "memory GB/s"):
            table.add_column(name, justify="left" if not name else "right")
        for dtype, speed in self.facts["speeds"].items():
            table.add_row(dtype, f"{speed['matmul_gflops']:,.0f}", f"{speed['bandwidth_gbs']:.1f}")
        return table

    def _parts(self) -> Table:
        facts = self.facts
        table = _table(f"{facts['recipe']}: one step, part by part")
        columns = ("", "GFLOP/image", "MB/image", f"ms at batch {facts['step']['batch']}", "%")
        for name in columns:
            table.add_column(name, justify="left" if not name else "right")
        total = sum(facts["parts_seconds"].values())
        for part in PARTS:
            seconds = facts["parts_seconds"][part]
            gflop = facts["gflop_per_image"].get(part)
            moved = facts["gigabytes_per_image"].get(part)
            table.add_row(
                part,
                "" if gflop is None or part == "update" else f"{gflop:.2f}",
                "" if moved is None else f"{1e3 * moved:.0f}",
                f"{1e3 * seconds:.0f}",
                f"{100 * seconds / total:.0f}",
            )
        table.caption = "GFLOP and MB of context and predictor include their backward pass."
        return table

    def _steps(self) -> Table:
        table = _table(f"{self.facts['recipe']}: the compiled step on random images")
        columns = ("batch", "dtype", "images/s", "MFU %", "p95/p50", "peak GB")
        for name in columns:
            table.add_column(name, justify="left" if name == "dtype" else "right")
        for row in [*self.facts["sweep"], *self.facts["precisions"]]:
            table.add_row(
                str(row["batch"]),
                row["precision"],
                _rate(row["images_per_second"]),
                f"{row['mfu']:.0f}",
                f"{row['p95_over_p50']:.2f}",
                f"{row['peak_memory_gb']:.2f}",
            )
        return table

    def _estimates(self) -> Table:
        table = _table("100 epochs on this machine, beside what was promised for an M1 Max")
        columns = ("recipe", "images/s", "epoch", "100 ep.", "promised", "verdict")
        for name in (*columns, f"in {NIGHT_HOURS} h"):
            side: Any = "left" if name in ("recipe", "verdict") else "right"
            table.add_column(name, justify=side, no_wrap=True)
        table.caption = (
            f"In {self.facts['step']['precision']}, with collapse signals and k-NN. "
            f"Last column: epochs that fit a night of {NIGHT_HOURS} hours. Where a step of the "
            "recipe's batch would take too long, a smaller one was measured. *: on made-up images."
        )
        own = [self.facts["own_estimate"]] if "own_estimate" in self.facts else []
        for row in [*own, *self.facts["estimates"]]:
            table.add_row(
                row["recipe"] + ("" if row.get("data_is_here", True) else "*"),
                _rate(row["images_per_second"]),
                _hours(row["hours_per_epoch"]),
                _hours(row["hours_100_epochs"]),
                _promise(row["promised_hours"]),
                row["verdict"] or "–",
                f"{row['epochs_in_a_night']:.0f}",
            )
        return table

    def _changes(self) -> Iterator[Text]:
        for row in self.facts["estimates"]:
            if not row["changes"]:
                continue
            yield Text(f"  {row['recipe']}: {_hours(row['hours_100_epochs'])}")
            for change in row["changes"]:
                fits = change["hours_100_epochs"] <= row["promised_hours"][1]
                settings = " ".join(f"--set {quote(setting)}" for setting in change["settings"])
                yield Text(
                    f"    {settings}: "
                    f"{_hours(change['hours_100_epochs'])}{', would fit' if fits else ''}"
                )

    def _projected(self) -> Table:
        p = self.facts["projected"]
        table = _table(
            f"Projected, not measured: 100 epochs on an Apple {p['chip']} "
            f"({p['matmul_tflops']:.1f} of its stated {p['stated_tflops']:g} TFLOP/s by matmul, "
            f"{p['bandwidth_gbs']:g} GB/s), if steps reach this share of the matmul's speed"
        )
        shares = list(dict.fromkeys(row["share"] for row in p["rows"]))
        table.add_column("recipe", no_wrap=True)
        table.add_column("GFLOP", justify="right")
        for share in shares:
            here = " (here)" if share == p["measured_share_here"] else ""
            table.add_column(f"{100 * share:.0f} %{here}", justify="right")
        table.add_column("promised", justify="right")
        recipes = dict.fromkeys(row["recipe"] for row in p["rows"])
        for recipe in recipes:
            rows = [row for row in p["rows"] if row["recipe"] == recipe]
            hours = [_hours(row["hours_100_epochs"]) for row in rows]
            gflop = f"{rows[0]['gflop_per_image']:.1f}"
            table.add_row(recipe, gflop, *hours, _promise(rows[0]["promised_hours"]))
        return table


def read(path: Path) -> dict[str, Any]:
    """The facts of a result file of `hjepa-mlx bench`; UsageError for anything else."""
    try:
        facts = dict(json.loads(path.read_bytes()))
        _ = facts["estimates"], facts["step"], facts["machine"]
    except OSError as error:
        raise UsageError(f"{path} cannot be read ({error.strerror}).") from None
    except (ValueError, KeyError, TypeError):
        raise UsageError(f"{path} is not a result of hjepa-mlx bench.") from None
    return facts


def side_by_side(a: dict[str, Any], b: dict[str, Any]) -> Table:
    """Two results: each figure, and the second one's as a multiple of the first's."""
    names = [f"{facts['recipe']}, {facts['machine']['chip']}, {facts['date']}" for facts in (a, b)]
    table = _table(f"A: {names[0]}\nB: {names[1]}")
    table.add_column("")
    for name in ("A", "B", "B/A"):
        table.add_column(name, justify="right")
    theirs = dict(_figures(b))
    for name, value in _figures(a):
        if name in theirs:
            ratio = f"{theirs[name] / value:.2f}" if value else "–"
            table.add_row(name, f"{value:,.4g}", f"{theirs[name]:,.4g}", ratio)
    differing = [
        f"{key}: {a['machine'][key]} → {b['machine'].get(key)}"
        for key in a["machine"]
        if a["machine"][key] != b["machine"].get(key)
    ]
    if differing:
        table.caption = "; ".join(differing)
    return table


def _figures(facts: dict[str, Any]) -> Iterator[tuple[str, float]]:
    for dtype, speed in facts["speeds"].items():
        yield f"matmul {dtype}, GFLOP/s", speed["matmul_gflops"]
        yield f"memory {dtype}, GB/s", speed["bandwidth_gbs"]
    yield "GFLOP/image", facts["gflop_per_image"]["total"]
    for row in facts["sweep"]:
        yield f"step at batch {row['batch']}, images/s", row["images_per_second"]
    yield "step, MFU %", facts["step"]["mfu"]
    yield "step, peak memory GB", facts["step"]["peak_memory_gb"]
    yield "pipeline, images/s", facts["data"]["images_per_second"]
    yield "end to end, images/s", facts["end_to_end"]["images_per_second"]
    for row in facts["estimates"]:
        yield f"{row['recipe']}, hours of 100 epochs", row["hours_100_epochs"]


def _table(title: str) -> Table:
    layout: Any = {"box": SIMPLE_HEAD, "padding": (0, 1, 0, 0)}
    return Table(title=title, title_justify="left", caption_justify="left", **layout)


def _rate(images_per_second: float) -> str:
    digits = 1 if images_per_second < 20 else 0
    return f"{images_per_second:,.{digits}f}"


def _hours(hours: float) -> str:
    if hours < 1:
        return f"{60 * hours:.0f} min" if hours >= 0.1 else f"{60 * hours:.1f} min"
    if hours < 72:
        return f"{hours:.1f} h"
    return f"{hours / 24:.1f} d"


def _promise(pair: list[float] | tuple[float, float] | None) -> str:
    if not pair:
        return "–"
    days = pair[0] >= 72
    return f"{pair[0] / 24:g}–{pair[1] / 24:g} d" if days else f"{pair[0]:g}–{pair[1]:g} h"
