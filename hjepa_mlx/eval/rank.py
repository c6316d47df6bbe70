"""Figures that need no labels: how many directions features use, and how far they spread."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from hjepa_mlx.eval.arrays import check_finite, chunks

CHUNK = 1 << 14  # images
RANKME_EPSILON = 1e-7


def describe(features: np.ndarray) -> dict[str, float]:
    """All label-free figures of features [N, D]; ranks also in per cent of D."""
    check_finite(features)
    D = features.shape[1]
    ranks = {"effective_rank": effective_rank(features), "rankme": rankme(features)}
    percent = {f"{name}_percent": 100 * value / D for name, value in ranks.items()}
    return {**ranks, **percent, "dimension": D, "feature_std": feature_std(features)}


def effective_rank(features: np.ndarray) -> float:
    """exp(entropy) of the eigenvalues of the centred covariance, as shares of their sum.

    features: [N, D]. Between 1 (all on a line, or no spread at all) and min(N − 1, D).
    Source: Roy and Vetterli, "The effective rank", EUSIPCO 2007, on covariance eigenvalues.
    """
    squares = sum(float(np.square(x).sum()) for x in _chunks(features))
    eigenvalues = _eigenvalues(features, mean_of(features))
    total = eigenvalues.sum()
    if total <= np.finfo(np.float32).eps * squares:
        return 1.0
    share = eigenvalues[eigenvalues > 0] / total
    return float(np.exp(-(share * np.log(share)).sum()))


def rankme(features: np.ndarray) -> float:
    """exp(entropy) of the singular values of the features, as shares of their sum; not centred.

    features: [N, D]. Source: RankMe (Garrido et al., ICML 2023, arXiv 2210.02885, equation 1). It
    is larger than `effective_rank` of the same features: singular values fall off half as fast as
    eigenvalues, and here the mean counts as a direction.
    """
    singular = np.sqrt(_eigenvalues(features, 0.0))
    if not singular.any():
        return 1.0
    share = singular / singular.sum() + RANKME_EPSILON
    return float(np.exp(-(share * np.log(share)).sum()))


def feature_std(features: np.ndarray) -> float:
    """Spread of the features' directions: 1 when isotropic, 0 when all point the same way.

    features: [N, D]. Mean over dimensions of the standard deviation of the unit vectors, times √D
    (Chen and He, arXiv 2011.10566, section 4.1).
    """
    total, squares = np.zeros(features.shape[1]), np.zeros(features.shape[1])
    for x in _chunks(features):
        x = x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)
        total += x.sum(0)
        squares += np.square(x).sum(0)
    variance = squares / len(features) - np.square(total / len(features))
    return float(np.sqrt(np.maximum(variance, 0)).mean() * np.sqrt(features.shape[1]))


def mean_of(features: np.ndarray) -> np.ndarray:
    """Mean [D] of features [N, D], in float64."""
    return sum((x.sum(0) for x in _chunks(features)), np.zeros(features.shape[1])) / len(features)


def scatter(features: np.ndarray, centre: np.ndarray | float) -> np.ndarray:
    """XᵀX [D, D] in float64, where X is the features [N, D] less `centre`."""
    gram = np.zeros((features.shape[1], features.shape[1]))
    for x in _chunks(features):
        x = x - centre
        gram += x.T @ x
    return gram


def _eigenvalues(features: np.ndarray, centre: np.ndarray | float) -> np.ndarray:
    return np.maximum(np.linalg.eigvalsh(scatter(features, centre)), 0)


def _chunks(features: np.ndarray) -> Iterator[np.ndarray]:
    return (np.asarray(features[rows], np.float64) for rows in chunks(len(features), CHUNK))
