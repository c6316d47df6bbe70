"""What features look like without labels: how many directions they use, and how they spread."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from hjepa_mlx.eval.accuracy import check_finite
from hjepa_mlx.eval.blocks import blocks

BLOCK = 1 << 14
PAIRS_OF = 2048  # images whose pairs are compared for uniformity
RANKME_EPSILON = 1e-7


def describe(features: np.ndarray) -> dict[str, float]:
    """All label-free figures of features [N, D]; ranks also in per cent of D."""
    check_finite(features, "Ranks")
    D = features.shape[1]
    ranks = {"effective_rank": effective_rank(features), "rankme": rankme(features)}
    return {
        **ranks,
        **{f"{name}_percent": 100 * value / D for name, value in ranks.items()},
        "dimension": D,
        "feature_std": feature_std(features),
        "mean_cosine": mean_cosine(features),
        "uniformity": uniformity(features),
    }


def effective_rank(features: np.ndarray) -> float:
    """exp(entropy) of the eigenvalues of the centred covariance, as shares of their sum.

    features: [N, D]. Between 1 (all on a line, or no spread at all) and min(N − 1, D).
    Source: Roy and Vetterli, "The effective rank", EUSIPCO 2007, on covariance eigenvalues.
    """
    mean = sum(x.sum(0) for x in _blocks(features)) / len(features)
    squares = sum(float(np.square(x).sum()) for x in _blocks(features))
    eigenvalues = _eigenvalues(features, mean)
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
    for x in map(_unit, _blocks(features)):
        total += x.sum(0)
        squares += np.square(x).sum(0)
    variance = squares / len(features) - np.square(total / len(features))
    return float(np.sqrt(np.maximum(variance, 0)).mean() * np.sqrt(features.shape[1]))


def mean_cosine(features: np.ndarray) -> float:
    """Mean cosine similarity of two different images: 0 when spread evenly, 1 when collapsed.

    A single image counts as collapsed, here and below, as it does for the ranks; so do zeros.
    """
    N = len(features)
    if N < 2 or not features.any():
        return 1.0
    total = np.sum([_unit(x).sum(0) for x in _blocks(features)], 0)
    return float((total @ total - N) / (N * (N - 1)))


def uniformity(features: np.ndarray) -> float:
    """log of the mean of exp(−2·|u − v|²) over pairs of unit features; lower is more even, 0 worst.

    Over all pairs of PAIRS_OF evenly chosen images. Source: Wang and Isola, arXiv 2005.10242.
    """
    if len(features) < 2 or not features.any():
        return 0.0
    rows = np.unique(np.linspace(0, len(features) - 1, min(PAIRS_OF, len(features))).astype(int))
    x = _unit(features[rows])
    similarity = (x @ x.T)[np.triu_indices(len(x), 1)]
    return float(np.log(np.exp(-4 * (1 - similarity)).mean()))


def alignment(features: np.ndarray, others: np.ndarray) -> float:
    """Mean |u − v|² of the unit features of two views of each image; 0 when views look the same.

    features, others: [N, D]. Source: Wang and Isola, arXiv 2005.10242, equation 3, α = 2.
    """
    return float(np.square(_unit(features) - _unit(others)).sum(1).mean())


def _eigenvalues(features: np.ndarray, centre: np.ndarray | float) -> np.ndarray:
    """Eigenvalues [D] of XᵀX, where X is the features less `centre`."""
    gram = np.zeros((features.shape[1], features.shape[1]))
    for x in _blocks(features):
        x = x - centre
        gram += x.T @ x
    return np.maximum(np.linalg.eigvalsh(gram), 0)


def _blocks(features: np.ndarray) -> Iterator[np.ndarray]:
    return (np.asarray(features[rows], np.float64) for rows in blocks(len(features), BLOCK))


def _unit(x: np.ndarray) -> np.ndarray:
    x = np.asarray(x, np.float64)
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)
