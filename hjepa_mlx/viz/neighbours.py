"""Nearest neighbours: which training images a level finds most like a test image."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes

from hjepa_mlx.eval.knn import nearest
from hjepa_mlx.models.hjepa import HJEPA
from hjepa_mlx.viz.canvas import RIGHT, WRONG, Picture, label, show, tiles
from hjepa_mlx.viz.features import encode
from hjepa_mlx.viz.pictures import Pictures

BATCH = 128


def draw(
    model: HJEPA, queries: Pictures, bank: Pictures, level: int = -1, neighbours: int = 7
) -> Picture:
    """Each query and the images of the bank whose mean features at `level` are most like its own.

    With classes, ✓ and a whole frame mark a neighbour of the query's class, ✗ and a broken one
    any other.
    """
    level %= model.config.model.levels
    similarity, found = nearest(
        level_means(model, bank.images, level),
        level_means(model, queries.images, level),
        min(neighbours, len(bank.images)),
    )
    heading = f"Nearest of {len(bank.images):,} training images by level {level} features"
    right = None
    if queries.classes:
        right = bank.labels[found] == queries.labels[:, None]
        heading += f": {100 * right.mean():.0f} % of the query's class"
    figure, axes = tiles(len(found), 1 + found.shape[1], heading, below=0.36)
    for row, image in enumerate(queries.images):
        show(axes[row, 0], image)
        name = label(queries.classes[queries.labels[row]]) if queries.classes else ""
        axes[row, 0].set_xlabel(f"query\n{name}", weight="bold", fontsize=8, parse_math=False)
        for column, index in enumerate(found[row]):
            ax = axes[row, 1 + column]
            show(ax, bank.images[index])
            words = f"{similarity[row, column]:.3f}"
            if right is not None:
                words += "\n" + label(bank.classes[bank.labels[index]])
                _judge(ax, bool(right[row, column]))
            ax.set_xlabel(words, fontsize=8, parse_math=False)
    return figure


def level_means(model: HJEPA, images: np.ndarray, level: int) -> np.ndarray:
    """Features of `level` averaged over the grid: images [N, S, S, 3] give [N, D]."""
    batches = (images[start : start + BATCH] for start in range(0, len(images), BATCH))
    return np.concatenate([encode(model, batch)[level].mean(1) for batch in batches])


def _judge(ax: Axes, right: bool) -> None:
    """Frame and mark a neighbour as of the query's class or not."""
    colour = RIGHT if right else WRONG
    ax.spines[:].set(
        visible=True, color=colour, linewidth=2, linestyle="-" if right else (0, (2, 1.5))
    )
    ax.annotate(
        "✓" if right else "✗",
        (1, 1),
        (-7, -7),
        "axes fraction",
        "offset points",
        ha="center",
        va="center",
        color="white",
        weight="bold",
        fontsize=8,
        bbox={"boxstyle": "circle,pad=0.15", "color": colour},
    )
