"""Attention, GELU and LayerNorm: MLX's own, or forms for a CPU, where those are slow loops.

**Softmax.** exp(x) for x ≤ 0 is had from additions, multiplications and one division, which g++
vectorises in the code that `mx.compile` fuses. With u = −x/2⁵ and w the Taylor polynomial of
e^u − 1: e^−u − 1 = −w/(1 + w), doubled five times by y ← y·(2 + y). Being a difference from 1, y
keeps its digits: the result is within 2e-7 of exp(x), for any x above −4e9.

**GELU.** Both x·Φ(x) and its slope Φ(x) + x·φ(x) have the form factor·(1 + z·P(z²)/Q(z²))/2 with
z = x clamped to ±LIMIT, so one rational function serves both. The coefficients were fitted for this
project by weighted least squares; in float32 the largest errors are 1.9e-6 in value (at |x| = 30,
6e-8 of it) and 4.8e-7 in slope.

**LayerNorm.** Sums over rows are matrix products, and so is what all numbers of a row share: the
BLAS is faster at both than MLX's reductions and broadcasts, which `mx.compile` does not vectorise.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn

from hjepa_mlx import backend

DOUBLINGS = 5
TAYLOR = (1 / 2, 1 / 6, 1 / 24, 1 / 120)
LIMIT = 5.5
EPS = 1e-6  # of LayerNorm, as in timm and I-JEPA
VALUE = (
    (0.797883971, 0.0702846467, 0.00952323275, 0.000365716344, 1.30614928e-05, 4.44319573e-08),
    (1, 0.254752327, 0.0293986923, 0.00196243429, 7.86103093e-05, 1.19539988e-06),
)
SLOPE = (
    (1.59577064, -0.0618878275, 0.0284380779, 4.11864617e-05, 7.16063921e-05, 3.81744341e-07),
    (1, 0.294558744, 0.0409885189, 0.00352182008, 0.000192060352, 8.88711886e-06),
)


class Kernels(NamedTuple):
    """The functions of a ViT that have a form for each device.

    attention: softmax(q·kᵀ/√d)·v of q, k, v [B, H, N, d]; gelu: x·Φ(x), any shape; layer_norm: of
    x [B, N, D] over its last axis, times a weight [D], plus a bias [D].
    """

    attention: Callable[[mx.array, mx.array, mx.array], mx.array]
    gelu: Callable[[mx.array], mx.array]
    layer_norm: Callable[[mx.array, mx.array, mx.array], mx.array]


def kernels() -> Kernels:
    """MLX's own kernels on a GPU, the ones below on a CPU."""
    if backend.on_gpu():
        return Kernels(fused_attention, nn.gelu, fused_layer_norm)
    return Kernels(attention, rational_gelu, layer_norm)  # type: ignore[arg-type]


def fused_attention(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
    """MLX's fused attention."""
    return mx.fast.scaled_dot_product_attention(q, k, v, scale=q.shape[-1] ** -0.5)


def fused_layer_norm(x: mx.array, weight: mx.array, bias: mx.array) -> mx.array:
    """MLX's fused LayerNorm."""
    return mx.fast.layer_norm(x, weight, bias, EPS)


def attention(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
    """Attention by two matmuls and the softmax below."""
    q, k, v = map(mx.contiguous, (q, k, v))  # once: a matmul copies what is not, each time
    weights: mx.array = softmax(k @ (q * q.shape[-1] ** -0.5).swapaxes(-1, -2))  # type: ignore[assignment]
    return weights.swapaxes(-1, -2) @ v


@mx.custom_function
def softmax(x: mx.array) -> mx.array:
    """Softmax over the last axis but one, where sums are vectorised; computed in float32."""
    x32 = x.astype(mx.float32)
    e = _exp(x32 - x32.max(-2, keepdims=True))
    return (e / e.sum(-2, keepdims=True)).astype(x.dtype)


@softmax.vjp
def _softmax_vjp(_x: mx.array, cotangent: mx.array, output: mx.array) -> mx.array:
    product = cotangent * output
    return product - output * product.sum(-2, keepdims=True)


def _exp(x: mx.array) -> mx.array:
    """exp(x) for x ≤ 0."""
    u = x * -(2.0**-DOUBLINGS)
    w = u + u * (u * _horner(TAYLOR, u))
    y = -w / (1 + w)
    for _ in range(DOUBLINGS):
        y = y * (2 + y)
    return 1 + y


@mx.custom_function
def rational_gelu(x: mx.array) -> mx.array:
    """x·Φ(x) by a rational function; any shape, computed in float32."""
    return _rational(x, x, VALUE)


@rational_gelu.vjp
def _rational_gelu_vjp(x: mx.array, cotangent: mx.array, _output: mx.array) -> mx.array:
    return _rational(x, cotangent, SLOPE)


def _rational(
    x: mx.array, factor: mx.array, coefficients: tuple[tuple[float, ...], ...]
) -> mx.array:
    # Two things keep g++ vectorising the fused kernel (ten times faster): clamping by absolute
    # values, and the halving outside, which shifts where the fusion's depth limit cuts.
    x32, factor32 = x.astype(mx.float32), factor.astype(mx.float32)
    z = 0.5 * (mx.abs(x32 + LIMIT) - mx.abs(x32 - LIMIT))
    p, q = (_horner(polynomial, z * z) for polynomial in coefficients)
    return (0.5 * (factor32 + factor32 * (z * (p / q)))).astype(x.dtype)


@mx.custom_function
def layer_norm(x: mx.array, weight: mx.array, bias: mx.array) -> mx.array:
    """LayerNorm by matrix products; computed in float32."""
    centred, scale = _standardised(x)
    y = centred * (scale @ weight.astype(mx.float32)[None]) + bias
    return y.reshape(x.shape).astype(x.dtype)


@layer_norm.vjp
def _layer_norm_vjp(
    inputs: tuple[mx.array, mx.array, mx.array], cotangent: mx.array, _output: mx.array
) -> tuple[mx.array, mx.array, mx.array]:
    # with n = centred·scale and g = cotangent·weight, x has scale·(g − mean(g) − n·mean(g·n))
    x, weight, bias = inputs
    centred, scale = _standardised(x)
    own = weight.astype(mx.float32)
    g = cotangent.astype(mx.float32).reshape(centred.shape)
    product = g * centred
    mean = scale * (g @ own[:, None] / len(own))  # [rows, 1]
    slope = scale**3 * (product @ own[:, None] / len(own))
    along = mx.ones((1, len(own)))
    of_x = g * (scale @ own[None]) - centred * (slope @ along) - mean @ along
    of_weight, of_bias = scale.T @ product, mx.ones((1, len(g))) @ g
    return (
        of_x.reshape(x.shape).astype(x.dtype),
        of_weight[0].astype(weight.dtype),
        of_bias[0].astype(bias.dtype),
    )


def _standardised(x: mx.array) -> tuple[mx.array, mx.array]:
    """Rows of x [..., D] without their mean, [rows, D], and one over their deviation, [rows, 1]."""
    D = x.shape[-1]
    x, ones = x.reshape(-1, D).astype(mx.float32), mx.ones((D, 1))
    centred = mx.addmm(x, x @ ones / D, ones.T, alpha=-1.0)
    return centred, mx.rsqrt(centred.square() @ ones / D + EPS)


def _horner(coefficients: tuple[float, ...], t: mx.array) -> mx.array:
    value = coefficients[-1] * t + coefficients[-2]
    for coefficient in reversed(coefficients[:-2]):
        value = value * t + coefficient
    return value
