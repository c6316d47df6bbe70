"""The CPU's forms of GELU and LayerNorm against their definitions in float64."""

import math

import mlx.core as mx
import numpy as np
import pytest

from hjepa_mlx.models.cpu import EPS, fused_layer_norm, layer_norm, rational_gelu

X = np.linspace(-30, 30, 60_001).astype(np.float32).astype(float)  # exact in both
NORMAL_CDF = np.array([math.erfc(-x / math.sqrt(2)) / 2 for x in X])


def test_rational_gelu_has_value_and_slope_of_gelu():
    x = mx.array(X.astype(np.float32))
    (value,), (slope,) = mx.vjp(rational_gelu, [x], [mx.full(x.shape, 2.0)])
    density = np.exp(-(X**2) / 2) / math.sqrt(2 * math.pi)
    assert np.abs(np.array(value) - X * NORMAL_CDF).max() < 3e-6
    assert np.abs(np.array(slope) / 2 - (NORMAL_CDF + X * density)).max() < 3e-6


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("offset", [0, 10, 100])
def test_layer_norm_is_as_exact_as_mlx_s(offset, compiled):
    draw = np.random.default_rng(0)
    shapes = (3, 7, 96), (96,), (96,), (3, 7, 96)
    x, weight, bias, cotangent = (draw.normal(size=shape).astype(np.float32) for shape in shapes)
    x += np.float32(offset)
    exact = norm_in_float64(x, weight, bias, cotangent)

    def errors(function):
        def run(x, weight, bias, cotangent):
            return mx.vjp(function, [x, weight, bias], [cotangent])

        run = mx.compile(run) if compiled else run
        (value,), slopes = run(*map(mx.array, (x, weight, bias, cotangent)))
        for found, expected in zip((value, *slopes), exact, strict=True):
            assert found.shape == expected.shape
            yield np.abs(found - expected).max()

    for own, mlx_s in zip(errors(layer_norm), errors(fused_layer_norm), strict=True):
        assert own < 3 * mlx_s + 2e-6


def test_layer_norm_of_equal_numbers_is_the_bias():
    x, weight, bias = mx.ones((2, 3, 384)), mx.ones(384), mx.full(384, 0.5)
    assert (np.array(layer_norm(x, weight, bias)) == 0.5).all()
    assert layer_norm(x[:0], weight, bias).shape == (0, 3, 384)


def norm_in_float64(x, weight, bias, cotangent):
    x, weight, bias, cotangent = (a.astype(float) for a in (x, weight, bias, cotangent))
    deviation = np.sqrt(x.var(-1, keepdims=True) + EPS)
    normal = (x - x.mean(-1, keepdims=True)) / deviation
    g = cotangent * weight
    mean, along = g.mean(-1, keepdims=True), (g * normal).mean(-1, keepdims=True)
    of_x = (g - mean - normal * along) / deviation
    return (
        normal * weight + bias,
        of_x,
        (cotangent * normal).sum((0, 1)),
        cotangent.sum((0, 1)),
    )


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16])
def test_layer_norm_keeps_a_half_precision(dtype):
    x = mx.random.normal((2, 5, 32)).astype(dtype)
    weight, bias = mx.ones(32, dtype), mx.zeros(32, dtype)
    (value,), slopes = mx.vjp(layer_norm, [x, weight, bias], [x])
    assert {a.dtype for a in (value, *slopes)} == {dtype}
    expected = mx.fast.layer_norm(x.astype(mx.float32), None, None, EPS)
    np.testing.assert_allclose(value.astype(mx.float32), expected, atol=0.02)
