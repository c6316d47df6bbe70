"""Every protocol: controls that must fail, few labels, intervals, settings that mean nothing."""

import math
from collections import Counter
from typing import Any

import numpy as np
import pytest
from evaluating import clusters, made
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal
from scipy.stats import binomtest
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from hjepa_mlx.errors import UsageError
from hjepa_mlx.eval.arrays import interval, validation
from hjepa_mlx.eval.evaluation import Protocol, level_scores, token_scores
from hjepa_mlx.eval.features import Features
from hjepa_mlx.eval.labels import few_labels


def accuracies(train: Features, test: Features) -> dict[str, float]:
    """Per cent by protocol."""
    scores = level_scores(train, test, "level_0", Protocol(draws=3))
    return {
        "k-NN": scores["knn"],
        "logistic regression": scores["linear_probe"],
        "attentive probe": token_scores(train, test, "level_0")["attentive_probe"],
        "1 % of labels": scores["few_labels_1_percent"]["mean"],
        "10 % of labels": scores["few_labels_10_percent"]["mean"],
    }


def test_with_shuffled_training_labels_every_protocol_falls_to_chance() -> None:
    classes = 50
    (x, labels), (queries, truth) = (clusters(n, 1000, 0.3, classes, 32) for n in (1, 2))
    test = made(queries, truth, queries[:, None])
    true = accuracies(made(x, labels, x[:, None]), test)
    assert min(true.values()) > 90, true
    shuffled = np.random.default_rng(3).permutation(labels)
    noise = accuracies(made(x, shuffled, x[:, None]), test)
    # A whole cluster gets one class, right with probability 1/50: the number of clusters that are
    # right by luck is about Poisson(1), and at most 6 of 50 in all but 0.01 % of cases.
    assert max(noise.values()) <= 100 * 6 / classes, noise


def test_what_is_predicted_does_not_depend_on_which_other_test_images_there_are() -> None:
    (x, labels), (queries, truth) = clusters(1, 1000, 1.5), clusters(2, 600, 1.5)
    train = made(x, labels, x.reshape(-1, 4, 4))
    low = np.isin(truth, (0, 1))  # two tests that look as different as possible

    def correct(rows: np.ndarray) -> np.ndarray:
        test = made(queries[rows], truth[rows], queries[rows].reshape(-1, 4, 4))
        return np.array(list(accuracies(train, test).values())) / 100 * rows.sum()

    parts, whole = correct(low) + correct(~low), correct(np.ones(600, bool))
    assert_allclose(parts, whole, atol=1e-6)
    assert (whole < 590).all()  # at 100 % there would be nothing to see


@given(st.integers(10, 3000))
@settings(max_examples=20)
def test_settings_are_chosen_on_a_tenth_of_the_images_that_is_not_fitted(count: int) -> None:
    fitted, held_out = validation(count)
    assert sorted([*fitted, *held_out]) == list(range(count))
    assert len(held_out) == count // 10
    assert all(map(np.array_equal, validation(count), (fitted, held_out)))


class Watched:
    """An array that notes which of its rows are asked for."""

    def __init__(self, array: np.ndarray) -> None:
        self.array = array
        self.asked: list[np.ndarray] = []

    def __len__(self) -> int:
        return len(self.array)

    def __getitem__(self, rows: np.ndarray) -> np.ndarray:
        self.asked.append(np.asarray(rows))
        return self.array[rows]


def test_few_labels_are_the_same_share_of_every_class_summed_up_over_draws() -> None:
    sizes = {0: 600, 1: 240, 2: 30, 4: 3}  # no image of class 3
    labels = np.random.default_rng(0).permutation(np.repeat(list(sizes), list(sizes.values())))
    queries, truth = clusters(2, 500, 1.0)
    drawn = []
    for seed in (1, 5):  # whatever the features
        x = np.random.default_rng(seed).normal(size=(len(labels), 16)).astype(np.float32)
        watched: Any = Watched(x)
        found = few_labels(made(watched, labels), made(queries, truth), "level_0", 0.1, 3)
        drawn.append(watched.asked)
    for first, second in zip(*drawn, strict=True):
        assert Counter(labels[first].tolist()) == {0: 60, 1: 24, 2: 3, 4: 1}
        assert len(set(first.tolist())) == len(first)
        assert_array_equal(first, second)
    assert len({tuple(sorted(rows)) for rows in drawn[0]}) == 3
    reached = []
    for rows in drawn[1]:
        standard = StandardScaler().fit(x[rows])
        reference = LogisticRegression(C=1.0).fit(standard.transform(x[rows]), labels[rows])
        reached.append(100 * reference.score(standard.transform(queries), truth))
    assert found["mean"] == pytest.approx(np.mean(reached), abs=0.5)
    assert found["std"] == pytest.approx(np.std(reached, ddof=1), abs=0.5)


@given(st.integers(1, 5000), st.floats(0, 1))
@settings(max_examples=50)
def test_the_interval_is_wilsons(count: int, share: float) -> None:
    hits = round(share * count)
    expected = binomtest(hits, count).proportion_ci(0.95, method="wilson")
    found = interval(100 * hits / count, count)
    assert found == pytest.approx((100 * expected.low, 100 * expected.high), abs=1e-4)
    assert -1e-9 <= found[0] <= found[1] <= 100 + 1e-9


@pytest.mark.parametrize(
    "wrong",
    [
        *({"temperature": value} for value in (0.0, math.nan, math.inf)),
        *({"attentive_images": value} for value in (-1, 9)),
        *({"draws": -1}, {"k": 0}),
    ],
)
def test_a_protocol_that_means_nothing_cannot_be_made(wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        Protocol(**wrong)
