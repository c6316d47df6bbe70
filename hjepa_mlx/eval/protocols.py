"""Every protocol on the features of one encoder: arrays in, named scores out."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from hjepa_mlx.errors import UsageError
from hjepa_mlx.eval import attentive_probe, linear_probe, rank
from hjepa_mlx.eval.accuracy import HELD_OUT, accuracy, interval
from hjepa_mlx.eval.features import Features
from hjepa_mlx.eval.knn import TEMPERATURE, K, knn_accuracy
from hjepa_mlx.rng import generator

FEW_LABELS = (0.01, 0.1)  # shares of the training labels

Scores = dict[str, Any]


@dataclass(frozen=True)
class Protocol:
    """What is run, and how; the defaults are the field's.

    probe: "logistic_regression" or "sgd". draws: of few labels; 0 leaves them out. token_gb: disk
    for the attentive probe's tokens, GB per split and network (up to 4 times this in all); 0 leaves
    it out.
    """

    k: int = K
    temperature: float = TEMPERATURE
    probe: str = linear_probe.SOLVER
    draws: int = 5
    token_gb: float = 4.0

    def __post_init__(self) -> None:
        if self.probe not in linear_probe.SOLVERS:
            known = ", ".join(linear_probe.SOLVERS)
            raise UsageError(f"No linear probe named '{self.probe}'. There are: {known}.")
        finite = math.isfinite(self.temperature) and math.isfinite(self.token_gb)
        if self.k < 1 or self.temperature <= 0 or min(self.draws, self.token_gb) < 0 or not finite:
            raise UsageError(
                "k and temperature must be positive, draws and token_gb at least 0, all finite."
            )

    def described(self) -> dict[str, Any]:
        """The settings, and what each figure means, for the JSON."""
        return {
            "k": self.k,
            "temperature": self.temperature,
            "linear_probe": self.probe + " on standardised features, settings chosen on every "
            f"{HELD_OUT}th training image",
            "attentive_probe": "one cross-attention query (AIM) on normalised tokens",
            "few_labels": f"mean and deviation of {self.draws} draws, C = 1",
            "features": "mean over the grid of each level; all_levels: each scaled to unit length, "
            "side by side",
            "feature_rank": "exp(entropy) of the centred covariance's eigenvalues, test images",
            "rankme": "exp(entropy) of the singular values, not centred, test images",
        }

    def token_stride(self, images: int, tokens: int, dim: int) -> int:
        """Keep the tokens of every n-th of so many images: as many as fit `token_gb` (float16)."""
        size = images * tokens * dim * 2
        return max(1, -(-size // max(1, int(self.token_gb * 1e9))))


def level_scores(
    train: Features, test: Features, name: str, protocol: Protocol, few: bool
) -> Scores:
    """The scores of one level's mean features, by protocol; accuracies in per cent.

    Whatever is fitted or chosen sees `train` only; `test` is then looked at once. few: also with
    few labels.
    """
    x, queries = train.by_name[name], test.by_name[name]
    described = rank.describe(queries)
    scores: Scores = {"features": described, "feature_rank": described["effective_rank"]}
    if not len(train.labels):
        return scores
    scores["knn"] = knn_accuracy(
        x, train.labels, queries, test.labels, protocol.k, protocol.temperature
    )
    probe = linear_probe.fit(x, train.labels, protocol.probe)
    scores["linear_probe"] = accuracy(probe.predict(queries), test.labels)
    scores["probe_setting"], scores["probe_converged"] = probe.setting, probe.converged
    scores["confidence_95"] = {
        kind: interval(scores[kind], len(test)) for kind in ("knn", "linear_probe")
    }
    for share in FEW_LABELS if few and protocol.draws else ():
        key = f"few_labels_{100 * share:.0f}_percent"
        scores[key] = few_labels(train, test, name, share, protocol.draws)
    return scores


def token_scores(train: Features, test: Features, name: str) -> Scores:
    """The scores of one level's tokens."""
    probe = attentive_probe.fit(train.tokens[name], train.token_labels)
    reached = accuracy(probe.predict(test.tokens[name]), test.token_labels)
    return {
        "attentive_probe": reached,
        "confidence_95": {"attentive_probe": interval(reached, len(test.token_labels))},
    }


def few_labels(
    train: Features, test: Features, name: str, share: float, draws: int
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
        probe = linear_probe.fit_few(train.by_name[name][rows], train.labels[rows], classes)
        reached.append(accuracy(probe.predict(test.by_name[name]), test.labels))
    spread = float(np.std(reached, ddof=1)) if draws > 1 else None
    return {"mean": float(np.mean(reached)), "std": spread}
