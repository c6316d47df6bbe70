"""Features of each level as pictures: principal components as colours, similarity to one patch."""

from __future__ import annotations

import math

import mlx.core as mx
import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from hjepa_mlx.errors import UsageError
from hjepa_mlx.models.hjepa import HJEPA
from hjepa_mlx.viz.canvas import Picture, row_label, show, tiles

CLIPPED = (1, 99)  # percentiles of a component that become black and full


def draw_pca(model: HJEPA, images: np.ndarray) -> Picture:
    """The first three principal components of each level's features as red, green and blue.

    images: [B, S, S, 3] uint8, one column each. Components are those of the images together.
    """
    grid = model.config.grid
    levels = encode(model, images)
    figure, axes = tiles(
        1 + len(levels), len(images), "Features: first three principal components as RGB", left=1.2
    )
    row_label(axes[0, 0], "image")
    for ax, image in zip(axes[0], images, strict=True):
        show(ax, image, grid)
    for level, x in enumerate(levels):
        colours, explained = pca_colours(x)
        row_label(
            axes[1 + level, 0],
            f"level {level}",
            f"{_cells(x)}\n{100 * explained:.0f} % of variance",
        )
        for ax, image in zip(axes[1 + level], colours, strict=True):
            show(ax, on_patches(image, grid, int(model.config.model.level_pool[level])), grid)
    return figure


def draw_similarity(
    model: HJEPA, images: np.ndarray, patch: tuple[int, int] | None = None
) -> Picture:
    """Cosine similarity of each cell's features to those of the cell that holds one patch.

    images: [B, S, S, 3] uint8, one column each; patch: its row and column, by default the middle.
    """
    grid = model.config.grid
    row, column = patch or (grid // 2, grid // 2)
    if not (0 <= row < grid and 0 <= column < grid):
        raise UsageError(f"There is no patch {(row, column)} in a {grid}x{grid} grid.")
    levels = encode(model, images)
    heading = "Features: cosine similarity to the marked patch"
    figure, axes = tiles(1 + len(levels), len(images), heading, left=1.2, right=0.7)
    row_label(axes[0, 0], "image")
    for ax, image in zip(axes[0], images, strict=True):
        show(ax, image, grid)
        _mark(ax, row, column, 1, grid)
    for level, x in enumerate(levels):
        pool = int(model.config.model.level_pool[level])
        maps = cosine_maps(x, cell_of(row, column, grid, pool))
        row_label(axes[1 + level, 0], f"level {level}", _cells(x))
        for ax, one in zip(axes[1 + level], maps, strict=True):
            drawn = show(ax, on_patches(one, grid, pool), grid, vmin=maps.min(), vmax=1)
            _mark(ax, row // pool * pool, column // pool * pool, pool, grid)
        place = axes[1 + level, -1].get_position()
        inch = 1 / figure.get_figwidth()
        bar = (
            place.x1 + 0.1 * inch,
            place.y0 + 0.05 * place.height,
            0.12 * inch,
            0.9 * place.height,
        )
        figure.colorbar(drawn, cax=figure.add_axes(bar)).ax.tick_params(labelsize=8)
    return figure


def encode(model: HJEPA, images: np.ndarray) -> list[np.ndarray]:
    """Target encoder's features of each level, [B, n_l, D] float32."""
    levels = model.encode(images)
    mx.eval(levels)
    return [np.array(x, np.float32) for x in levels]


def pca_colours(features: np.ndarray) -> tuple[np.ndarray, float]:
    """Features [B, n, D] as colours [B, n, 3] between 0 and 1; the share of variance they show.

    Each component's sign is such that its largest weight is positive.
    """
    B, n, D = features.shape
    x = features.reshape(B * n, D).astype(np.float64)
    x -= x.mean(0)
    _, spread, axes = np.linalg.svd(x, full_matrices=False)
    axes = axes[:3]
    largest = np.take_along_axis(axes, np.abs(axes).argmax(1)[:, None], 1)
    shown = np.zeros((B * n, 3))
    shown[:, : len(axes)] = x @ (axes * np.sign(largest)).T
    low, high = np.percentile(shown, CLIPPED, axis=0)
    colours = np.clip((shown - low) / np.maximum(high - low, 1e-12), 0, 1)
    share = (spread[:3] ** 2).sum() / max((spread**2).sum(), 1e-12)
    return colours.reshape(B, n, 3), float(share)


def cosine_maps(features: np.ndarray, cell: int) -> np.ndarray:
    """Cosine similarity [B, n] of features [B, n, D] to those of cell number `cell`."""
    norm = np.linalg.norm(features, axis=2, keepdims=True)
    unit = features / np.maximum(norm, 1e-12)
    return np.einsum("bnd,bd->bn", unit, unit[:, cell])


def cell_of(row: int, column: int, grid: int, pool: int) -> int:
    """Number of the cell that holds the patch in this row and column."""
    return row // pool * math.ceil(grid / pool) + column // pool


def on_patches(cells: np.ndarray, grid: int, pool: int) -> np.ndarray:
    """Values of cells [n, …] at each of their patches [grid, grid, …]: the last may be smaller."""
    side = math.ceil(grid / pool)
    x = cells.reshape(side, side, *cells.shape[1:])
    return x.repeat(pool, 0).repeat(pool, 1)[:grid, :grid]


def _mark(ax: Axes, row: int, column: int, size: int, grid: int) -> None:
    """Outline a cell of `size` patches, in black and white to be seen on every colour."""
    width, height = min(size, grid - column), min(size, grid - row)
    for colour, thick in (("black", 2.6), ("white", 1.1)):
        ax.add_patch(
            Rectangle(
                (column, row),
                width,
                height,
                fill=False,
                edgecolor=colour,
                linewidth=thick,
                clip_on=False,
                zorder=3,
            )
        )


def _cells(features: np.ndarray) -> str:
    side = math.isqrt(features.shape[1])
    return f"{side}×{side} cells"
