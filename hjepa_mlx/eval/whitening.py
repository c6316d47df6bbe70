"""Whitening: a linear map, fitted without labels, after which no direction of features counts more.

A JEPA's features vary most in a few directions, and a cosine sees little else. Whitened, it sees
every direction alike, and k-NN finds what until then only a linear probe could.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hjepa_mlx.errors import UsageError
from hjepa_mlx.eval.arrays import check_finite
from hjepa_mlx.eval.rank import mean_of, scatter


@dataclass(frozen=True)
class Whitening:
    """x ↦ (x − mean) · matrix, where matrix [D, D] is a symmetric Σ^(−½)."""

    mean: np.ndarray  # [D]
    matrix: np.ndarray

    def __call__(self, features: np.ndarray) -> np.ndarray:
        """Features [N, D] whitened: [N, D] float32."""
        return ((features - self.mean) @ self.matrix).astype(np.float32)


def fit(features: np.ndarray) -> Whitening:
    """The whitening of features [N, D], whose covariance then is close to the identity.

    Σ is the covariance, shrunk towards a multiple of the identity, the more so the fewer images
    there are: directions that they hardly show are not blown up. How much is OAS's formula (Chen,
    Wiesel, Eldar and Hero, arXiv 0907.4698, equation 23; less 2/D, as in scikit-learn). Raises
    UsageError for features that are not finite, or none.
    """
    if features.ndim != 2 or not len(features):
        raise UsageError(f"Whitening needs features [N, D]; these are {list(features.shape)}.")
    check_finite(features)
    N, D = features.shape
    mean = mean_of(features)
    values, directions = np.linalg.eigh(scatter(features, mean) / N)
    values = np.maximum(values, 0)
    total, squares = values.sum(), np.square(values).sum()
    apart = (N + 1) * (squares - total**2 / D)
    share = min(1.0, (squares + total**2) / apart) if apart > 0 else 1.0
    shrunk = (1 - share) * values + share * (total / D or 1.0)
    matrix = (directions / np.sqrt(shrunk)) @ directions.T
    return Whitening(mean.astype(np.float32), matrix.astype(np.float32))
