"""Collapse signals: rank and spread of the features of a held-out batch as training goes on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import numpy as np

from hjepa_mlx.config import Config
from hjepa_mlx.data.pipeline import Skipped, evaluation_images
from hjepa_mlx.data.source import Source
from hjepa_mlx.eval.rank import effective_rank, feature_std
from hjepa_mlx.losses import LossFn, smooth_l1
from hjepa_mlx.models.hjepa import HJEPA

IMAGES = 256
EVERY = 10  # logged rows
SAME = 0.02  # a relative change that counts as none
IN_WORDS = {  # by the directions of loss and effective rank
    (-1, 1): "The loss falls while the rank rises: richer features, better predicted.",
    (1, 1): "Loss and rank rise together: healthy in a JEPA, whose targets get richer.",
    (0, 1): "The rank rises at a steady loss: features get richer.",
    (-1, -1): (
        "Loss and rank fall together, as in a collapse. Lower optim.lr, or set loss.vicreg or "
        "loss.sigreg."
    ),
    (0, -1): "The rank falls at a steady loss. A lower optim.lr or loss.vicreg keeps it up.",
    (1, -1): "The loss rises and the rank falls: the run is unstable. Lower optim.lr.",
    (-1, 0): "The loss falls at a steady rank.",
    (0, 0): "Loss and rank have levelled off.",
    (1, 0): "The loss rises at a steady rank: the targets change faster than they are learned.",
}
# Below these shares of the highest values so far a warning is due; the recipes' runs kept 0.86.
# The rank of an untrained network is hardly above 1, the least there is: its excess counts.
LEAST = {"effective_rank": 0.5, "feature_std": 0.5, "position_only_loss": 0.25}
ALIKE = 1e-3  # feature std of images that look alike


class Signals:
    """Feature standard deviation and effective rank of a fixed batch, for every level.

    Also the loss that knowing only a cell's position would reach: where the training loss is no
    lower, nothing about the images has been learned yet. `loss_fn` is what the run trains with.
    """

    def __init__(
        self, model: HJEPA, source: Source, config: Config, skipped: Skipped, loss_fn: LossFn
    ) -> None:
        self.model, self._loss_fn = model, loss_fn
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
            if x.shape[1] > 1:  # the whole image has no position
                signals[f"position_only_loss_level_{level}"] = position_only_loss(x, self._loss_fn)
        return signals


def position_only_loss(features: np.ndarray, loss_fn: LossFn = smooth_l1) -> float:
    """Error of predicting each position's mean over images; features: [N, n, D]."""
    x = mx.fast.layer_norm(mx.array(features), None, None, 1e-5)  # as targets are
    return float(loss_fn(mx.broadcast_to(x.mean(0), x.shape), x))


def highest(rows: list[dict[str, Any]]) -> dict[str, float]:
    """The highest value, in rows of metrics, of each signal that `warnings` looks at."""
    found: dict[str, float] = {}
    for row in rows:
        for key, value in row.items():
            if key.partition("_level_")[0] in LEAST:
                found[key] = max(value, found.get(key, 0.0))
    return found


def warnings(
    before: dict[str, float], now: dict[str, float], predicted: Sequence[int]
) -> list[str]:
    """A warning for each signal that is far below its highest value so far, `before`.

    The spread only of levels that are predicted: in long healthy runs that of earlier ones, which
    are only read, falls to less than half.
    """
    found = []
    for key, value in now.items():
        kind, _, level = key.partition("_level_")
        if kind not in LEAST or (kind == "feature_std" and int(level) not in predicted):
            continue
        best, least = before.get(key, 0.0), float(kind == "effective_rank")
        if best > 0 and value - least < LEAST[kind] * (best - least):
            found.append(
                f"Level {level} may be collapsing: {kind.replace('_', ' ')} {value:.3g}, it was "
                f"{best:.3g}. If the loss falls too, lower optim.lr or set loss.vicreg."
            )
        elif kind == "feature_std" and value < ALIKE:
            found.append(f"Level {level}: all images look alike to it. Are they different?")
    return found


def reading(rows: list[dict[str, Any]]) -> list[str]:
    """A run's metrics in words: loss and rank together, then each level's loss.

    Compares the last quarter of the rows with the quarter before it.
    """
    losses = [row["loss"] for row in rows if row.get("loss") is not None]
    ranks = [
        float(np.mean([v for k, v in row.items() if k.startswith("effective_rank")]))
        for row in rows
        if "effective_rank_level_0" in row
    ]
    found = []
    if len(losses) >= 8 and len(ranks) >= 4:
        found.append(IN_WORDS[_direction(losses), _direction(ranks)])
    signals: dict[str, Any] = next((r for r in reversed(rows) if "effective_rank_level_0" in r), {})
    last: dict[str, Any] = next((r for r in reversed(rows) if "loss" in r), {})
    above = [
        key.removeprefix("loss_level_")
        for key in last
        if key.startswith("loss_level_")
        and last[key] >= signals.get(f"position_only_{key}", np.inf)
    ]
    if above:
        found.append(
            f"Level {', '.join(above)}: the loss is no lower than that of guessing each place's "
            "average over all images. The model has learned little about the images there yet."
        )
    return found


def _direction(values: list[float]) -> int:
    """1 when the last quarter lies above the one before it, −1 when below, 0 within 2 %."""
    quarter = max(1, len(values) // 4)
    before, now = np.mean(values[-2 * quarter : -quarter]), np.mean(values[-quarter:])
    change = (now - before) / max(abs(before), 1e-12)
    return 0 if abs(change) < SAME else int(np.sign(change))
