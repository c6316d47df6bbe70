"""Masks and views of images: what the context encoder sees, and each level's cells to predict."""

from __future__ import annotations

from itertools import cycle

import mlx.core as mx
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.patches import Patch

from hjepa_mlx.config import Config
from hjepa_mlx.masks import Masks, MaskSampler
from hjepa_mlx.views import render
from hjepa_mlx.viz.canvas import COLOURS, Picture, outline, show, tiles

FADED, KEPT = "#C8CAE2", 0.2  # a hidden patch turns into this until so much of it is left
INSET = 0.006  # of the image: a block is drawn smaller than the one before, so that both are seen


def draw(config: Config, images: np.ndarray, step: int = 0) -> Picture:
    """Masks as drawn at step `step` for a batch of these images [B, S, S, 3] uint8: one row each.

    Context tokens are shown as they are, all else faded; target blocks are outlined, each in its
    colour, and divided into the cells whose features are predicted. Views follow as they are seen.
    """
    grid, each = config.grid, config.masks.per_image
    masks = MaskSampler(config)(step, len(images) * each)
    heading = "Masks: the context is seen, each cell inside the target blocks is predicted"
    views = _views(config, images, masks)
    figure, axes = tiles(len(images), 1 + len(masks.pool) + len(views), heading, text=1)
    axes[0, 0].set_title("image", fontsize=9)
    for ax, level in zip(axes[0, 1:], config.masked):  # noqa: B905 (views follow)
        cell = config.model.patch_size * config.level_pools[level]
        ax.set_title(f"level {level}\ncells of {cell}×{cell} pixels", fontsize=9)
    for number, of_images in enumerate(views, len(masks.pool) + 1):
        axes[0, number].set_title(f"level {config.predicted[-1]}\nview of the image", fontsize=9)
        for ax, view in zip(axes[:, number], of_images, strict=True):
            show(ax, view, config.view_grid)
    for number, image in enumerate(images):
        show(axes[number, 0], image, grid)
        for ax, pool in zip(axes[number, 1:], masks.pool):  # noqa: B905 (views follow)
            show(ax, _context_only(image, masks.context[number * each], grid), grid)
            _draw_targets(ax, masks.targets[number * each], pool, grid)
    handles = [*axes[0, 1].get_legend_handles_labels()[0], Patch(color=FADED, label="hidden")]
    figure.legend(handles=handles, loc="outside lower center", ncols=5, frameon=False, fontsize=9)
    return figure


def _views(config: Config, images: np.ndarray, masks: Masks) -> list[np.ndarray]:
    """The views of these images as drawn, `views.count` × [B, s, s, 3] uint8."""
    if not masks.views:
        return []
    seen = render(mx.array(images), tuple(map(mx.array, masks.views)), int(config.views.size))
    every = np.rint(np.array(seen)).astype(np.uint8)
    return [every[number :: config.views.count] for number in range(config.views.count)]


def _context_only(image: np.ndarray, context: np.ndarray, grid: int) -> np.ndarray:
    """Image [S, S, 3] with all but the patches numbered `context` [K] faded."""
    seen = np.isin(np.arange(grid**2), context).reshape(grid, grid)
    seen = np.kron(seen, np.ones((len(image) // grid,) * 2, bool))
    faded = (KEPT * image + (1 - KEPT) * 255 * np.array(to_rgb(FADED))).astype(np.uint8)
    return np.where(seen[:, :, None], image, faded)


def _draw_targets(ax: Axes, targets: np.ndarray, pool: np.ndarray, grid: int) -> None:
    """Outline target blocks [M, h·w] and the cells [n, h·w] that each is pooled into."""
    for block, (patches, colour) in enumerate(zip(targets, cycle(COLOURS), strict=False)):
        gap = grid * INSET * (block + 0.5)
        x, y, width, height = _box(patches, grid)
        inner = x + gap, y + gap, width - 2 * gap, height - 2 * gap
        edge = outline(ax, inner, colour, 1.8, label=f"target block {block + 1}")
        for cell in pool:
            outline(ax, _box(patches[cell > 0], grid), colour, 0.8).set_clip_path(edge)


def _box(patches: np.ndarray, grid: int) -> tuple[int, int, int, int]:
    """Left, top, width and height of a rectangle of patches."""
    rows, columns = np.divmod(patches, grid)
    return columns.min(), rows.min(), np.ptp(columns) + 1, np.ptp(rows) + 1
