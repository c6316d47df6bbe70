"""Every table that the commands print, from plain values; and how things show in a notebook."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from shlex import quote
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

WIDTH = 110  # characters, in a notebook
MEASURES = {
    "linear_probe": "linear probe %",
    "attentive_probe": "attentive probe %",
    "knn": "k-NN %",
    "feature_rank": "feature rank",
}
TRAINING = {  # label and format of each row
    "steps": ("steps", "{:,}"),
    "epochs": ("epochs", "{:.4g}"),
    "images": ("images seen", "{:,}"),
    "loss": ("loss, last logged", "{:.4f}"),
    "images_per_second": ("images/s, median", "{:,.0f}"),
    "finished": ("finished", "{}"),
}
LEGEND = "* best; ~ not told apart from the best: equal, or the 95 % intervals overlap"
PAGE = "<pre style=\"line-height:1.3;font-family:Menlo,'DejaVu Sans Mono',monospace\">{code}</pre>"


def table(
    title: str, columns: Sequence[str], rows: Iterable[Sequence[Any]], caption: str | None = None
) -> Table:
    """A table of plain cells: the first column to the left, the others to the right.

    A row of one cell is a heading of the rows below it. Markup in cells is not interpreted.
    """
    found = Table(
        title=Text(title, style="bold"),
        title_justify="left",
        caption=caption and Text(caption),
        caption_justify="left",
        box=SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
    )
    for number, column in enumerate(columns):
        found.add_column(Text(column), justify="right" if number else "left", no_wrap=not number)
    for row in rows:
        found.add_row(*(Text(str(cell)) for cell in row), style="bold" if len(row) == 1 else None)
    return found


def number(value: float | None, digits: int = 1) -> str:
    """A figure, or a dash where there is none."""
    return "–" if value is None else f"{value:,.{digits}f}"


def span(pair: Sequence[float] | None) -> str:
    """Lowest to highest."""
    return f"{pair[0]:g}–{pair[1]:g}" if pair else "–"


def hours(value: float) -> str:
    """Hours in the unit that reads best: minutes, hours or days."""
    if value < 1:
        return f"{60 * value:.0f} min" if value >= 0.1 else f"{60 * value:.1f} min"
    return f"{value:.1f} h" if value < 72 else f"{value / 24:.1f} d"


def hour_span(pair: Sequence[float] | None) -> str:
    """Lowest to highest number of hours, in days where there are many."""
    if not pair:
        return "–"
    days = pair[0] >= 72
    return f"{span([value / 24 for value in pair])} d" if days else f"{span(pair)} h"


def bench(facts: dict[str, Any], findings: list[str]) -> list[RenderableType]:
    """The result of `hjepa-mlx bench`; its findings stand between measurements and estimates."""
    name, batch = facts["recipe"], facts["step"]["batch"]
    machine = "{chip}, {device}, {memory_gb:.0f} GB, MLX {mlx}".format(**facts["machine"])
    speeds = (
        [dtype, number(speed["matmul_gflops"], 0), number(speed["bandwidth_gbs"])]
        for dtype, speed in facts["speeds"].items()
    )
    step = "{batch}|{precision}|{images_per_second:,.1f}|{mfu:.0f}|{p95_over_p50:.2f}"
    step += "|{peak_memory_gb:.2f}"
    steps = [step.format(**row).split("|") for row in [*facts["sweep"], *facts["precisions"]]]
    parts = ["", "GFLOP/image", "MB/image", f"ms at batch {batch}", "%"]
    backward = "GFLOP and MB of context and predictor include their backward pass."
    shown = ["batch", "dtype", "images/s", "MFU %", "p95/p50", "peak GB"]
    return [
        table(machine, ["", "matmul GFLOP/s", "memory GB/s"], speeds),
        table(f"{name}: one step, part by part", parts, _parts(facts), backward),
        table(f"{name}: the compiled step on random images", shown, steps),
        *(Text(f"• {line}") for line in findings),
        "",
        _estimates(facts),
        *_changes(facts["estimates"]),
        _projected(facts["projected"]),
    ]


def _parts(facts: dict[str, Any]) -> Iterator[list[str]]:
    gflop, moved = facts["gflop_per_image"], facts["gigabytes_per_image"]
    whole = sum(facts["parts_seconds"].values())
    for part, value in facts["parts_seconds"].items():
        cost = number(gflop.get(part) or None, 2)  # the update has no matmuls
        megabytes = number(1e3 * moved[part] if part in moved else None, 0)
        yield [part, cost, megabytes, number(1e3 * value, 0), f"{100 * value / whole:.0f}"]


def _estimates(facts: dict[str, Any]) -> Table:
    own = [facts["own_estimate"]] if "own_estimate" in facts else []
    cells = (
        [
            row["recipe"] + ("" if row.get("data_is_here", True) else "*"),
            number(row["images_per_second"]),
            *map(hours, (row["hours_per_epoch"], row["hours_100_epochs"])),
            *(hour_span(row["promised_hours"]), row["verdict"] or "–"),
            f"{row['epochs_in_a_night']:.0f}",
        ]
        for row in [*own, *facts["estimates"]]
    )
    return table(
        "100 epochs on this machine, beside the hours promised for an M1 Max",
        ["recipe", "images/s", "epoch", "100 ep.", "promised", "verdict", "in 10 h"],
        cells,
        f"In {facts['step']['precision']}, with collapse signals and k-NN. Last column: epochs in "
        "a night of 10 hours. If a step of the recipe's batch takes too long to measure, a smaller "
        "batch was measured. *: on made-up images.",
    )


def _changes(estimates: list[dict[str, Any]]) -> Iterator[Text]:
    if any(row["changes"] for row in estimates):
        yield Text("One change that makes 100 epochs faster (by GFLOP; precisions as measured):")
    for row in estimates:
        for change in row["changes"]:
            settings = " ".join(f"--set {quote(setting)}" for setting in change["settings"])
            kept = change["hours_100_epochs"] <= row["promised_hours"][1]
            taken = hours(change["hours_100_epochs"]) + (", as promised" if kept else "")
            yield Text(f"  {row['recipe']} {settings}: {taken}")


def _projected(facts: dict[str, Any]) -> Table:
    title = (
        "Projected, not measured: 100 epochs on an Apple {chip} ({matmul_tflops:.1f} of its stated "
        "{stated_tflops:g} TFLOP/s by matmul, {bandwidth_gbs:g} GB/s), if steps reach this share "
        "of the matmul's speed"
    )
    shares = {row["share"]: f"{100 * row['share']:.0f} %" for row in facts["rows"]}
    shares[facts["measured_share_here"]] += " (here)"
    cells: dict[str, list[str]] = {}
    for row in facts["rows"]:
        start = [row["recipe"], number(row["gflop_per_image"]), hour_span(row["promised_hours"])]
        cells.setdefault(row["recipe"], start).insert(-1, hours(row["hours_100_epochs"]))
    columns = ["recipe", "GFLOP", *shares.values(), "promised"]
    return table(title.format(**facts), columns, cells.values())


def bench_side_by_side(a: dict[str, Any], b: dict[str, Any]) -> Table:
    """Two results of `hjepa-mlx bench`: each figure, and B's as a multiple of A's."""
    title = "A: {}\nB: {}".format(
        *("{recipe}, {machine[chip]}, {date}".format(**facts) for facts in (a, b))
    )
    ours, theirs = _figures(a), _figures(b)
    rows = (
        [name, f"{x:,.4g}", f"{theirs[name]:,.4g}", number(theirs[name] / x if x else None, 2)]
        for name, x in ours.items()
        if name in theirs
    )
    machines = ((key, value, b["machine"].get(key)) for key, value in a["machine"].items())
    differing = "; ".join(f"{key}: {x} → {y}" for key, x, y in machines if x != y)
    return table(title, ["", "A", "B", "B/A"], rows, differing or None)


def _figures(facts: dict[str, Any]) -> dict[str, float]:
    found = {}
    for dtype, speed in facts["speeds"].items():
        found[f"matmul {dtype}, GFLOP/s"] = speed["matmul_gflops"]
        found[f"memory {dtype}, GB/s"] = speed["bandwidth_gbs"]
    for row in facts["sweep"]:
        found[f"step at batch {row['batch']}, images/s"] = row["images_per_second"]
    found["GFLOP/image"] = facts["gflop_per_image"]["total"]
    found["step, MFU %"] = facts["step"]["mfu"]
    found["step, peak memory GB"] = facts["step"]["peak_memory_gb"]
    found["pipeline, images/s"] = facts["data"]["images_per_second"]
    found["end to end, images/s"] = facts["end_to_end"]["images_per_second"]
    for row in facts["estimates"]:
        found[f"{row['recipe']}, hours of 100 epochs"] = row["hours_100_epochs"]
    return found


def comparison(data: dict[str, Any]) -> Group:
    """Runs side by side, one column a run, from the plain values of `compare`; then its notes."""
    paths = [Path(run).resolve() for run in data["runs"]]
    names = [path.name for path in paths]
    if len(set(names)) < len(names):  # then with as many of the folders above as differ
        common = os.path.commonpath([path.parent for path in paths])
        names = [str(path.relative_to(common)) for path in paths]
    sections = {
        "configuration": [
            [key, *(v if isinstance(v, str) else json.dumps(v) for v in values)]
            for key, values in data["configuration"].items()
        ],
        "training": [
            [label, *(_training_cell(v, form) for v in data["training"][key])]
            for key, (label, form) in TRAINING.items()
        ],
        "scores": _scores(data["scores"], data["best"]),
        "random initialisation": _scores(data["random_init"], {}),
    }
    found = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    found.add_column("", no_wrap=True)
    for name in names:
        found.add_column(Text(name), overflow="fold")
    for title, rows in sections.items():
        if rows:
            found.add_row(Text(title, style="bold"))
        for row in rows:
            found.add_row(*map(Text, row))
        found.add_section()
    marked = any(any(levels.values()) for levels in data["best"].values())
    return Group(found, *map(Text, ["", *[LEGEND] * marked, *data["notes"]]))


def _training_cell(value: float | bool | None, form: str) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "–" if value is None else form.format(value)


def _scores(scores: dict[str, Any], best: dict[str, Any]) -> list[list[str]]:
    """A row a measure and level; the best are marked."""
    rows = []
    for measure, levels in scores.items():
        for level, values in levels.items():
            top = best.get(measure, {}).get(level, [])
            mark = " ~" if len(top) > 1 else " *"
            cells = [number(value) + mark * (run in top) for run, value in enumerate(values)]
            rows.append([f"{MEASURES[measure]} {level.replace('_', ' ')}", *cells])
    return rows


def level_name(level: str) -> str:
    """A level's name in the scores, as people read it."""
    return level.replace("_", " ")


