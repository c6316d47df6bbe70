"""Shared by all evaluators: chunks of rows, checks, accuracy, images to choose settings on."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from hjepa_mlx.errors import UsageError
from hjepa_mlx.rng import generator

Z95 = 1.959964  # standard normal quantile of a 95 % interval
HELD_OUT = 10  # every tenth training image is held out to choose a probe's settings


def chunks(count: int, size: int) -> Iterator[slice]:
    """Slices of up to `size` rows that cover `count` rows in order."""
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))


def accuracy(predicted: np.ndarray, labels: np.ndarray) -> float:
    """Per cent of predicted [N] that equal labels [N]."""
    return 100 * float((predicted == labels).mean())


def interval(percent: float, count: int) -> tuple[float, float]:
    """Wilson's 95 % interval, in per cent, of an accuracy measured on `count` images.

    It covers the choice of test images, not the seed of training.
    """
    p, z = percent / 100, Z95
    centre = p + z * z / (2 * count)
    half = z * math.sqrt(p * (1 - p) / count + z * z / (4 * count * count))
    scale = 100 / (1 + z * z / count)
    return scale * (centre - half), scale * (centre + half)


def validation(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows of `count` training images to fit on, and rows to choose settings on; always equal."""
    shuffled = generator(0, "validation").permutation(count)
    held_out = np.arange(count) % HELD_OUT == HELD_OUT - 1
    return np.sort(shuffled[~held_out]), np.sort(shuffled[held_out])


def check(features: np.ndarray, labels: np.ndarray, who: str) -> None:
    """Refuse training data that no classifier can be fitted to."""
    check_labels(features, labels, who)
    if len(labels) < HELD_OUT:
        raise UsageError(
            f"{who} needs at least {HELD_OUT} training images; there are {len(labels)}."
        )
    if (labels == labels[0]).all():
        raise UsageError(f"{who} needs images of at least two classes; these all have one label.")
    check_finite(features)


def check_labels(features: np.ndarray, labels: np.ndarray, who: str) -> None:
    """Refuse labels that are not class numbers from 0, [N], one for each of the features."""
    right = isinstance(labels, np.ndarray) and labels.ndim == 1 and labels.dtype.kind in "iu"
    if not right or labels.min(initial=0) < 0:
        raise UsageError(f"{who} needs labels as a numpy array [N] of whole numbers from 0.")
    if len(features) != len(labels):
        raise UsageError(f"{who} got {len(features)} images, but {len(labels)} labels.")


def check_finite(features: np.ndarray) -> None:
    """Refuse the features of a broken model."""
    for rows in chunks(len(features), 1 << 16):
        if not np.isfinite(features[rows]).all():
            raise UsageError("The features hold NaN or infinity; this model cannot be evaluated.")
