"""Tables: the builder and the formats of figures; beside it, a file for each command's own."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

WIDTH = 110  # characters, in a notebook
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
        show_header=any(columns),
        pad_edge=False,
        collapse_padding=True,
    )
    for number, column in enumerate(columns):
        side: Any = "right" if number else "left"
        found.add_column(Text(column), justify=side, no_wrap=not number, overflow="fold")
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


def level_name(level: str) -> str:
    """A level's name in the scores, as people read it."""
    return level.replace("_", " ")


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
