"""The linear probe against scikit-learn, and the refusals of all classifiers."""

from collections.abc import Callable, Iterator
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from evaluating import clusters
from numpy.testing import assert_allclose, assert_array_equal
from scipy.special import softmax
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss
from sklearn.preprocessing import StandardScaler

import hjepa_mlx as hj
from hjepa_mlx import backend
from hjepa_mlx.config import Config
from hjepa_mlx.data.pipeline import Skipped
from hjepa_mlx.errors import UsageError
from hjepa_mlx.eval import attentive_probe, knn, linear_probe
from hjepa_mlx.eval.features import extract, model_features
from hjepa_mlx.eval.knn import knn_predict


def objective(weights: np.ndarray, x: np.ndarray, labels: np.ndarray, l2: float) -> float:
    """Mean cross-entropy + ½·l2·|W|² of weights [D + 1, C], the biases last, by scikit-learn."""
    *weight, bias = weights.astype(np.float64)
    probabilities = softmax(x @ np.array(weight) + bias, axis=1)
    return float(log_loss(labels, probabilities) + l2 / 2 * np.square(weight).sum())


def test_logistic_regression_ends_where_scikit_learn_does_on_real_features(
    tiny_config: Callable[..., Config],
) -> None:
    model = hj.HJEPA(tiny_config(data={"name": "demo", "limit": 1500}))
    mx.eval(model.parameters())
    sources = (hj.open_source(model.config.data, split) for split in ("train", "test"))
    train, test = (
        extract(lambda: [model_features(model)], source, model.config, Skipped())[0]
        for source in sources
    )
    x, queries = train.pooled["level_2"], test.pooled["level_2"]
    assert np.linalg.cond(np.cov(x.T)) > 1e6  # strongly correlated, as a JEPA's are
    standard = StandardScaler().fit(x.astype(np.float64))
    x64, q64 = standard.transform(x), standard.transform(queries)
    with backend.computing_threads():
        for probe in linear_probe.solutions(x, train.labels, 10, [1e-2, 1e-4]):
            assert probe.converged
            reference = LogisticRegression(C=1 / (len(x) * probe.l2), tol=1e-5, max_iter=5000)
            reference.fit(x64, train.labels)
            theirs = np.vstack([reference.coef_.T, reference.intercept_])
            reached, lowest = (
                objective(weights, x64, train.labels, probe.l2)
                for weights in (probe.weights, theirs)
            )
            assert reached == pytest.approx(lowest, rel=1e-3)
            correct = 100 * (probe.predict(queries) == test.labels).mean()
            assert correct == pytest.approx(100 * reference.score(q64, test.labels), abs=0.5)


def test_the_chosen_probe_is_as_good_as_scikit_learns() -> None:
    (x, labels), (queries, truth) = clusters(1, 3000, 1.2), clusters(2, 1000, 1.2)
    probe = linear_probe.fit(x, labels)
    reference = 100 * LogisticRegression().fit(x, labels).score(queries, truth)
    assert 80 < reference < 97
    assert 100 * (probe.predict(queries) == truth).mean() == pytest.approx(reference, abs=2)
    assert probe.l2 in linear_probe.L2


def test_regularisation_is_chosen_on_images_that_were_not_fitted() -> None:
    (x, labels), (queries, truth) = (clusters(seed, 600, 5, dim=200) for seed in (1, 2))
    standard = StandardScaler().fit(x)
    reached = [
        100
        * LogisticRegression(C=1 / (len(x) * l2), max_iter=1000)
        .fit(standard.transform(x), labels)
        .score(standard.transform(queries), truth)
        for l2 in (linear_probe.L2[0], linear_probe.L2[-1])
    ]
    assert reached[0] > reached[1] + 5  # fitting the training images closely does harm here
    predicted = linear_probe.fit(x, labels).predict(queries)
    assert 100 * (predicted == truth).mean() > reached[0] - 3


