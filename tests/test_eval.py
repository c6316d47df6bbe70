"""Evaluators against independent implementations and constructed features."""

import numpy as np
import pytest
from sklearn.neighbors import KNeighborsClassifier

from hjepa_mlx.errors import UsageError
from hjepa_mlx.eval.features import pixels
from hjepa_mlx.eval.knn import knn_accuracy
from hjepa_mlx.eval.rank import effective_rank, feature_std


def clusters(seed: int, n: int, spread: float) -> tuple[np.ndarray, np.ndarray]:
    centres = np.random.default_rng(0).normal(size=(5, 16))
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 5, n)
    return (centres[labels] + spread * rng.normal(size=(n, 16))).astype(np.float32), labels


def test_knn_agrees_with_scikit_learn() -> None:
    bank, bank_labels = clusters(1, 700, 1.5)
    queries, query_labels = clusters(2, 300, 1.5)
    weighted = KNeighborsClassifier(
        20, metric="cosine", algorithm="brute", weights=lambda d: np.exp((1 - d) / 0.07)
    )
    expected = 100 * weighted.fit(bank, bank_labels).score(queries, query_labels)
    assert knn_accuracy(bank, bank_labels, queries, query_labels) == pytest.approx(expected)
    assert 50 < expected < 95  # the comparison would mean nothing at 0 or 100


def test_knn_in_blocks_is_knn_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    bank, bank_labels = clusters(1, 700, 1.5)
    queries, query_labels = clusters(2, 300, 1.5)
    whole = knn_accuracy(bank, bank_labels, queries, query_labels)
    monkeypatch.setattr("hjepa_mlx.eval.knn.BANK_BLOCK", 300)
    assert knn_accuracy(bank, bank_labels, queries, query_labels) == whole


def test_knn_on_shuffled_labels_is_chance() -> None:
    bank, bank_labels = clusters(1, 5000, 0.5)
    queries, query_labels = clusters(2, 2000, 0.5)
    shuffled = np.random.default_rng(3).permutation(bank_labels)
    assert knn_accuracy(bank, shuffled, queries, query_labels) == pytest.approx(20, abs=4)


def test_knn_refuses_too_few_images_and_broken_features() -> None:
    x, labels = clusters(1, 10, 1.0)
    with pytest.raises(UsageError, match="at least 20 training images, there are 10"):
        knn_accuracy(x, labels, x, labels)
    x[0, 0] = np.nan
    with pytest.raises(UsageError, match="NaN"):
        knn_accuracy(x, labels, x, labels, k=5)


def test_effective_rank_of_constructed_features() -> None:
    rng = np.random.default_rng(0)
    plane = rng.normal(size=(20000, 3)) @ np.linalg.qr(rng.normal(size=(32, 3)))[0].T
    assert effective_rank(plane + 5) == pytest.approx(3, rel=1e-3)
    assert effective_rank(rng.normal(size=(20000, 32))) == pytest.approx(32, rel=1e-2)
    assert effective_rank(np.full((100, 32), 0.1, np.float32)) == 1.0


def test_effective_rank_is_the_entropy_of_covariance_eigenvalues() -> None:
    x = np.random.default_rng(1).normal(size=(500, 12)) * np.linspace(0.1, 3, 12)
    share = np.linalg.eigvalsh(np.cov(x.T))
    share /= share.sum()
    assert effective_rank(x) == pytest.approx(np.exp(-(share * np.log(share)).sum()))


def test_feature_std_is_one_when_isotropic_and_zero_when_collapsed() -> None:
    isotropic = np.random.default_rng(0).normal(size=(20000, 64))
    assert feature_std(isotropic) == pytest.approx(1, abs=0.01)
    assert feature_std(np.ones((100, 64))) == pytest.approx(0, abs=1e-9)


def test_pixel_baseline_averages_whole_squares() -> None:
    images = np.random.default_rng(0).integers(0, 256, (3, 70, 70, 3), dtype=np.uint8)
    got = np.array(pixels(images)["pixels"]).reshape(3, 35, 35, 3)
    assert got[1, 4, 2] == pytest.approx(np.rint(images[1, 8:10, 4:6].mean((0, 1))))
