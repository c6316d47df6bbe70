"""Losses, schedules, EMA and optimizer against numpy."""

import math

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_map, tree_unflatten

from hjepa_mlx import ema, losses, schedules
from hjepa_mlx.optimizer import AdamW, Muon, orthogonalised
from hjepa_mlx.step import schedule


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def test_smooth_l1_is_quadratic_below_one_and_linear_above(rng):
    prediction, target = rng.normal(0, 1.5, (2, 4, 7, 16)).astype(np.float32)
    error = np.abs(prediction - target)
    assert 0.2 < (error > 1).mean() < 0.8
    expected = np.where(error < 1, error**2 / 2, error - 0.5).mean()
    assert losses.smooth_l1(mx.array(prediction), mx.array(target)).item() == pytest.approx(
        expected
    )


def test_mse_is_the_mean_squared_error(rng):
    prediction, target = rng.normal(size=(2, 4, 7, 16)).astype(np.float32)
    expected = ((prediction - target) ** 2).mean()
    assert losses.mse(mx.array(prediction), mx.array(target)).item() == pytest.approx(expected)


@pytest.mark.parametrize("error", [losses.smooth_l1, losses.mse])
def test_a_mean_over_four_million_errors_keeps_five_digits(rng, error):
    # A plain float32 sum on the CPU is off by 2e-5 here.
    prediction = rng.normal(size=(64, 256, 256)).astype(np.float32)
    e = np.abs(prediction.astype(np.float64))
    expected = {"smooth_l1": np.where(e < 1, e**2 / 2, e - 0.5), "mse": e**2}[error.__name__].mean()
    measured = error(mx.array(prediction), mx.zeros(prediction.shape)).item()
    assert measured == pytest.approx(expected, rel=2e-6)


def test_vicreg_is_the_variance_hinge_plus_the_off_diagonal_covariance(rng):
    x = (rng.normal(size=(32, 12)) @ rng.normal(0, 0.3, (12, 12)) + 5).astype(np.float32)
    hinge = np.maximum(0, 1 - np.sqrt(x.var(0, ddof=1) + 1e-4)).mean()
    covariance = np.cov(x.T)
    off_diagonal = (covariance**2)[~np.eye(12, dtype=bool)].sum() / 12
    expected = (25 * hinge + off_diagonal) / 25
    assert losses.vicreg(mx.array(x)).item() == pytest.approx(expected, rel=1e-4)


def epps_pulley(x):
    """n·∫|φ(t) − exp(−t²/2)|² exp(−t²/2) dt over the whole line, in closed form."""
    pairs = np.exp(-((x[:, None] - x[None]) ** 2) / 2).mean()
    return (
        len(x)
        * math.sqrt(2 * math.pi)
        * (pairs - math.sqrt(2) * np.exp(-(x**2) / 4).mean() + 1 / math.sqrt(3))
    )


@pytest.mark.parametrize(
    ("mean", "std"),
    [(0, 1), (2, 1), (0, 0.3), (-1, 2), (0, 0)],
    ids=["normal", "shifted", "narrow", "wide", "collapsed"],
)
def test_sigreg_of_one_dimension_equals_the_closed_form(rng, mean, std):
    sample = rng.normal(mean, std, 256)
    # In one dimension every direction gives ±x, and the statistic is even. The closed form
    # includes |t| > 3, which holds a few per cent of it.
    measured = losses.sigreg(mx.array(sample[:, None].astype(np.float32))).item()
    assert measured == pytest.approx(epps_pulley(sample), rel=0.05)


def test_sigreg_averages_over_random_directions(rng):
    mx.random.seed(0)
    x = rng.normal(size=(128, 16)) * np.linspace(0.2, 2, 16)
    directions = rng.normal(size=(16, 1000))
    directions /= np.linalg.norm(directions, axis=0)
    expected = np.mean([epps_pulley(projection) for projection in (x @ directions).T])
    assert losses.sigreg(mx.array(x.astype(np.float32))).item() == pytest.approx(expected, rel=0.1)


