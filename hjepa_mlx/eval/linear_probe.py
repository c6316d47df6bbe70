"""The linear probe: logistic regression on frozen, standardised features.

Two ways to the same kind of classifier. `logistic_regression` is converged (L-BFGS over all images
at once), so its result does not depend on an optimiser's settings. `sgd` trains a grid of learning
rates side by side on mini-batches, as DINOv2 does (arXiv 2304.07193, section 7.1), for sets too
large for that and to compare with papers. Either way settings are chosen on held-out training
images, the chosen one is fitted again to all of them, and the test images are seen by nothing but
the finished classifier.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import mlx.core as mx
import numpy as np

from hjepa_mlx import backend
from hjepa_mlx.eval.accuracy import accuracy, check, validation
from hjepa_mlx.eval.blocks import blocks
from hjepa_mlx.rng import generator

SOLVER = "logistic_regression"
L2 = tuple(10.0**-n for n in range(1, 9))  # on ½·|W|², beside the mean cross-entropy
CHOOSING, FINAL = 3e-3, 3e-4  # largest preconditioned gradient at which L-BFGS stops
MOST_STEPS = 500  # of L-BFGS
PATIENCE = 3  # weaker penalties in a row that do no better end the search: they take longest
LEARNING_RATES = tuple(float(lr) for lr in np.geomspace(1e-3, 3.0, 8))
WEIGHT_DECAYS = (0.0, 1e-4)
SGD_BATCH, SGD_EPOCHS, SGD_LEAST_STEPS, SGD_MOMENTUM = 1024, 10, 2000, 0.9
ROUNDING = 1e-5  # of the Hessian, computed in float32
WORTH_A_GPU = 1e8  # images × dimensions × classes
LOGITS = 1 << 25  # held at once by L-BFGS (128 MB)
BLOCK = 1 << 16  # images standardised or classified at once

Weights = tuple[np.ndarray, np.ndarray]  # [D, C], [C]
Setting = tuple[tuple[str, float], ...]
Solved = Iterator[tuple[Setting, Weights, bool]]  # the last: whether it converged


@dataclass(frozen=True)
class LinearProbe:
    """A finished classifier of features [N, D], and the setting that was chosen for it."""

    mean: np.ndarray  # [D]
    scale: np.ndarray  # [D]
    weight: np.ndarray  # [D, C]
    bias: np.ndarray  # [C]
    setting: dict[str, float]
    converged: bool = True  # what takes a given number of steps always does

    def predict(self, features: np.ndarray) -> np.ndarray:
        """Classes [N] of features [N, D]."""
        winners = np.empty(len(features), np.int64)
        for rows in blocks(len(features), BLOCK):
            x = (features[rows] - self.mean) / self.scale
            winners[rows] = (x @ self.weight + self.bias).argmax(1)
        return winners


def fit(features: np.ndarray, labels: np.ndarray, solver: str = SOLVER) -> LinearProbe:
    """Fit the linear probe to training features [N, D] and labels [N].

    solver: "logistic_regression" or "sgd". Deterministic. Raises UsageError for a single class, too
    few images, or features that are not finite.
    """
    check(features, labels, "The linear probe")
    classes = int(labels.max()) + 1
    solve, grid = SOLVERS[solver], GRIDS[solver]
    fitted, held_out = validation(len(labels))
    chosen_from = features[fitted]
    mean, scale = moments(chosen_from)
    x = standardised(chosen_from, mean, scale)
    del chosen_from  # of ImageNet's pixels, 14 GB
    best, best_weights, best_score, best_number = grid[0], None, -1.0, 0
    with backend.computing_threads():  # thin matrices: a BLAS with several threads is slower
        for number, (setting, weights, _) in enumerate(solve(x, labels[fitted], classes, grid)):
            predicted = LinearProbe(mean, scale, *weights, {}).predict(features[held_out])
            score = accuracy(predicted, labels[held_out])
            if score > best_score:
                best, best_weights, best_score, best_number = setting, weights, score, number
            elif solver == SOLVER and number - best_number == PATIENCE:  # sgd's grid has no order
                break
        del x
        return _fit_one(features, labels, classes, solver, best, best_weights)


def fit_few(features: np.ndarray, labels: np.ndarray, classes: int) -> LinearProbe:
    """The linear probe for too few images to choose on: l2 = 1/N, scikit-learn's C = 1."""
    return _fit_one(features, labels, classes, SOLVER, (("l2", 1 / len(labels)),), None)


