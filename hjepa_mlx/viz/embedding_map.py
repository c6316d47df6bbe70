"""A map of embeddings: pictures that the network finds alike lie close together."""

from __future__ import annotations

import numpy as np
from matplotlib.patches import Patch
from PIL import Image

from hjepa_mlx.eval.knn import nearest
from hjepa_mlx.viz.canvas import COLOURS, WIDTH, Picture, label, principal
from hjepa_mlx.viz.samples import Samples

SIDE, THUMBNAIL = 32, 40  # pictures along the map's side, and pixels of each
UNLIKE = 8  # pictures that are least like any other


def draw(means: np.ndarray, pictures: Samples) -> Picture:
    """The pictures by the first two principal components of their features [N, D].

    Where several fall on one place, the first is shown. With as many classes as there are colours,
    frames tell them. Below: the pictures least like any other.
    """
    places, share = components(means)
    shown = visible(places)
    figure = Picture(figsize=(WIDTH, WIDTH + 2.2), layout="constrained")
    grid = figure.add_gridspec(2, UNLIKE, height_ratios=(WIDTH - 0.4, 1.6))
    ax = figure.add_subplot(grid[0, :])
    framed = 0 < len(pictures.classes) <= len(COLOURS)
    ax.imshow(canvas(places, shown, pictures, framed))
    ax.set_axis_off()
    ax.set_title(
        f"Map: {len(shown):,} of {len(means):,} training images by two principal components "
        f"({100 * share:.0f} % of variance)",
        loc="left", weight="bold", fontsize=10,
    )  # fmt: skip
    if framed:
        named = zip(pictures.classes, COLOURS, strict=False)
        handles = [Patch(color=colour, label=label(name)) for name, colour in named]
        ax.legend(handles=handles, loc="upper center", bbox_to_anchor=(0.5, 0), ncols=7, fontsize=8)
    closest = nearest(means, means, 2)[0][:, 1] if len(means) > 1 else np.zeros(len(means))
    for place, row in enumerate(np.argsort(closest, kind="stable")[:UNLIKE]):
        ax = figure.add_subplot(grid[1, place])
        ax.imshow(pictures.images[row])
        ax.set(xticks=[], yticks=[])
        name = label(pictures.names[row], 18) if pictures.names else ""
        ax.set_xlabel(f"{name}\n{closest[row]:.2f}", fontsize=7, parse_math=False)
        if place == 0:
            ax.set_title("least like any other (cosine)", loc="left", fontsize=9)
    return figure


def components(means: np.ndarray) -> tuple[np.ndarray, float]:
    """Cells [N, 2] of the map, column and row; the share of variance that its axes show."""
    scaled, share = principal(means, 2)
    return np.minimum((scaled * SIDE).astype(int), SIDE - 1), share


def visible(places: np.ndarray) -> np.ndarray:
    """The first picture of each place."""
    return np.unique(places[:, 1] * SIDE + places[:, 0], return_index=True)[1]


def canvas(places: np.ndarray, shown: np.ndarray, pictures: Samples, framed: bool) -> np.ndarray:
    """Thumbnails at their places, [SIDE · THUMBNAIL, SIDE · THUMBNAIL, 3] uint8 on white."""
    found = np.full((SIDE * THUMBNAIL,) * 2 + (3,), 255, np.uint8)
    for row in shown:
        left, top = places[row] * THUMBNAIL
        cell = found[top : top + THUMBNAIL, left : left + THUMBNAIL]
        if framed:
            colour = COLOURS[pictures.labels[row]]
            cell[:] = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
        inner = THUMBNAIL - (6 if framed else 2)
        edge = (THUMBNAIL - inner) // 2
        small = Image.fromarray(pictures.images[row]).resize((inner, inner))
        cell[edge : edge + inner, edge : edge + inner] = np.asarray(small)
    return found