def evaluation(scores: dict[str, Any]) -> list[Table]:
    """The tables of an evaluation's scores: accuracies, ranks and spread, promises."""
    found = [_accuracies(scores)] if scores.get("knn") else []
    rows: list[list[str]] = []
    for network, own in _networks(scores).items():
        rows.append([network])
        for level, figures in own["features"].items():
            ranks = [
                f"{number(figures.get(rank))} ({number(figures.get(f'{rank}_percent'), 0)}%)"
                for rank in ("effective_rank", "rankme")
            ]
            rows.append([f"  {level_name(level)}", *ranks, number(figures.get("feature_std"), 2)])
    title = f"{scores['protocol']['data']}: features of the test images"
    caption = "in brackets: % of the dimension"
    found.append(table(title, ["", "eff. rank", "RankMe", "std"], rows, caption))
    return found + ([_promises(scores)] if scores.get("promises") else [])


def _networks(scores: dict[str, Any]) -> dict[str, Any]:
    baselines = {"context_encoder": "context encoder", "random_init": "random init."}
    known = scores["baselines"]
    others = {name: known[key] for key, name in baselines.items() if key in known}
    return {"target encoder": scores, **others}


def _accuracies(scores: dict[str, Any]) -> Table:
    protocol = scores["protocol"]
    few = [key for key in scores if key.startswith("few_labels")]
    attentive = ["attentive"] if "attentive_probe" in scores else []
    shares = [f"{key.split('_')[2]} % labels" for key in few]
    rows: list[list[str]] = []
    for network, own in _networks(scores).items():
        rows.append([network])
        for level, knn in own["knn"].items():
            low, high = own["confidence_95"]["linear_probe"][level]
            cells = [f"{own['linear_probe'][level]:.1f} ± {(high - low) / 2:.1f}", number(knn)]
            cells += [number(own.get("attentive_probe", {}).get(level)) for _ in attentive]
            for key in few:
                reached = own.get(key, {}).get(level, {})
                spread = f" ± {reached['std']:.1f}" if reached.get("std") else ""
                cells.append(number(reached.get("mean")) + spread)
            rows.append([f"  {level_name(level)}", *cells])
    pixels = scores["baselines"]["pixels"]
    rows.append(["raw pixels", number(pixels["linear_probe"]), number(pixels["knn"])])
    images = protocol["bank_images"], protocol["query_images"]
    caption = "±: half a 95 % interval" + ("; of few labels, deviation of the draws" if few else "")
    if 0 < protocol.get("attentive_bank_images", 0) < images[0]:
        seen = protocol["attentive_bank_images"], protocol["attentive_query_images"]
        caption += ". Attentive: {:,} training and {:,} test images".format(*seen)
    return table(
        f"{protocol['data']}: accuracy in %, {images[0]:,} training and {images[1]:,} test images",
        ["", "linear probe", f"k-NN {protocol['k']}", *attentive, *shares],
        rows,
        caption,
    )


