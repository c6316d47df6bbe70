"""Samples: a few images of a data set in memory, with their labels."""

from __future__ import annotations

import os
from itertools import islice
from typing import NamedTuple

import numpy as np

from hjepa_mlx.config import Config
from hjepa_mlx.data.pipeline import Skipped, evaluation_images
from hjepa_mlx.data.source import Source
from hjepa_mlx.errors import HJEPAError
from hjepa_mlx.rng import generator


class Samples(NamedTuple):
    """N images of one size and their names; labels [N] index `classes`, both empty if none."""

    images: np.ndarray  # [N, S, S, 3] uint8
    labels: np.ndarray
    classes: tuple[str, ...]
    names: tuple[str, ...] = ()


def samples(source: Source, config: Config, count: int) -> Samples:
    """The first `count` readable images of a fixed shuffle, one of each class before the others.

    Raises HJEPAError when no image can be read.
    """
    order = generator(0, "pictures").permutation(len(source))
    if source.classes:
        first = np.sort(np.unique(source.labels[order], return_index=True)[1])
        order = np.concatenate([order[first], np.delete(order, first)])
    skipped = Skipped()
    readable = islice(evaluation_images(source.take(order), config, skipped), count)
    found = {order[place]: image for place, image in readable}
    if not found:
        raise HJEPAError(f"{source.name}: no image can be read. {skipped.first()}")
    labels = source.labels[list(found)] if source.classes else source.labels
    names = tuple(os.path.basename(source.name_of(row)) for row in found)
    return Samples(np.stack(list(found.values())), labels, source.classes, names)