def test_sigreg_is_small_for_a_standard_normal_and_large_for_a_collapsed_sample(rng):
    mx.random.seed(0)
    normal = losses.sigreg(mx.array(rng.normal(size=(512, 64)).astype(np.float32))).item()
    expectation = math.sqrt(2 * math.pi) * (1 - 1 / math.sqrt(3))  # ∫(1 − φ²)φ over the line
    assert normal == pytest.approx(expectation, rel=0.1)
    assert losses.sigreg(mx.zeros((512, 64))).item() > 100 * normal


@pytest.mark.parametrize("total", [2, 7, 1000])
@pytest.mark.parametrize("curve", [schedules.linear, schedules.cosine])
def test_curves_hit_both_ends_exactly_and_never_turn_back(curve, total):
    values = [curve(step, total, 0.04, 0.4) for step in range(total)]
    assert (values[0], values[-1]) == (0.04, 0.4)
    assert values == sorted(values)


@pytest.mark.parametrize(
    ("curve", "value"), [(schedules.linear, 0.25), (schedules.cosine, 0.146447)]
)
def test_a_quarter_of_the_way_a_curve_has_its_own_value(curve, value):
    assert curve(25, 101, 0.0, 1.0) == pytest.approx(value, abs=1e-6)


def test_warmup_rises_in_equal_steps_to_the_peak_then_falls_to_the_end():
    values = [schedules.warmup_cosine(step, 100, 10, 1e-3, 1e-6) for step in range(100)]
    np.testing.assert_allclose(values[:10], 1e-3 * np.arange(1, 11) / 10, rtol=1e-12)
    assert values[9] == values[10] == 1e-3
    assert values[10:] == sorted(values[10:], reverse=True)
    assert values[-1] == 1e-6


def test_the_config_s_end_points_are_the_first_and_last_step_s_values(tiny_config):
    config = tiny_config(optim={"epochs": 10, "warmup_epochs": 2})
    first, peak, last = (schedule(config, step, 50) for step in (0, 9, 49))
    assert first == (1e-3 / 10, 0.04, 0.996)
    assert peak.lr == 1e-3
    assert last == (1e-6, 0.4, 1.0)


def test_ema_equals_its_formula_for_every_weight(rng):
    old, new = ({"a": rng.normal(size=(5, 3)), "b": [rng.normal(size=3)]} for _ in range(2))
    updated = ema.update(*(tree_map(mx.array, tree) for tree in (old, new)), mx.array(0.9))
    expected = tree_map(lambda before, now: 0.9 * before + 0.1 * now, old, new)
    for (name, weight), (_, value) in zip(
        tree_flatten(updated), tree_flatten(expected), strict=True
    ):
        np.testing.assert_allclose(weight, value, atol=1e-6, err_msg=name)


class NumpyAdamW:
    """Decoupled weight decay (arXiv 1711.05101, algorithm 2) with bias correction, in float64."""

    def __init__(self, weight, betas, decays):
        self.weight, self.betas, self.decays = weight.astype(np.float64), betas, decays
        self.m = self.v = 0.0
        self.t = 0

    def step(self, gradient, lr, weight_decay):
        (b1, b2), g = self.betas, gradient.astype(np.float64)
        self.t += 1
        self.m = b1 * self.m + (1 - b1) * g
        self.v = b2 * self.v + (1 - b2) * g * g
        direction = self.m / (1 - b1**self.t) / (np.sqrt(self.v / (1 - b2**self.t)) + 1e-8)
        decay = weight_decay * self.weight if self.decays else 0.0
        self.weight = self.weight - lr * (direction + decay)


