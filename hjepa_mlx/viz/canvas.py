"""The ground that pictures share: colours, figures of image tiles, names from outside, PNG."""

from __future__ import annotations

import io
import warnings
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

# Okabe and Ito's palette (jfly.uni-koeln.de/color), told apart by every kind of colour vision.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442")
CLIPPED = (1, 99)  # percentiles of a component that become 0 and 1
WIDTH, LARGEST, NAMES = 9.0, 2.2, 1.2  # inches: figure and tile at most, names of the rows


class Picture(Figure):
    """A Figure that pyplot does not know, and that a notebook shows."""

    def _repr_png_(self) -> bytes:
        return png(self)


def png(figure: Figure) -> bytes:
    """The figure as a PNG file."""
    buffer = io.BytesIO()
    with warnings.catch_warnings():  # a class may be named in letters the font lacks
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        figure.savefig(buffer, format="png", dpi=160, bbox_inches="tight", pad_inches=0.06)
    return buffer.getvalue()


def tiles(rows: int, columns: int, heading: str, text: float) -> tuple[Picture, np.ndarray]:
    """A figure of axes [rows, columns] for images; text: inches of height beside the images."""
    side = min(LARGEST, WIDTH / columns)
    width = min(WIDTH, LARGEST * columns + NAMES)
    figure = Picture(figsize=(width, side * rows + text), layout="compressed")
    figure.suptitle(heading, x=0, ha="left", weight="bold", fontsize=10)
    bare = {"xticks": [], "yticks": [], "frame_on": False}
    return figure, figure.subplots(rows, columns, squeeze=False, subplot_kw=bare)


def show(ax: Axes, image: np.ndarray, grid: float = 1, **options: Any) -> None:
    """Draw an image (or a map of its patches) so that a patch is one unit wide."""
    ax.imshow(image, extent=(0, grid, grid, 0), interpolation="nearest", **options)


def maps(
    images: np.ndarray, grid: int, heading: str, rows: dict[str, np.ndarray]
) -> tuple[Picture, np.ndarray]:
    """A column for each image [S, S, 3]: the image, and below it the maps of each named row.

    rows: [B, grid, grid] or, in colour, [B, grid, grid, 3]; a row has one range of values.
    """
    figure, axes = tiles(1 + len(rows), len(images), heading, text=0.3)
    for line, (name, values) in zip(axes, {"image": images, **rows}.items(), strict=True):
        line[0].set_ylabel(name, rotation=0, ha="right", va="center", fontsize=9)
        for ax, value in zip(line, values, strict=True):
            show(ax, value, grid, vmin=values.min(), vmax=values.max())
    return figure, axes


def outline(ax: Axes, box: tuple[float, ...], colour: str, thick: float, **options: Any) -> Patch:
    """Draw the edge of a box: left, top, width and height in patches."""
    x, y, width, height = box
    edge = Rectangle((x, y), width, height, fill=False, ec=colour, lw=thick, **options)
    return ax.add_patch(edge)


def principal(x: np.ndarray, count: int) -> tuple[np.ndarray, float]:
    """The first principal components [N, count] of features [N, D], and their share of variance.

    Each is clipped to its CLIPPED percentiles and scaled to 0 … 1; its sign is such that its
    largest weight is positive.
    """
    x = x.astype(np.float64) - x.mean(0, dtype=np.float64)
    _, spread, axes = np.linalg.svd(x, full_matrices=False)
    axes = axes[:count]
    axes *= np.sign(np.take_along_axis(axes, np.abs(axes).argmax(1)[:, None], 1))
    shown = np.zeros((len(x), count))
    shown[:, : len(axes)] = x @ axes.T
    low, high = np.percentile(shown, CLIPPED, axis=0)
    share = (spread[:count] ** 2).sum() / max((spread**2).sum(), 1e-12)
    return np.clip((shown - low) / np.maximum(high - low, 1e-12), 0, 1), float(share)


def label(name: str, width: int = 15) -> str:
    """A name from outside on one short line of printable characters."""
    text = " ".join(name.encode("utf-8", "replace").decode().split())
    text = "".join(c for c in text if c.isprintable())
    return text if len(text) <= width else text[: width - 1] + "…"
