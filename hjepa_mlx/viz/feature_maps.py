"""Maps of each level's features: principal components as colours, similarity to one patch."""

from __future__ import annotations

import math

import mlx.core as mx
import numpy as np
from matplotlib.patheffects import withStroke

from hjepa_mlx.errors import UsageError
from hjepa_mlx.models.hjepa import HJEPA
from hjepa_mlx.viz.canvas import Picture, maps, outline, principal


def draw_pca(model: HJEPA, images: np.ndarray) -> Picture:
    """The first three principal components of each level's features as red, green and blue.

    images: [B, S, S, 3] uint8, one column each. Components are those of the images together.
    """
    colours, shares = [], []
    for x in _of_parts(model, images):
        shown, share = principal(np.array(x, np.float32).reshape(-1, x.shape[2]), 3)
        colours.append(shown.reshape(*x.shape[:2], 3))
        shares.append(share)
    figure, axes = _draw_maps(model, images, colours, "first three principal components as RGB")
    for ax, share in zip(axes[1:, 0], shares, strict=True):
        ax.yaxis.label.set_text(f"{ax.get_ylabel()}\n{100 * share:.0f} % of variance")
    return figure


def draw_similarity(
    model: HJEPA, images: np.ndarray, patch: tuple[int, int] | None = None
) -> Picture:
    """Cosine similarity of each cell's features to those of the cell that holds one patch.

    images: [B, S, S, 3] uint8, one column each; patch: its row and column, by default the middle.
    Raises UsageError when the grid has no such patch.
    """
    grid, pools = model.config.grid, model.config.level_pools
    row, column = patch or (grid // 2, grid // 2)
    if not (0 <= row < grid and 0 <= column < grid):
        raise UsageError(f"There is no patch {(row, column)} in a {grid}x{grid} grid.")
    cosines = []
    for features, pool in zip(_of_parts(model, images), pools):  # noqa: B905 (the image level)
        x = np.array(features, np.float32)
        cell = on_patches(np.arange(x.shape[1]), grid, pool)[row, column]
        unit = x / np.maximum(np.linalg.norm(x, axis=2, keepdims=True), 1e-12)
        cosines.append(np.einsum("bnd,bd->bn", unit, unit[:, cell]))
    figure, axes = _draw_maps(model, images, cosines, "cosine similarity to the marked patch")
    for line in axes[1:]:
        figure.colorbar(line[0].images[0], ax=list(line), pad=0.01).ax.tick_params(labelsize=8)
    edge = [withStroke(linewidth=2.6, foreground="black")]  # to be seen on every colour
    for line, size in zip(axes, (1, *pools)):  # noqa: B905
        left, top = column // size * size, row // size * size
        box = left, top, min(size, grid - left), min(size, grid - top)
        for ax in line:
            outline(ax, box, "white", 1.1, clip_on=False, zorder=3, path_effects=edge)
    return figure


def _of_parts(model: HJEPA, images: np.ndarray) -> list[mx.array]:
    """Features of the levels that have several cells: all but the image level."""
    levels = model.encode(images)
    return levels[:-1] if model.config.model.level_pool[-1] == "image" else levels


def on_patches(cells: np.ndarray, grid: int, pool: int) -> np.ndarray:
    """Values of cells [n, …] at each of their patches [grid, grid, …]: the last may be smaller."""
    side = math.ceil(grid / pool)
    x = cells.reshape(side, side, *cells.shape[1:])
    return x.repeat(pool, 0).repeat(pool, 1)[:grid, :grid]


def _draw_maps(
    model: HJEPA, images: np.ndarray, values: list[np.ndarray], meaning: str
) -> tuple[Picture, np.ndarray]:
    """A column for each image: the image, and below it each level's values [B, n, …] of cells."""
    grid, rows = model.config.grid, {}
    for level, cells in enumerate(values):
        pool, side = model.config.level_pools[level], math.isqrt(cells.shape[1])
        patches = np.stack([on_patches(one, grid, pool) for one in cells])
        rows[f"level {level}\n{side}×{side} cells"] = patches
    return maps(images, grid, f"Features: {meaning}", rows)
