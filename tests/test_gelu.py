"""The CPU's rational GELU against the error function."""

import math

import mlx.core as mx
import numpy as np

from hjepa_mlx.models.cpu import rational_gelu

X = np.linspace(-30, 30, 60_001).astype(np.float32).astype(float)  # exact in both
NORMAL_CDF = np.array([math.erfc(-x / math.sqrt(2)) / 2 for x in X])


def test_rational_gelu_has_value_and_slope_of_gelu():
    x = mx.array(X.astype(np.float32))
    (value,), (slope,) = mx.vjp(rational_gelu, [x], [mx.full(x.shape, 2.0)])
    density = np.exp(-(X**2) / 2) / math.sqrt(2 * math.pi)
    assert np.abs(np.array(value) - X * NORMAL_CDF).max() < 3e-6
    assert np.abs(np.array(slope) / 2 - (NORMAL_CDF + X * density)).max() < 3e-6
