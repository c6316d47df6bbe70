"""Losses: the prediction error of each level, and two optional regularisers."""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx

from hjepa_mlx import world
from hjepa_mlx.errors import check_choice

LossFn = Callable[[mx.array, mx.array], mx.array]  # prediction and target [B, n, D] to a number
SIGREG_DIRECTIONS = 256
SIGREG_KNOTS, SIGREG_LIMIT = 17, 3.0


def _mean(x: mx.array) -> mx.array:
    # Last axis first: on the CPU a long reduction is a plain float32 sum and loses digits.
    while x.ndim:
        x = x.mean(-1)
    return x


def smooth_l1(prediction: mx.array, target: mx.array) -> mx.array:
    """Mean of 0.5·gap² where |gap| < 1 and |gap| − 0.5 elsewhere (β = 1), as in I-JEPA."""
    gap = mx.abs(prediction.astype(mx.float32) - target)
    return _mean(mx.where(gap < 1, 0.5 * gap * gap, gap - 0.5))


def mse(prediction: mx.array, target: mx.array) -> mx.array:
    """Mean squared error."""
    return _mean(mx.square(prediction.astype(mx.float32) - target))


PREDICTION = {"smooth_l1": smooth_l1, "mse": mse}


def prediction_loss(kind: str) -> LossFn:
    """The loss that `loss.kind` names; UsageError for an unknown name."""
    check_choice("loss.kind", kind, PREDICTION)
    return PREDICTION[kind]


def vicreg(x: mx.array) -> mx.array:
    """Variance and covariance terms, v and c, of VICReg (arXiv 2105.04906).

    x: [B, D], one vector per mask; those of all ranks count. Returns mean hinge on the standard
    deviation (target 1) plus the squared off-diagonal covariances over D, with the paper's weights
    25 and 1 divided by 25.
    """
    x = world.gather(x.astype(mx.float32))
    B, D = x.shape
    x = x - x.mean(0)
    std = mx.sqrt(x.square().sum(0) / (B - 1) + 1e-4)
    covariance = (x.T @ x) / (B - 1)
    off_diagonal = covariance.square().sum() - mx.diag(covariance).square().sum()
    return mx.maximum(1 - std, 0).mean() + off_diagonal / D / 25


def sigreg(x: mx.array) -> mx.array:
    """Sketched isotropic Gaussian regularisation of LeJEPA (arXiv 2511.08544, section 4).

    x: [..., B, D], batches of one vector per image; those of all ranks count. Mean over batches and
    random directions a of the Epps-Pulley statistic B·∫|φ(t) − exp(−t²/2)|² exp(−t²/2) dt over
    |t| ≤ 3, by the trapezoid rule, where φ is the empirical characteristic function of the
    projections a·x; about 1 for a sample of a standard normal. Draws from `mx.random`.
    """
    x = world.gather(x.astype(mx.float32), -2)
    *_, B, D = x.shape
    directions = mx.random.normal((D, SIGREG_DIRECTIONS))
    directions = directions / mx.linalg.norm(directions, axis=0, keepdims=True)
    t = mx.linspace(0, SIGREG_LIMIT, SIGREG_KNOTS)  # the integrand is even: twice the half axis
    angle = (x @ directions)[..., None] * t  # [..., B, directions, knots]
    normal = mx.exp(-t * t / 2)
    distance = mx.square(mx.cos(angle).mean(-3) - normal) + mx.square(mx.sin(angle).mean(-3))
    step = 2 * SIGREG_LIMIT / (SIGREG_KNOTS - 1)
    trapezoid = mx.array([step / 2] + [step] * (SIGREG_KNOTS - 2) + [step / 2])
    return B * (distance @ (trapezoid * normal)).mean()
