"""The ground that pictures share: colours, tiles of one size, names from outside, PNG bytes."""

from __future__ import annotations

import io
import warnings
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

# Okabe and Ito's palette (jfly.uni-koeln.de/color), told apart by every kind of colour vision.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
WIDTH, NARROWEST = 9.0, 7.0  # inches; shown 900 pixels wide, a point is 1.4 pixels
DPI = 160  # of the files
LARGEST, GAP = 2.2, 0.07  # inches: a tile's side, the space between two
EDGE = 0.06  # inches


class Picture(Figure):
    """A Figure that pyplot does not know, and that a notebook shows."""

    def _repr_png_(self) -> bytes:
        return png(self)


def png(figure: Figure) -> bytes:
    """The figure as a PNG file."""
    buffer = io.BytesIO()
    with warnings.catch_warnings():  # a class may be named in letters the font lacks
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        figure.savefig(buffer, format="png", dpi=DPI)
    return buffer.getvalue()


def tiles(
    rows: int,
    columns: int,
    heading: str,
    left: float = EDGE,
    right: float = EDGE,
    below: float = 0.0,
    bottom: float = EDGE,
    top: float = 0.36,
) -> tuple[Picture, np.ndarray]:
    """A figure of square axes [rows, columns] without ticks, as large as WIDTH allows.

    Margins in inches: around the tiles (heading and titles stand in the top one), and below each
    row of them.
    """
    side = min(LARGEST, (WIDTH - left - right - GAP * (columns - 1)) / columns)
    width = max(NARROWEST, left + right + side * columns + GAP * (columns - 1))
    step = side + below + GAP
    height = top + rows * step - GAP + bottom
    figure = Picture(figsize=(width, height), facecolor="white")
    figure.text(EDGE / width, 1 - EDGE / height, heading, va="top", weight="bold", fontsize=10)
    axes = np.empty((rows, columns), object)
    for row, column in np.ndindex(rows, columns):
        x, y = left + column * (side + GAP), height - top - row * step - side
        ax = figure.add_axes((x / width, y / height, side / width, side / height))
        ax.set(xticks=[], yticks=[])
        ax.spines[:].set_visible(False)
        axes[row, column] = ax
    return figure, axes


def show(ax: Axes, image: np.ndarray, grid: float = 1, **options: Any) -> Any:
    """Draw an image (or a map of its patches) so that a patch is one unit wide."""
    return ax.imshow(image, extent=(0, grid, grid, 0), interpolation="nearest", **options)


def outline(
    ax: Axes, box: tuple[float, float, float, float], colour: str, thick: float, **options: Any
) -> Rectangle:
    """Draw the edge of a box: left, top, width and height in patches."""
    edge = Rectangle(box[:2], *box[2:], fill=False, ec=colour, lw=thick, **options)
    ax.add_patch(edge)
    return edge


def row_label(ax: Axes, name: str, more: str = "") -> None:
    """Name a row of tiles at its left."""
    place: dict[str, Any] = {"xy": (0, 0.5), "xycoords": "axes fraction", "ha": "right"}
    place["textcoords"] = "offset points"
    side = "bottom" if more else "center"
    ax.annotate(name, xytext=(-8, 2), va=side, weight="bold", fontsize=9, **place)
    ax.annotate(more, xytext=(-8, -2), va="top", fontsize=8, **place)


def label(name: str, width: int = 15) -> str:
    """A name from outside on one short line of printable characters."""
    text = " ".join(name.encode("utf-8", "replace").decode().split())
    text = "".join(c for c in text if c.isprintable())
    return text if len(text) <= width else text[: width - 1] + "…"
