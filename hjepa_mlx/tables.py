"""Every table that the commands print, from plain values; and how things show in a notebook."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group
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
LEGEND = "* best; ~ as good as the best: equal, or the 95 % intervals overlap"
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
    found = Table(box=SIMPLE_HEAD, padding=(0, 2, 0, 0), show_edge=False)
    for column in ["", *names]:
        found.add_column(Text(column), overflow="fold")
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