def _fit_one(
    features: np.ndarray,
    labels: np.ndarray,
    classes: int,
    solver: str,
    setting: Setting,
    start: Weights | None,
) -> LinearProbe:
    mean, scale = moments(features)
    x = standardised(features, mean, scale)
    again = {"start": start, "tolerance": FINAL} if solver == SOLVER else {}
    [(_, weights, converged)] = SOLVERS[solver](x, labels, classes, [setting], **again)
    return LinearProbe(mean, scale, *weights, dict(setting), converged)


def moments(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation [D] of features [N, D]; 1 where a dimension is constant."""
    total, squares = np.zeros(features.shape[1]), np.zeros(features.shape[1])
    for rows in blocks(len(features), BLOCK):
        total += features[rows].sum(0, dtype=np.float64)
    mean = total / len(features)
    for rows in blocks(len(features), BLOCK):
        squares += np.square(features[rows] - mean).sum(0)
    scale = np.sqrt(squares / len(features))
    scale[scale < 1e-6 * (1e-6 + np.abs(mean))] = 1.0
    return mean.astype(np.float32), scale.astype(np.float32)


def standardised(features: np.ndarray, mean: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """(features − mean) / scale, [N, D] float32."""
    x = np.subtract(features, mean, dtype=np.float32)
    return np.divide(x, scale, out=x)


def logistic_regression(
    x: np.ndarray,
    labels: np.ndarray,
    classes: int,
    grid: list[Setting],
    start: Weights | None = None,
    tolerance: float = CHOOSING,
) -> Solved:
    """Minimise mean cross-entropy + ½·l2·|W|² (bias free) for each l2, each from the one before.

    x: [N, D]. scikit-learn's C is 1 / (N·l2). L-BFGS, preconditioned by the Cholesky factor of the
    Hessian where it starts, averaged over classes: on the strongly correlated features of a JEPA
    that takes a small part of the iterations, and ends at the same minimum.
    """
    from scipy.linalg import solve_triangular  # imported late: it takes a third of a second
    from scipy.optimize import minimize

    N, D = x.shape
    decayed = np.ones((D + 1, 1), np.float32)
    decayed[-1] = 0  # the bias
    weights = np.zeros((D + 1, classes), np.float32)
    if start is not None:
        weights[:-1], weights[-1] = start
    slopes: Callable[..., Any] = partial(_cross_entropy, np, x, labels)
    if backend.on_metal() and N * D * classes > WORTH_A_GPU:
        slopes = _on_gpu(x, labels)
    for setting in grid:
        l2 = dict(setting)["l2"]
        hessian = _hessian(x, weights)
        floor = max(l2, ROUNDING * float(np.trace(hessian)) / D)
        factor = np.linalg.cholesky(hessian + floor * np.eye(D + 1))
        inverse = solve_triangular(factor, np.eye(D + 1), lower=True).astype(np.float32)

        def objective(
            flat: np.ndarray, l2: float = l2, inverse: np.ndarray = inverse
        ) -> tuple[float, np.ndarray]:
            weights = inverse.T @ flat.astype(np.float32).reshape(D + 1, classes)
            loss, *slope = slopes(weights[:-1], weights[-1])
            penalised = l2 * decayed * weights
            gradient = inverse @ (np.vstack(slope) / N + penalised)
            return loss / N + float((penalised * weights).sum()) / 2, gradient.ravel()

        options = {"maxiter": MOST_STEPS, "gtol": tolerance, "ftol": 0}
        begun = (factor.T @ weights).ravel()
        found = minimize(objective, begun, method="L-BFGS-B", jac=True, options=options)
        weights = inverse.T @ found.x.astype(np.float32).reshape(D + 1, classes)
        yield setting, (weights[:-1], weights[-1]), found.nit < MOST_STEPS


def _hessian(x: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Hessian [D + 1, D + 1] of the cross-entropy at weights [D + 1, C], averaged over classes."""
    from scipy.special import softmax

    D, classes = x.shape[1], weights.shape[1]
    total = np.zeros((D + 1, D + 1))
    for rows in blocks(len(x), max(1, min(BLOCK, LOGITS // classes))):
        with_one = np.pad(x[rows], ((0, 0), (0, 1)), constant_values=1)
        p = softmax(with_one @ weights, axis=1)
        total += with_one.T @ (with_one * (p * (1 - p)).mean(1, keepdims=True))
    return total / len(x)


def _cross_entropy(xp: Any, x: Any, y: Any, weight: Any, bias: Any) -> tuple[Any, Any, Any]:
    """Summed cross-entropy of x [N, D] with classes y [N], and its slopes [D, C] and [C].

    xp: numpy or mlx.core, whose arrays these are.
    """
    logits = x @ weight + bias  # [N, C]
    logits = logits - logits.max(1, keepdims=True)
    e = xp.exp(logits)
    total = e.sum(1, keepdims=True)
    chosen = xp.take_along_axis(logits, y[:, None], 1)
    excess = e / total - (y[:, None] == xp.arange(logits.shape[1]))
    return (xp.log(total) - chosen).sum(), x.T @ excess, excess.sum(0)


def _on_gpu(x: np.ndarray, labels: np.ndarray) -> Callable[..., list[Any]]:
    """`_cross_entropy` by MLX, in blocks whose logits fit in memory.

    So do the images: one buffer may be smaller than all features of a large data set.
    """
    slopes = mx.compile(partial(_cross_entropy, mx))
    rows = blocks(len(x), max(1, LOGITS // (int(labels.max()) + 1)))
    parts_of_all = [(mx.array(x[part]), mx.array(labels[part])) for part in rows]

    def summed(weight: np.ndarray, bias: np.ndarray) -> list[Any]:
        parts = []
        for images, y in parts_of_all:
            parts.append(slopes(images, y, mx.array(weight), mx.array(bias)))
            mx.eval(parts[-1])
        return [sum(np.array(p) for p in part) for part in zip(*parts, strict=True)]

    return summed


def sgd(x: np.ndarray, labels: np.ndarray, classes: int, grid: list[Setting]) -> Solved:
    """A classifier for each setting, all trained at once on the same mini-batches.

    x: [N, D]. SGD with momentum, cosine to zero; gradients of different settings do not mix.
    """
    N, D = x.shape
    G = len(grid)
    lr, decay = (mx.array([dict(s)[k] for s in grid])[:, None] for k in ("lr", "weight_decay"))
    weight = velocity = mx.zeros((D + 1, G, classes))
    per_epoch = max(1, N // SGD_BATCH)
    total = max(SGD_LEAST_STEPS, SGD_EPOCHS * per_epoch)

    @mx.compile
    def step(
        batch: mx.array, y: mx.array, weight: mx.array, velocity: mx.array, cosine: mx.array
    ) -> tuple[mx.array, mx.array]:
        batch = mx.concatenate([batch, mx.ones((len(batch), 1))], 1)  # [B, D + 1]
        logits = (batch @ weight.reshape(D + 1, -1)).reshape(-1, G, classes)
        one_hot = y[:, None, None] == mx.arange(classes)
        excess = (mx.softmax(logits, -1) - one_hot) / len(batch)
        gradient = (batch.T @ excess.reshape(len(batch), -1)).reshape(weight.shape)
        velocity = SGD_MOMENTUM * velocity + gradient + decay * weight
        return weight - cosine * lr * velocity, velocity

    for number in range(total):
        epoch, place = divmod(number, per_epoch)
        if place == 0:
            order = generator(0, "probe", epoch).permutation(N)
        rows = order[place * SGD_BATCH : (place + 1) * SGD_BATCH]
        cosine = mx.array((1 + np.cos(np.pi * number / total)) / 2, mx.float32)
        batch = mx.array(x[rows]), mx.array(labels[rows])
        weight, velocity = step(*batch, weight, velocity, cosine)
        mx.eval(weight, velocity)
    weights = np.array(weight)  # [D + 1, G, C]
    for g, setting in enumerate(grid):
        yield setting, (weights[:-1, g], weights[-1, g]), True


SOLVERS: dict[str, Callable[..., Solved]] = {
    "logistic_regression": logistic_regression,
    "sgd": sgd,
}
GRIDS: dict[str, list[Setting]] = {
    "logistic_regression": [(("l2", l2),) for l2 in L2],
    "sgd": [
        (("lr", lr), ("weight_decay", decay)) for lr in LEARNING_RATES for decay in WEIGHT_DECAYS
    ],
}
