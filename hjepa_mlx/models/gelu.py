"""GELU, with a form for the CPU, where MLX's erf and exp run one element at a time.

Both x·Φ(x) and its slope Φ(x) + x·φ(x) have the form factor·(1 + z·P(z²)/Q(z²))/2 with z = x
clamped to ±LIMIT, so one rational function serves both. The coefficients were fitted for this
project by weighted least squares; in float32 the largest errors are 1.9e-6 in value (at |x| = 30,
6e-8 of it) and 4.8e-7 in slope.
"""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn

from hjepa_mlx import backend

LIMIT = 5.5
VALUE = (
    (0.797883971, 0.0702846467, 0.00952323275, 0.000365716344, 1.30614928e-05, 4.44319573e-08),
    (1, 0.254752327, 0.0293986923, 0.00196243429, 7.86103093e-05, 1.19539988e-06),
)
SLOPE = (
    (1.59577064, -0.0618878275, 0.0284380779, 4.11864617e-05, 7.16063921e-05, 3.81744341e-07),
    (1, 0.294558744, 0.0409885189, 0.00352182008, 0.000192060352, 8.88711886e-06),
)


def gelu() -> Callable[[mx.array], mx.array]:
    """The activation for this machine: MLX's own on Metal, the rational one on a CPU."""
    return nn.gelu if backend.on_metal() else rational_gelu  # type: ignore[return-value]


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
    # Two things keep g++ vectorising what mx.compile makes of this (ten times faster): clamping by
    # absolute values, and the halving outside, which shifts where the fusion's depth limit cuts.
    x32, factor32 = x.astype(mx.float32), factor.astype(mx.float32)
    z = 0.5 * (mx.abs(x32 + LIMIT) - mx.abs(x32 - LIMIT))
    p, q = (_horner(polynomial, z * z) for polynomial in coefficients)
    return (0.5 * (factor32 + factor32 * (z * (p / q)))).astype(x.dtype)


def _horner(coefficients: tuple[float, ...], t: mx.array) -> mx.array:
    value = coefficients[-1] * t + coefficients[-2]
    for coefficient in reversed(coefficients[:-2]):
        value = value * t + coefficient
    return value
