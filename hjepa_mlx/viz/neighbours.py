"""Nearest neighbours: which training images a level finds most like a test image."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes

from hjepa_mlx.eval.knn import nearest
from hjepa_mlx.models.hjepa import HJEPA
from hjepa_mlx.viz.canvas import COLOURS, Picture, label, show, tiles
from hjepa_mlx.viz.feature_maps import encode
from hjepa_mlx.viz.samples import Samples

BATCH = 128


def draw(
    model: HJEPA, queries: Samples, bank: Samples, level: int = -1, neighbours: int = 7
) -> Picture:
    """Each query and the images of the bank whose mean features at `level` are most like its own.

    With classes, ✓ and a whole frame mark a neighbour of the query's class, ✗ and a broken one
    any other.
    """
    level %= model.config.model.levels
    bank_means, query_means = (level_means(model, x.images, level) for x in (bank, queries))
    similarity, found = nearest(bank_means, query_means, min(neighbours, len(bank.images)))
    heading = f"Nearest of {len(bank.images):,} training images by level {level} features"
    if queries.classes:
        same = bank.labels[found] == queries.labels[:, None]
        heading += f": {100 * same.mean():.0f} % of the query's class"
    figure, axes = tiles(len(found), 1 + found.shape[1], heading, text=0.4 * len(found))
    style = {"fontsize": 8, "parse_math": False}
    for row, image in enumerate(queries.images):
        show(axes[row, 0], image)
        name = label(queries.classes[queries.labels[row]]) if queries.classes else ""
        axes[row, 0].set_xlabel(f"query\n{name}", weight="bold", **style)
        for ax, index, cosine in zip(axes[row, 1:], found[row], similarity[row], strict=True):
            show(ax, bank.images[index])
            name = label(bank.classes[bank.labels[index]]) if queries.classes else ""
            ax.set_xlabel(f"{cosine:.3f}\n{name}".rstrip(), **style)
            if queries.classes:
                _mark(ax, bank.labels[index] == queries.labels[row])
    return figure


def level_means(model: HJEPA, images: np.ndarray, level: int) -> np.ndarray:
    """Features of `level` averaged over the grid: images [N, S, S, 3] give [N, D]."""
    batches = (images[start : start + BATCH] for start in range(0, len(images), BATCH))
    return np.concatenate([encode(model, batch)[level].mean(1) for batch in batches])


def _mark(ax: Axes, same: bool) -> None:
    """Frame and mark a neighbour as of the query's class or not."""
    sign, colour, dashes = ("✓", COLOURS[2], "-") if same else ("✗", COLOURS[1], (0, (2, 1.5)))
    ax.set_frame_on(True)
    ax.spines[:].set(color=colour, linewidth=2, linestyle=dashes)
    ax.annotate(
        sign, (1, 1), (-7, -7), "axes fraction", "offset points",
        bbox={"boxstyle": "circle,pad=0.15", "color": colour},
        ha="center", va="center", color="white", weight="bold", fontsize=8,
    )  # fmt: skip
