"""The linear probe: logistic regression on frozen, standardised features, converged.

Its result does not depend on an optimiser's settings, nor on the device: numpy computes it. The L2
penalty is chosen on held-out training images, the chosen probe is fitted again to all training
images, and only that one sees the test images.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from hjepa_mlx import backend
from hjepa_mlx.eval.arrays import accuracy, check, chunks, validation

L2 = tuple(10.0**-n for n in range(1, 9))  # on ½·|W|², beside the mean cross-entropy
CHOOSING, FINAL = 3e-3, 3e-4  # largest preconditioned gradient at which L-BFGS stops
MOST_STEPS = 500  # of L-BFGS
PATIENCE = 3  # weaker penalties in a row that do no better end the search: they take longest
ROUNDING = 1e-5  # of the Hessian, computed in float32
LOGITS = 1 << 25  # held at once by L-BFGS (128 MB)
CHUNK = 1 << 16  # images standardised or classified at once


@dataclass(frozen=True)
class LinearProbe:
    """A fitted classifier of features [N, D]: weights [D + 1, C], the biases last."""

    mean: np.ndarray  # [D]
    scale: np.ndarray  # [D]
    weights: np.ndarray
    l2: float
    converged: bool

    def predict(self, features: np.ndarray) -> np.ndarray:
        """Classes [N] of features [N, D]."""
        winners = np.empty(len(features), np.int64)
        for rows in chunks(len(features), CHUNK):
            x = standardised(features[rows], self.mean, self.scale)
            winners[rows] = (x @ self.weights[:-1] + self.weights[-1]).argmax(1)
        return winners


def fit(features: np.ndarray, labels: np.ndarray) -> LinearProbe:
    """Fit the linear probe to training features [N, D] and labels [N]. Deterministic.

    Raises UsageError for a single class, too few images, or features that are not finite.
    """
    check(features, labels, "The linear probe")
    classes = int(labels.max()) + 1
    fitted, held_out = validation(len(labels))
    best_score, worse = -1.0, 0
    with backend.computing_threads():  # thin matrices: a BLAS with several threads is slower
        for probe in solutions(features[fitted], labels[fitted], classes, L2, tolerance=CHOOSING):
            score = accuracy(probe.predict(features[held_out]), labels[held_out])
            if score > best_score:
                best, best_score, worse = probe, score, 0
            else:
                worse += 1
            if worse == PATIENCE:
                break
        return next(solutions(features, labels, classes, [best.l2], best.weights))


def moments(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation [D] of features [N, D]; 1 where a dimension is constant."""
    total, squares = np.zeros(features.shape[1]), np.zeros(features.shape[1])
    for rows in chunks(len(features), CHUNK):
        total += features[rows].sum(0, dtype=np.float64)
    mean = total / len(features)
    for rows in chunks(len(features), CHUNK):
        squares += np.square(features[rows] - mean).sum(0)
    scale = np.sqrt(squares / len(features))
    scale[scale < 1e-6 * (1e-6 + np.abs(mean))] = 1.0
    return mean.astype(np.float32), scale.astype(np.float32)


def standardised(features: np.ndarray, mean: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """(features − mean) / scale, [N, D] float32."""
    x = np.subtract(features, mean, dtype=np.float32)
    return np.divide(x, scale, out=x)


def solutions(
    features: np.ndarray,
    labels: np.ndarray,
    classes: int,
    penalties: Sequence[float],
    start: np.ndarray | None = None,
    tolerance: float = FINAL,
) -> Iterator[LinearProbe]:
    """Minimise mean cross-entropy + ½·l2·|W|² (bias free) for each l2, each from the one before.

    features: [N, D]; start: weights [D + 1, C]. scikit-learn's C is 1 / (N·l2).
    """
    mean, scale = moments(features)
    x = standardised(features, mean, scale)
    del features  # of ImageNet's pixels, 14 GB
    weights = np.zeros((x.shape[1] + 1, classes), np.float32) if start is None else start
    for l2 in penalties:
        weights, converged = _minimise(x, labels, weights, l2, tolerance)
        yield LinearProbe(mean, scale, weights, l2, converged)


def _minimise(
    x: np.ndarray, labels: np.ndarray, weights: np.ndarray, l2: float, tolerance: float
) -> tuple[np.ndarray, bool]:
    """Weights [D + 1, C] after L-BFGS, and whether it converged.

    Preconditioned by the Cholesky factor of the Hessian where it starts: on the strongly correlated
    features of a JEPA that takes a small part of the iterations, and ends at the same minimum.
    """
    from scipy.linalg import solve_triangular  # imported late: it takes a third of a second
    from scipy.optimize import minimize

    N, size = len(x), len(weights)
    decayed = np.ones((size, 1), np.float32)
    decayed[-1] = 0  # the bias
    hessian = _hessian(x, weights)
    floor = max(l2, ROUNDING * float(np.trace(hessian)) / (size - 1))
    factor = np.linalg.cholesky(hessian + floor * np.eye(size))
    inverse = solve_triangular(factor, np.eye(size), lower=True).astype(np.float32)

    def weights_at(flat: np.ndarray) -> np.ndarray:
        return inverse.T @ flat.astype(np.float32).reshape(weights.shape)

    def objective(flat: np.ndarray) -> tuple[float, np.ndarray]:
        at = weights_at(flat)
        loss, slope = _cross_entropy(x, labels, at)
        penalised = l2 * decayed * at
        gradient = inverse @ (slope / N + penalised)
        return loss / N + float((penalised * at).sum()) / 2, gradient.ravel()

    options = {"maxiter": MOST_STEPS, "gtol": tolerance, "ftol": 0}
    begin = (factor.T @ weights).ravel()
    found = minimize(objective, begin, method="L-BFGS-B", jac=True, options=options)
    return weights_at(found.x), found.nit < MOST_STEPS


def _hessian(x: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Hessian [D + 1, D + 1] of the cross-entropy at weights [D + 1, C], averaged over classes."""
    from scipy.special import softmax

    size, classes = weights.shape
    total = np.zeros((size, size))
    for rows in chunks(len(x), max(1, min(CHUNK, LOGITS // classes))):
        with_one = np.pad(x[rows], ((0, 0), (0, 1)), constant_values=1)
        p = softmax(with_one @ weights, axis=1)
        total += with_one.T @ (with_one * (p * (1 - p)).mean(1, keepdims=True))
    return total / len(x)


def _cross_entropy(
    x: np.ndarray, labels: np.ndarray, weights: np.ndarray
) -> tuple[float, np.ndarray]:
    """Summed cross-entropy of x [N, D], and its gradient [D + 1, C]."""
    loss, gradient = 0.0, np.zeros_like(weights)
    for rows in chunks(len(x), max(1, LOGITS // weights.shape[1])):
        part = x[rows]
        logits = part @ weights[:-1] + weights[-1]  # [n, C]
        logits -= logits.max(1, keepdims=True)
        p = np.exp(logits)
        total = p.sum(1)
        true = np.arange(len(part)), labels[rows]
        loss += (np.log(total) - logits[true]).sum()
        p /= total[:, None]
        p[true] -= 1
        gradient[:-1] += part.T @ p
        gradient[-1] += p.sum(0)
    return loss, gradient
