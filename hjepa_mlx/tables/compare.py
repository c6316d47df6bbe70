"""The table of `hjepa-mlx compare`."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.table import Table
from rich.text import Text

from hjepa_mlx.tables import level_name, number

MEASURES = {
    "linear_probe": "linear probe %",
    "attentive_probe": "attentive probe %",
    "knn": "k-NN %",
    "fine_tuned": "fine-tuned %",
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
            rows.append([f"{MEASURES[measure]} {level_name(level)}", *cells])
    return rows
