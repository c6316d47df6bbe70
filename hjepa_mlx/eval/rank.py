"""Collapse signals: how many directions the features use, and how far they spread."""

from __future__ import annotations

import numpy as np


def effective_rank(features: np.ndarray) -> float:
    """exp(entropy) of the eigenvalues of the centred covariance, as shares of their sum.

    features: [N, D]. Between 1 (all on a line, or no spread at all) and min(N − 1, D).
    Source: Roy and Vetterli, "The effective rank", EUSIPCO 2007, on covariance eigenvalues.
    """
    x = np.asarray(features, np.float64)
    eigenvalues = np.linalg.svd(x - x.mean(0), compute_uv=False) ** 2
    total = eigenvalues.sum()
    if total <= np.finfo(np.float32).eps * np.square(x).sum():
        return 1.0
    share = eigenvalues[eigenvalues > 0] / total
    return float(np.exp(-(share * np.log(share)).sum()))


def feature_std(features: np.ndarray) -> float:
    """Spread of the features' directions: 1 when isotropic, 0 when all point the same way.

    features: [N, D]. Mean over dimensions of the standard deviation of the unit vectors, times √D
    (Chen and He, arXiv 2011.10566, section 4.1).
    """
    x = np.asarray(features, np.float64)
    x = x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)
    return float(x.std(0).mean() * np.sqrt(x.shape[1]))