def _promises(scores: dict[str, Any]) -> Table:
    measures = {
        "linear_probe": "linear probe, %",
        "knn": "k-NN, %",
        "effective_rank_percent": "effective rank, % of dim",
    }
    rows = [
        [measures[row["measure"]], level_name(row["level"]), span(row["promised"]),
         number(row["measured"]), row["verdict"]]
        for row in scores["promises"]
    ]  # fmt: skip
    trained = f"{scores['trained']['model']} after {scores['trained']['epochs']:g} epochs"
    title = f"Promised for 100 epochs of ViT-S; this is {trained}"
    return table(title, ["", "level", "promised", "measured", "verdict"], rows)


class Shown:
    """For classes with `__rich__`: the same in a notebook, coloured."""

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, str]:
        return {"text/plain": text(self), "text/html": html(self)}


def text(renderable: Any) -> str:
    """A rich renderable as plain text."""
    return _printed(renderable).export_text()


def html(renderable: Any) -> str:
    """A rich renderable as a piece of HTML; markup in it is not interpreted."""
    return _printed(renderable).export_html(inline_styles=True, code_format=PAGE)


def _printed(renderable: Any) -> Console:
    console = Console(
        file=io.StringIO(),
        width=WIDTH,
        record=True,
        force_jupyter=False,
        markup=False,
        highlight=False,
    )
    console.print(renderable)
    return console