def test_the_search_ends_after_three_weaker_penalties_that_choose_no_better(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    solutions, tried = linear_probe.solutions, []

    def counted(*arguments: Any, **options: Any) -> Iterator[linear_probe.LinearProbe]:
        for probe in solutions(*arguments, **options):
            tried.append(probe.l2)
            yield probe

    monkeypatch.setattr(linear_probe, "solutions", counted)
    x, labels = clusters(1, 600, 0.1)  # far apart: the strongest penalty is never beaten
    assert linear_probe.fit(x, labels).l2 == linear_probe.L2[0]
    assert tried == [*linear_probe.L2[:4], linear_probe.L2[0]]


def test_a_probe_of_many_images_is_fitted_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    x, labels = clusters(1, 1000, 1.2)
    at_once = linear_probe.fit(x, labels)
    monkeypatch.setattr(linear_probe, "LOGITS", 5 * 300)
    in_chunks = linear_probe.fit(x, labels)
    assert in_chunks.l2 == at_once.l2
    assert_allclose(in_chunks.weights[:-1], at_once.weights[:-1], atol=0.02)


def test_moments_are_numpys_and_rounding_is_no_spread(monkeypatch: pytest.MonkeyPatch) -> None:
    x = (np.random.default_rng(0).normal(size=(1000, 3)) * (1, 1e-3, 1e3) + 5).astype(np.float32)
    rounded = np.full((1000, 2), (0.1, 1e4), np.float32)
    rounded[::2] = np.nextafter(rounded[::2], np.float32(np.inf))
    monkeypatch.setattr(linear_probe, "CHUNK", 300)
    mean, scale = linear_probe.moments(np.hstack([x, rounded]))
    assert_allclose(mean[:3], x.mean(0, dtype=np.float64), rtol=1e-6)
    assert_allclose(scale[:3], x.std(0, dtype=np.float64), rtol=1e-5)
    assert_array_equal(scale[3:], 1)


def test_neither_scale_nor_origin_nor_constant_dimensions_change_a_probe() -> None:
    (x, labels), (queries, _) = clusters(1, 1500, 1.2), clusters(2, 1000, 1.2)
    rng = np.random.default_rng(3)
    scale = (2.0 ** rng.integers(-8, 9, 16)).astype(np.float32)
    shift = scale * rng.integers(-20, 21, 16).astype(np.float32)
    constant = np.repeat(np.array([[0, 0.1, -7.3, 1e4]], np.float32), len(x), 0)
    moved = np.hstack([x * scale + shift, constant])
    surprising = np.hstack([queries * scale + shift, rng.normal(size=(1000, 4)) * 100])
    probe, other = linear_probe.fit(x, labels), linear_probe.fit(moved, labels)
    assert other.l2 == probe.l2
    assert_allclose(other.weights[:16], probe.weights[:16], atol=0.02)
    assert not other.weights[16:20].any()
    agreeing = other.predict(surprising.astype(np.float32)) == probe.predict(queries)
    assert agreeing.mean() > 0.99


def test_whole_grey_levels_are_classified_like_the_same_numbers_in_float32() -> None:
    (x, labels), (queries, _) = clusters(1, 600, 1.2), clusters(2, 300, 1.2)
    x, queries = (np.clip(part * 20 + 128, 0, 255).astype(np.uint8) for part in (x, queries))
    for predict in (
        lambda a, b: linear_probe.fit(a, labels).predict(b),
        lambda a, b: knn_predict(a, labels, b),
    ):
        in_float = predict(x.astype(np.float32), queries.astype(np.float32))
        assert_array_equal(predict(x, queries), in_float)


@pytest.mark.parametrize(
    "fit",
    [linear_probe.fit, lambda x, y: attentive_probe.fit(x[:, None], y)],
    ids=["linear", "attentive"],
)
def test_probes_refuse_images_that_teach_nothing(fit: Any) -> None:
    x, labels = clusters(1, 40, 1.0)
    with pytest.raises(UsageError, match="at least 10 training images; there are 9"):
        fit(x[:9], labels[:9])
    with pytest.raises(UsageError, match="all have one label"):
        fit(x, np.ones(40, int))
    with pytest.raises(UsageError, match="got 40 images, but 39 labels"):
        fit(x, labels[:39])
    x[7, 3] = np.inf
    with pytest.raises(UsageError, match="NaN or infinity"):
        fit(x, labels)


@pytest.mark.parametrize(
    "labels", [[0, 1] * 20, np.arange(40.0) % 2, np.arange(40) % 2 - 1, np.zeros((40, 1), int)]
)
def test_labels_that_are_no_class_numbers_are_refused(labels: Any) -> None:
    x, right = clusters(1, 40, 1.0)
    for classify in (
        lambda: linear_probe.fit(x, labels),
        lambda: knn.knn_predict(x, labels, x, 3),
        lambda: knn.knn_accuracy(x, right, x, labels, 3),
    ):
        with pytest.raises(UsageError, match="whole numbers from 0"):
            classify()
    with pytest.raises(UsageError, match="40 images, but 41 labels"):
        knn.knn_predict(x, np.append(right, 0), x, 3)