def test_adamw_equals_numpy_s_and_decays_neither_biases_nor_norms(rng):
    model = nn.Sequential(nn.Linear(5, 3), nn.LayerNorm(3))
    optimizer = AdamW([0.9, 0.95])
    optimizer.init(model.trainable_parameters())
    weights = dict(tree_flatten(model.parameters()))
    references = {
        name: NumpyAdamW(np.array(w), (0.9, 0.95), decays=name == "layers.0.weight")
        for name, w in weights.items()
    }
    for lr, weight_decay in [(0.1, 0.0), (0.2, 0.5), (0.1, 0.3), (0.05, 1.0), (0.01, 2.0)]:
        gradients = {k: rng.normal(size=w.shape).astype(np.float32) for k, w in weights.items()}
        optimizer.learning_rate = mx.array(lr)
        optimizer.state["weight_decay"] = mx.array(weight_decay)
        optimizer.update(model, tree_unflatten([(k, mx.array(g)) for k, g in gradients.items()]))
        for name, gradient in gradients.items():
            references[name].step(gradient, lr, weight_decay)
    for name, weight in tree_flatten(model.parameters()):
        np.testing.assert_allclose(weight, references[name].weight, atol=1e-5)


@pytest.mark.parametrize("shape", [(8, 8), (5, 20), (20, 5)])
def test_orthogonalised_matrices_keep_their_directions_and_lose_their_lengths(rng, shape):
    left, _, right = np.linalg.svd(rng.normal(size=(3, *shape)), full_matrices=False)
    lengths = np.outer([1e-3, 1, 1e3], np.linspace(1, 0.1, min(shape)))
    x = left * lengths[:, None] @ right
    found = np.array(orthogonalised(mx.array(x, mx.float32)))
    lengths = left.swapaxes(1, 2) @ found @ right.swapaxes(1, 2)
    size = min(shape)
    np.testing.assert_allclose(lengths[:, ~np.eye(size, dtype=bool)], 0, atol=2e-3)
    kept = lengths[:, np.eye(size, dtype=bool)]
    assert kept.min() > 0.6
    assert kept.max() < 1.25
    assert not np.array(orthogonalised(mx.zeros((2, *shape)))).any()


def numpy_muon(weight, momentum, gradient, lr, weight_decay):
    """One update of Muon in float64 (arXiv 2502.16982, equation 4); the weight and its momentum."""
    momentum = 0.95 * momentum + 0.05 * gradient
    x = 0.95 * momentum + 0.05 * gradient
    wide = x.shape[0] <= x.shape[1]
    x = x if wide else x.T
    x = x / np.linalg.norm(x)
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    x = x if wide else x.T
    update = 0.2 * max(x.shape) ** 0.5 * x
    return weight - lr * (update + weight_decay * weight), momentum


@pytest.mark.parametrize(("columns", "heads"), [(6, 1), (18, 3), (24, 1)])
def test_muon_equals_numpy_s_and_takes_queries_keys_and_values_apart(rng, columns, heads):
    stack = mx.array(rng.normal(size=(2, 6, columns)), mx.float32)
    optimizer = Muon([0.9, 0.95])
    optimizer.init({"stack": stack})
    references = [
        (part, np.zeros_like(part))
        for matrix in np.array(stack, np.float64)
        for part in np.split(matrix, heads, axis=1)
    ]
    for lr, weight_decay in [(0.1, 0.0), (0.2, 0.5), (0.01, 2.0)]:
        gradient = rng.normal(size=stack.shape).astype(np.float32)
        optimizer.learning_rate = mx.array(lr)
        optimizer.state["weight_decay"] = mx.array(weight_decay)
        stack = optimizer.apply_gradients({"stack": mx.array(gradient)}, {"stack": stack})["stack"]
        parts = [part for matrix in gradient for part in np.split(matrix, heads, axis=1)]
        references = [
            numpy_muon(*of, part.astype(np.float64), lr, weight_decay)
            for of, part in zip(references, parts, strict=True)
        ]
    found = [part for matrix in np.array(stack) for part in np.split(matrix, heads, axis=1)]
    np.testing.assert_allclose(found, [weight for weight, _ in references], atol=1e-4)
