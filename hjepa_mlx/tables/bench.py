"""The tables of `hjepa-mlx bench`."""

from __future__ import annotations

from collections.abc import Iterator
from shlex import quote
from typing import Any

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from hjepa_mlx.tables import hour_span, hours, number, table


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
        table(f"{name}: the whole step on random images", shown, steps),
        *(Text(f"• {line}") for line in findings),
        "",
        _estimates(facts),
        *_changes(facts["estimates"]),
        _projected(facts["projected"], facts["machine"]["device"]),
    ]


def _parts(facts: dict[str, Any]) -> Iterator[list[str]]:
    gflop, moved = facts["gflop_per_image"], facts["gigabytes_per_image"]
    whole = sum(facts["parts_seconds"].values())
    for part, value in facts["parts_seconds"].items():
        cost = number(gflop.get(part) or None, 2)  # AdamW has no matmuls
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


def _projected(facts: dict[str, Any], device: str) -> Table:
    title = (
        "Projected, not measured: 100 epochs on an Apple {chip} ({matmul_tflops:.1f} of its stated "
        "{stated_tflops:g} TFLOP/s by matmul, {bandwidth_gbs:g} GB/s), if steps reach this share "
        "of the matmul's speed"
    )
    shares = {row["share"]: f"{100 * row['share']:.0f} %" for row in facts["rows"]}
    shares[facts["measured_share_here"]] += f", reached by this {device}"
    cells: dict[str, list[str]] = {}
    for row in facts["rows"]:
        start = [row["recipe"], number(row["gflop_per_image"]), hour_span(row["promised_hours"])]
        cells.setdefault(row["recipe"], start).insert(-1, hours(row["hours_100_epochs"]))
    columns = ["recipe", "GFLOP", *shares.values(), "promised"]
    return table(title.format(**facts), columns, cells.values())


def side_by_side(a: dict[str, Any], b: dict[str, Any]) -> Table:
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
