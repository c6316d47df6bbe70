"""Masks on images: what the context encoder sees, and the cells to predict at each level."""

from __future__ import annotations

import math

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.patches import Patch, Rectangle

from hjepa_mlx.config import Config
from hjepa_mlx.masks import Masks, MaskSampler
from hjepa_mlx.viz.canvas import COLOURS, Picture, show, tiles

FADED, KEPT = "#C8CAE2", 0.2  # what is hidden turns into this until so much of it is left
INSET = 0.006  # of the image: a block is drawn smaller than the one before, so that both are seen
LEGEND = 5  # columns


def draw(config: Config, images: np.ndarray, step: int = 0) -> Picture:
    """Masks as drawn at step `step` for a batch of these images [B, S, S, 3] uint8: one row each.

    Context tokens are shown as they are, all else faded; target blocks are outlined, each in its
    colour, and divided into the cells whose features are predicted.
    """
    masks = MaskSampler(config)(step, len(images))
    blocks = range(masks.targets.shape[1])
    figure, axes = tiles(
        len(images),
        1 + len(masks.pool),
        "Masks: the context is seen, each cell inside the target blocks is predicted",
        bottom=0.15 + 0.22 * math.ceil((len(blocks) + 1) / LEGEND),
        top=0.75,
    )
    axes[0, 0].set_title("image", fontsize=9)
    for column, level in enumerate(config.predicted, 1):
        cell = config.model.patch_size * int(config.model.level_pool[level])
        axes[0, column].set_title(f"level {level}\ncells of {cell}×{cell} pixels", fontsize=9)
    for number, image in enumerate(images):
        show(axes[number, 0], image, config.grid)
        for level in range(len(masks.pool)):
            draw_one(axes[number, 1 + level], image, masks, number, level, config.grid)
    figure.legend(
        [
            *(Patch(fill=False, edgecolor=_colour(block), linewidth=2) for block in blocks),
            Patch(color=FADED),
        ],
        [*(f"target block {block + 1}" for block in blocks), "hidden"],
        loc="lower center",
        ncols=LEGEND,
        frameon=False,
        fontsize=9,
    )
    return figure


def draw_one(ax: Axes, image: np.ndarray, masks: Masks, number: int, level: int, grid: int) -> None:
    """The masks of image `number` of the batch at one level, in units of patches."""
    show(ax, context_only(image, masks.context[number], grid), grid)
    whole = np.ones_like(masks.pool[level][:1])
    for block, patches in enumerate(masks.targets[number]):
        colour = _colour(block)
        gap = grid * INSET * (block + 0.5)
        ((x, y, width, height),) = boxes(patches, whole, grid)
        outline = Rectangle((x + gap, y + gap), width - 2 * gap, height - 2 * gap)
        outline.set(fill=False, edgecolor=colour, linewidth=1.8)
        ax.add_patch(outline)
        for x, y, width, height in boxes(patches, masks.pool[level], grid):
            cell = Rectangle((x, y), width, height, fill=False, edgecolor=colour, linewidth=0.8)
            ax.add_patch(cell).set_clip_path(outline)


def context_only(image: np.ndarray, context: np.ndarray, grid: int) -> np.ndarray:
    """Image [S, S, 3] with all but the patches numbered `context` [K] faded."""
    seen = np.zeros(grid**2, bool)
    seen[context] = True
    size = len(image) // grid
    seen = seen.reshape(grid, grid).repeat(size, 0).repeat(size, 1)
    faded = (KEPT * image + (1 - KEPT) * 255 * np.array(to_rgb(FADED))).astype(np.uint8)
    return np.where(seen[:, :, None], image, faded)


def boxes(patches: np.ndarray, pool: np.ndarray, grid: int) -> list[tuple[int, int, int, int]]:
    """Left, top, width and height of each cell of a target block, in patches.

    patches: [h·w] indices; pool: [n, h·w], which of them each cell averages.
    """
    found = []
    for cell in pool:
        rows, columns = np.divmod(patches[cell > 0], grid)
        left, top = int(columns.min()), int(rows.min())
        found.append((left, top, int(columns.max()) + 1 - left, int(rows.max()) + 1 - top))
    return found


def _colour(block: int) -> str:
    return COLOURS[block % len(COLOURS)]
