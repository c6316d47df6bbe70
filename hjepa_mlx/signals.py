"""Collapse signals: what the features of a held-out batch look like as training goes on."""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from hjepa_mlx.config import Config
from hjepa_mlx.data.pipeline import Skipped, evaluation_images
from hjepa_mlx.data.sources import Source
from hjepa_mlx.eval.rank import effective_rank, feature_std
from hjepa_mlx.models.hjepa import HJEPA

IMAGES = 256
RANK_LOST, STD_LOST = 0.5, 0.2  # below these shares of their initial values a warning is due


class Signals:
    """Feature standard deviation and effective rank of a fixed batch, for every level.

    Also the loss that knowing only a cell's position would reach: where the training loss is no
    lower, nothing about the images has been learned yet.
    """

    def __init__(self, model: HJEPA, source: Source, config: Config, skipped: Skipped) -> None:
        self.model = model
        order = np.random.default_rng(0).permutation(len(source))[:IMAGES]
        images = [x for _, x in evaluation_images(source.take(np.sort(order)), config, skipped)]
        self._images = [np.stack(images[i : i + 64]) for i in range(0, len(images), 64)]

    def __call__(self) -> dict[str, float]:
        """Signals of the target encoder as it is now."""
        parts = []
        for images in self._images:
            parts.append(self.model.encode(images))
            mx.eval(parts[-1])
        signals = {}
        for level, features in enumerate(zip(*parts, strict=True)):
            x = np.concatenate([np.array(part, np.float32) for part in features])  # [N, n, D]
            mean = x.mean(1)
            signals[f"feature_std_level_{level}"] = feature_std(mean)
            signals[f"effective_rank_level_{level}"] = effective_rank(mean)
            signals[f"position_only_loss_level_{level}"] = position_only_loss(x)
        return signals


def position_only_loss(features: np.ndarray) -> float:
    """Smooth-L1 loss of predicting each position's mean over images; features: [N, n, D]."""
    x = features.astype(np.float64)
    x = x - x.mean(2, keepdims=True)
    x = x / np.sqrt(np.square(x).mean(2, keepdims=True) + 1e-5)
    error = np.abs(x - x.mean(0))
    return float(np.where(error < 1, 0.5 * error**2, error - 0.5).mean())


def warnings(first: dict[str, float], now: dict[str, float]) -> list[str]:
    """What is wrong with the signals, in words, compared with the first ones of the run."""
    found = []
    for key, value in now.items():
        lost = RANK_LOST if key.startswith("effective_rank") else STD_LOST
        if key.startswith("position_only") or value >= lost * first.get(key, 0.0):
            continue
        kind, level = key.rsplit("_level_", 1)
        found.append(
            f"Level {level} may be collapsing: {kind.replace('_', ' ')} {value:.2f}, at the start "
            f"{first[key]:.2f}. If the loss falls too, lower optim.lr or set loss.sigreg."
        )
    return found
