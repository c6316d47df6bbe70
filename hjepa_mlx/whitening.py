"""Whitening while training: targets of the image level in which no direction counts more.

The means of pictures differ most in a few directions, and these would be nearly all of the loss.
"""

from __future__ import annotations

import mlx.core as mx

from hjepa_mlx import world

RATE = 0.02  # of a batch in the moments: about the last 50 count
RIDGE = 0.01  # of the mean variance, added to that of each direction
ITERATIONS = 20  # of Newton-Schulz: enough for the least variance that RIDGE leaves in 1,000 axes

Moments = dict[str, mx.array]  # mean [D] and covariance [D, D]


def start(dim: int) -> Moments:
    """The moments before the first batch."""
    return {"mean": mx.zeros(dim), "covariance": mx.eye(dim)}


def whitened(x: mx.array, moments: Moments) -> mx.array:
    """x [B, D] float32, less the running mean, times Σ^(−½) of the running covariance Σ.

    The moments take in the batch of all ranks first. The variance is 1 on average over directions.
    """
    batch, D = world.gather(x), x.shape[1]
    mean = moments["mean"] + RATE * (batch.mean(0) - moments["mean"])
    batch = batch - mean
    covariance = moments["covariance"]
    covariance = covariance + RATE * (batch.T @ batch / len(batch) - covariance)
    moments |= {"mean": mean, "covariance": covariance}
    with mx.stream(mx.cpu):  # in full float32: some GPUs round more, which this does not bear
        ridge = RIDGE * mx.diag(covariance).mean()
        root = inverse_root(covariance + ridge * mx.eye(D))
        variance = 1 - ridge * root.square().sum() / D  # the mean of diag(root · Σ · root)
    return (x - mean) @ root * mx.rsqrt(variance)


def inverse_root(matrix: mx.array) -> mx.array:
    """A^(−½) of a symmetric positive A [D, D], by coupled Newton-Schulz iterations.

    Higham, Functions of Matrices (2008), equation 6.35.
    """
    one, scale = mx.eye(len(matrix)), mx.diag(matrix).sum()
    y, z = matrix / scale, one
    for _ in range(ITERATIONS):
        t = 1.5 * one - 0.5 * (z @ y)
        y, z = y @ t, t @ z
    return z * mx.rsqrt(scale)


def whitening_flop(batch: int, dim: int) -> int:
    """FLOP of the matmuls of `whitened`, without the last `y`, which nothing reads."""
    return 2 * (3 * ITERATIONS - 1) * dim**3 + 4 * batch * dim**2
