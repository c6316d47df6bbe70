"""Maps of each level's features: principal components as colours, similarity to one patch."""

from __future__ import annotations

import math
from typing import Any

import mlx.core as mx
import numpy as np

from hjepa_mlx.errors import UsageError
from hjepa_mlx.models.hjepa import HJEPA
from hjepa_mlx.viz.canvas import Picture, outline, row_label, show, tiles

CLIPPED = (1, 99)  # percentiles of a component that become black and full


def draw_pca(model: HJEPA, images: np.ndarray) -> Picture:
    """The first three principal components of each level's features as red, green and blue.

    images: [B, S, S, 3] uint8, one column each. Components are those of the images together.
    """
    levels = encode(model, images)
    heading = "Features: first three principal components as RGB"
    figure, axes = _tiles_below(images, len(levels), heading, model.config.grid)
    for level, x in enumerate(levels):
        colours, explained = pca_colours(x)
        _draw_level(
            axes[1 + level], colours, model, level, f"\n{100 * explained:.0f} % of variance"
        )
    return figure


def draw_similarity(
    model: HJEPA, images: np.ndarray, patch: tuple[int, int] | None = None
) -> Picture:
    """Cosine similarity of each cell's features to those of the cell that holds one patch.

    images: [B, S, S, 3] uint8, one column each; patch: its row and column, by default the middle.
    Raises UsageError when the grid has no such patch.
    """
    grid = model.config.grid
    row, column = patch or (grid // 2, grid // 2)
    if not (0 <= row < grid and 0 <= column < grid):
        raise UsageError(f"There is no patch {(row, column)} in a {grid}x{grid} grid.")
    levels = encode(model, images)
    heading = "Features: cosine similarity to the marked patch"
    figure, axes = _tiles_below(images, len(levels), heading, grid, right=0.7)
    _mark(axes[0], row, column, 1, grid)
    inch = 1 / figure.get_figwidth()
    for level, x in enumerate(levels):
        pool = int(model.config.model.level_pool[level])
        cell = on_patches(np.arange(x.shape[1]), grid, pool)[row, column]
        unit = x / np.maximum(np.linalg.norm(x, axis=2, keepdims=True), 1e-12)
        maps = np.einsum("bnd,bd->bn", unit, unit[:, cell])
        drawn = _draw_level(axes[1 + level], maps, model, level, vmin=maps.min(), vmax=1)
        _mark(axes[1 + level], row, column, pool, grid)
        place = axes[1 + level, -1].get_position()
        bar = place.x1 + 0.1 * inch, place.y0 + 0.05 * place.height, 0.12 * inch, 0.9 * place.height
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
    axes = axes[:3] * np.sign(np.take_along_axis(axes, np.abs(axes).argmax(1)[:, None], 1)[:3])
    shown = np.zeros((B * n, 3))
    shown[:, : len(axes)] = x @ axes.T
    low, high = np.percentile(shown, CLIPPED, axis=0)
    colours = np.clip((shown - low) / np.maximum(high - low, 1e-12), 0, 1)
    share = (spread[:3] ** 2).sum() / max((spread**2).sum(), 1e-12)
    return colours.reshape(B, n, 3), float(share)


def on_patches(cells: np.ndarray, grid: int, pool: int) -> np.ndarray:
    """Values of cells [n, …] at each of their patches [grid, grid, …]: the last may be smaller."""
    side = math.ceil(grid / pool)
    x = cells.reshape(side, side, *cells.shape[1:])
    return x.repeat(pool, 0).repeat(pool, 1)[:grid, :grid]


def _tiles_below(
    images: np.ndarray, levels: int, heading: str, grid: int, **margins: float
) -> tuple[Picture, np.ndarray]:
    """A column of tiles for each image: the image, and an empty tile for each level."""
    figure, axes = tiles(1 + levels, len(images), heading, left=1.2, **margins)
    row_label(axes[0, 0], "image")
    for ax, image in zip(axes[0], images, strict=True):
        show(ax, image, grid)
    return figure, axes


def _draw_level(
    axes: np.ndarray, maps: np.ndarray, model: HJEPA, level: int, more: str = "", **options: Any
) -> Any:
    """Draw values of a level's cells [B, n, …], one image a tile; gives the last one drawn."""
    side = math.isqrt(maps.shape[1])
    row_label(axes[0], f"level {level}", f"{side}×{side} cells{more}")
    grid, pool = model.config.grid, int(model.config.model.level_pool[level])
    for ax, cells in zip(axes, maps, strict=True):
        drawn = show(ax, on_patches(cells, grid, pool), grid, **options)
    return drawn


def _mark(axes: np.ndarray, row: int, column: int, size: int, grid: int) -> None:
    """Outline the cell of `size` patches that holds a patch, to be seen on every colour."""
    x, y = column // size * size, row // size * size
    box = x, y, min(size, grid - x), min(size, grid - y)
    for ax in axes:
        outline(ax, box, "black", 2.6, clip_on=False, zorder=3)
        outline(ax, box, "white", 1.1, clip_on=False, zorder=3)
