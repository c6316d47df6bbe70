"""Nearest neighbours: which training images a level finds most like a test image."""

from __future__ import annotations

import numpy as np

from hjepa_mlx.eval.knn import nearest
from hjepa_mlx.models.hjepa import HJEPA
from hjepa_mlx.viz.canvas import COLOURS, Picture, label, show, tiles
from hjepa_mlx.viz.samples import Samples

BATCH = 128
SAME, OTHER = ("✓", COLOURS[2], "-"), ("✗", COLOURS[1], (0, (2, 1.5)))  # sign, colour, dashes


def draw(
    model: HJEPA,
    queries: Samples,
    bank: Samples,
    level: int = -1,
    k: int = 7,
    bank_means: np.ndarray | None = None,
) -> Picture:
    """Each query and the k images of the bank whose mean features at `level` are most like its own.

    With classes, ✓ and a whole frame mark a neighbour of the query's class, ✗ and a broken one
    any other. bank_means: the bank's features, where they are known already.
    """
    level %= int(model.config.model.levels)
    if bank_means is None:
        bank_means = level_means(model, bank.images, level)
    query_means = level_means(model, queries.images, level)
    similarity, found = nearest(bank_means, query_means, min(k, len(bank.images)))
    heading = f"Nearest of {len(bank.images):,} training images by level {level} features"
    if queries.classes:
        share = (bank.labels[found] == queries.labels[:, None]).mean()
        heading += f": {100 * share:.0f} % of the query's class"
    figure, axes = tiles(len(found), 1 + found.shape[1], heading, text=0.4 * len(found))
    style = {"fontsize": 8, "parse_math": False}
    for row, image in enumerate(queries.images):
        show(axes[row, 0], image)
        name = label(queries.classes[queries.labels[row]]) if queries.classes else ""
        axes[row, 0].set_xlabel(f"query\n{name}", weight="bold", **style)
        for ax, index, cosine in zip(axes[row, 1:], found[row], similarity[row], strict=True):
            show(ax, bank.images[index])
            text, colour = f"{cosine:.3f}", "black"
            if queries.classes:
                same = bank.labels[index] == queries.labels[row]
                sign, colour, dashes = SAME if same else OTHER
                text = f"{sign} {text}\n{label(bank.classes[bank.labels[index]])}"
                ax.set_frame_on(True)
                ax.spines[:].set(color=colour, linewidth=2, linestyle=dashes)
            ax.set_xlabel(text, color=colour, **style)
    return figure


def level_means(model: HJEPA, images: np.ndarray, level: int) -> np.ndarray:
    """Features of `level` averaged over the grid: images [N, S, S, 3] give [N, D]."""
    batches = (images[start : start + BATCH] for start in range(0, len(images), BATCH))
    means = [np.array(model.encode(batch)[level].mean(1), np.float32) for batch in batches]
    return np.concatenate(means)
