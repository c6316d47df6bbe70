"""How things show themselves: one picture of each for a terminal and a notebook."""

from __future__ import annotations

import io
from typing import Any

from rich.console import Console

WIDTH = 110  # characters, in a notebook
PAGE = "<pre style=\"line-height:1.3;font-family:Menlo,'DejaVu Sans Mono',monospace\">{code}</pre>"


class Shown:
    """For classes with `__rich__`: the same in a notebook, coloured."""

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, str]:
        return {"text/plain": text(self), "text/html": html(self)}


def text(renderable: Any) -> str:
    """A rich renderable as plain text."""
    return _printed(renderable).export_text()


def html(renderable: Any) -> str:
    """A rich renderable as a piece of HTML; what looks like markup in it is not."""
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
