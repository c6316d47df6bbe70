"""Accuracy in per cent, how sure it is, and the images a choice may be made on."""

from __future__ import annotations

import math

import numpy as np

from hjepa_mlx.errors import UsageError
from hjepa_mlx.eval.blocks import blocks
from hjepa_mlx.rng import generator

Z95 = 1.959964  # standard normal quantile of a 95 % interval
HELD_OUT = 10  # every tenth training image is held out to choose a probe's settings


def accuracy(predicted: np.ndarray, labels: np.ndarray) -> float:
    """Per cent of predicted [N] that equal labels [N]."""
    return 100 * float((predicted == labels).mean())


def interval(percent: float, count: int) -> tuple[float, float]:
    """Wilson's 95 % interval, in per cent, of an accuracy measured on `count` images.

    It covers which test images were drawn, not which seed was trained.
    """
    p, z = percent / 100, Z95
    centre = p + z * z / (2 * count)
    half = z * math.sqrt(p * (1 - p) / count + z * z / (4 * count * count))
    scale = 100 / (1 + z * z / count)
    return scale * (centre - half), scale * (centre + half)


def validation(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows of `count` training images to fit on, and rows to choose settings on; always the same.

    The test images are not among them: whatever chooses sees training images only.
    """
    shuffled = generator(0, "validation").permutation(count)
    held_out = np.arange(count) % HELD_OUT == HELD_OUT - 1
    return np.sort(shuffled[~held_out]), np.sort(shuffled[held_out])


def check(features: np.ndarray, labels: np.ndarray, what: str) -> None:
    """Refuse training data that no classifier can be fitted to."""
    check_labels(features, labels, what)
    if len(labels) < HELD_OUT:
        raise UsageError(
            f"{what} needs at least {HELD_OUT} training images, there are {len(labels)}."
        )
    if len(np.unique(labels)) < 2:
        raise UsageError(f"{what} needs images of at least two classes; all have the same label.")
    check_finite(features, what)


def check_labels(features: np.ndarray, labels: np.ndarray, what: str) -> None:
    """Refuse what is no array [N] of class numbers from 0, one for each of the features."""
    kind = isinstance(labels, np.ndarray) and labels.ndim == 1 and labels.dtype.kind in "iu"
    if not kind or labels.min(initial=0) < 0:
        raise UsageError(f"{what}: labels are a numpy array [N] of whole numbers from 0.")
    if len(features) != len(labels):
        raise UsageError(f"{what}: {len(features)} images, but {len(labels)} labels.")


def check_finite(features: np.ndarray, what: str) -> None:
    """Refuse features that a broken model made."""
    for rows in blocks(len(features), 1 << 16):
        if not np.isfinite(features[rows]).all():
            raise UsageError(f"{what}: the features hold NaN or infinity; nothing can be learnt.")
