"""Ranks and spread against numpy's singular values and plain loops."""

import math

import numpy as np
import pytest

from hjepa_mlx.eval import rank


def entropy_rank(values: np.ndarray) -> float:
    share = values[values > 0] / values.sum()
    return float(np.exp(-(share * np.log(share)).sum()))


def plain_std(x: np.ndarray) -> float:
    units = [row / math.sqrt(sum(row**2)) for row in x]
    return float(np.mean([np.std(column) for column in np.transpose(units)])) * x.shape[1] ** 0.5


def test_ranks_are_those_of_numpys_singular_values_in_any_chunks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    x = np.random.default_rng(1).normal(2, 1, (500, 12)) * np.linspace(0.1, 3, 12)
    singular = np.linalg.svd(x, compute_uv=False)
    centred = np.linalg.svd(x - x.mean(0), compute_uv=False)
    for chunk in (1 << 14, 70):
        monkeypatch.setattr(rank, "CHUNK", chunk)
        assert rank.effective_rank(x) == pytest.approx(entropy_rank(centred**2))
        assert rank.rankme(x) == pytest.approx(entropy_rank(singular), rel=1e-5)
        assert rank.feature_std(x.astype(np.float32)) == pytest.approx(plain_std(x), rel=1e-5)


def directions(count: int, k: int, dim: int) -> np.ndarray:
    """Centred features [count, dim] of k equal singular values, turned at random."""
    rng = np.random.default_rng(0)
    left = rng.normal(size=(count, k))
    left = np.linalg.qr(left - left.mean(0))[0]
    return left @ np.linalg.qr(rng.normal(size=(dim, k)))[0].T


@pytest.mark.parametrize("k", [1, 3, 32])
def test_features_of_k_equal_directions_have_rank_k(k: int) -> None:
    x = directions(400, k, 32)
    assert rank.effective_rank(x) == pytest.approx(k, rel=1e-6)
    assert rank.effective_rank(1000 * x + 5) == pytest.approx(k, rel=1e-6)
    assert rank.rankme(x) == pytest.approx(k, rel=1e-3)
    described = rank.describe(x)
    assert described["effective_rank_percent"] == pytest.approx(100 * k / 32)
    assert described["rankme_percent"] == pytest.approx(100 * k / 32, rel=1e-3)
    assert described["dimension"] == 32


@pytest.mark.parametrize("point", [0.0, 0.1, -30.0])
def test_features_that_collapsed_to_a_point_have_rank_one_and_no_spread(point: float) -> None:
    x = np.full((100, 32), point, np.float32)
    rounded = np.random.default_rng(0).integers(0, 2, x.shape) > 0
    x[rounded] = np.nextafter(x[rounded], np.float32(0))  # what float32 leaves of a point
    described = rank.describe(x)
    assert described["effective_rank"] == 1
    assert described["rankme"] == pytest.approx(1, abs=1e-3)
    assert described["feature_std"] == pytest.approx(0, abs=1e-6)
    alone = rank.describe(x[:1])
    assert (alone["effective_rank"], alone["feature_std"]) == (1, 0)


def test_isotropic_features_have_full_rank_and_the_spread_of_a_sphere() -> None:
    D = 16
    described = rank.describe(np.random.default_rng(0).normal(size=(20000, D)))
    assert described["effective_rank"] == pytest.approx(D, rel=0.01)
    assert described["rankme"] == pytest.approx(D, rel=0.01)
    assert described["feature_std"] == pytest.approx(1, abs=0.01)
