"""The protocols: features of one network in, named scores of one level out."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from hjepa_mlx.errors import UsageError
from hjepa_mlx.eval import attentive_probe, linear_probe, rank
from hjepa_mlx.eval.arrays import HELD_OUT, accuracy
from hjepa_mlx.eval.features import Features
from hjepa_mlx.eval.knn import TEMPERATURE, K, knn_accuracy
from hjepa_mlx.rng import generator

FEW_LABELS = (0.01, 0.1)  # shares of the training labels

Scores = dict[str, Any]


@dataclass(frozen=True)
class Protocol:
    """The settings of an evaluation; the defaults are the field's.

    draws: of few labels; 0 leaves them out. attentive_images: training images for the attentive
    probe, at most; 0 leaves it out. Raises UsageError for settings that mean nothing.
    """

    k: int = K
    temperature: float = TEMPERATURE
    draws: int = 5
    attentive_images: int | None = None

    def __post_init__(self) -> None:
        if self.k < 1 or not 0 < self.temperature < math.inf or self.draws < 0:
            raise UsageError("k and temperature must be positive and finite, draws at least 0.")
        if self.attentive_images is not None and not (
            self.attentive_images == 0 or self.attentive_images >= HELD_OUT
        ):
            raise UsageError(
                f"attentive_images={self.attentive_images}: the attentive probe needs at least "
                f"{HELD_OUT} training images; 0 leaves it out."
            )

    def described(self) -> dict[str, Any]:
        """The settings, and the meaning of each figure, for the JSON."""
        return {
            "k": self.k,
            "temperature": self.temperature,
            "linear_probe": "logistic_regression on standardised features, settings chosen on "
            f"every {HELD_OUT}th training image",
            "attentive_probe": "one cross-attention query (AIM) on normalised tokens",
            "few_labels": f"mean and deviation of {self.draws} draws, C = 1",
            "features": "mean over the grid of each level; all_levels: each scaled to unit length, "
            "side by side",
            "feature_rank": "exp(entropy) of the centred covariance's eigenvalues, test images",
            "rankme": "exp(entropy) of the singular values, not centred, test images",
        }


def level_scores(
    train: Features, test: Features, level: str, protocol: Protocol, few: bool
) -> Scores:
    """Every score of a level's pooled features, by kind; without labels only the ranks.

    Whatever is fitted or chosen sees `train` only. few: also with few labels.
    """
    described = rank.describe(test.pooled[level])
    scores: Scores = {"features": described, "feature_rank": described["effective_rank"]}
    if len(train.labels):
        scores |= class_scores(train, test, level, protocol)
        for share in FEW_LABELS if few and protocol.draws else ():
            key = f"few_labels_{100 * share:.0f}_percent"
            scores[key] = few_labels(train, test, level, share, protocol.draws)
    return scores


def class_scores(train: Features, test: Features, level: str, protocol: Protocol) -> Scores:
    """k-NN and linear probe of a level's pooled features, in per cent."""
    x, queries = train.pooled[level], test.pooled[level]
    k, temperature = protocol.k, protocol.temperature
    probe = linear_probe.fit(x, train.labels)
    return {
        "knn": knn_accuracy(x, train.labels, queries, test.labels, k, temperature),
        "linear_probe": accuracy(probe.predict(queries), test.labels),
        "probe_setting": {"l2": probe.l2},
        "probe_converged": probe.converged,
    }


def token_scores(train: Features, test: Features, level: str) -> Scores:
    """The attentive probe of a level's tokens, in per cent."""
    probe = attentive_probe.fit(train.tokens[level], train.token_labels)
    return {"attentive_probe": accuracy(probe.predict(test.tokens[level]), test.token_labels)}


def few_labels(
    train: Features, test: Features, level: str, share: float, draws: int
) -> dict[str, float | None]:
    """Linear-probe accuracy with a share of the labels, the same share of every class (at least 1).

    Mean and standard deviation over draws of the labelled images.
    """
    classes = int(train.labels.max()) + 1
    by_class = [np.flatnonzero(train.labels == number) for number in range(classes)]
    reached = []
    for draw in range(draws):
        order = generator(0, "few labels", draw)
        rows = np.concatenate(
            [order.permutation(of)[: max(1, round(share * len(of)))] for of in by_class if len(of)]
        )
        probe = linear_probe.fit_few(train.pooled[level][rows], train.labels[rows], classes)
        reached.append(accuracy(probe.predict(test.pooled[level]), test.labels))
    spread = float(np.std(reached, ddof=1)) if draws > 1 else None
    return {"mean": float(np.mean(reached)), "std": spread}
