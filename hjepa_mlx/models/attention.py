"""Attention, with a form for the CPU, where MLX's exp runs one element at a time.

There, softmax is most of attention's time. exp(x) for x ≤ 0 is had from additions, multiplications
and one division, which g++ vectorises in what `mx.compile` fuses: with u = −x/2⁵ and e^u − 1 by its
Taylor polynomial w, e^−u − 1 = −w/(1 + w), doubled five times by y ← y·(2 + y). Being a difference
from 1, y keeps its digits: the result is within 2e-7 of exp(x), for any x above −4e9.
"""

from __future__ import annotations

import mlx.core as mx

from hjepa_mlx import backend

DOUBLINGS = 5
TAYLOR = (1 / 2, 1 / 6, 1 / 24, 1 / 120)


def attention(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
    """softmax(q·kᵀ/√d)·v of q, k, v [B, H, N, d]: MLX's fused kernel on Metal."""
    scale = q.shape[-1] ** -0.5
    if backend.on_metal():
        return mx.fast.scaled_dot_product_attention(q, k, v, scale=scale)
    weights: mx.array = softmax((q * scale) @ k.swapaxes(-1, -2))  # type: ignore[assignment]
    return weights @ v


@mx.custom_function
def softmax(x: mx.array) -> mx.array:
    """Softmax over the last axis, computed in float32."""
    x32 = x.astype(mx.float32)
    e = _exp(x32 - x32.max(-1, keepdims=True))
    return (e / e.sum(-1, keepdims=True)).astype(x.dtype)


@softmax.vjp
def _softmax_vjp(_x: mx.array, cotangent: mx.array, output: mx.array) -> mx.array:
    product = cotangent * output
    return product - output * product.sum(-1, keepdims=True)


def _exp(x: mx.array) -> mx.array:
    """exp(x) for x ≤ 0."""
    u = x * -(2.0**-DOUBLINGS)
    w = TAYLOR[-1] * u + TAYLOR[-2]
    for coefficient in reversed(TAYLOR[:-2]):
        w = w * u + coefficient
    w = u + u * (u * w)
    y = -w / (1 + w)
    for _ in range(DOUBLINGS):
        y = y * (2 + y)
    return 1 + y
