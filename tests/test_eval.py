"""Evaluators, arrays in and values out: against independent references and known values."""

import math
import shutil
from collections import Counter
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal
from scipy.special import gamma, iv, softmax
from scipy.stats import binomtest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler

import hjepa_mlx as hj
from hjepa_mlx import backend
from hjepa_mlx.data.pipeline import Skipped
from hjepa_mlx.errors import HJEPAError, UsageError
from hjepa_mlx.eval import attentive_probe, knn, linear_probe, rank
from hjepa_mlx.eval.accuracy import interval, validation
from hjepa_mlx.eval.features import (
    Features,
    concatenated,
    drop_equal_channels,
    extract,
    model_features,
    pixels,
    room,
)
from hjepa_mlx.eval.knn import knn_accuracy, knn_predict, nearest
from hjepa_mlx.eval.protocols import Protocol, few_labels, level_scores, token_scores
from hjepa_mlx.recipes import parse, resolve

Arrays = tuple[np.ndarray, np.ndarray]  # features [N, D] and labels [N]


def clusters(seed: int, count: int, spread: float, classes: int = 5, dim: int = 16) -> Arrays:
    """Images around one centre a class; every class has its share."""
    centres = np.random.default_rng(0).normal(size=(classes, dim))
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.arange(count) % classes)
    x = centres[labels] + spread * rng.normal(size=(count, dim))
    return x.astype(np.float32), labels


def made(x: np.ndarray, labels: np.ndarray, tokens: np.ndarray | None = None) -> Features:
    """Features of one level, as `extract` would give them."""
    by_level = {} if tokens is None else {"level_0": tokens}
    return Features({"level_0": x}, np.arange(len(x)), labels, by_level, 1)


@pytest.fixture(scope="module", autouse=True)
def _threads() -> Iterator[None]:
    """One BLAS thread, as evaluation has it."""
    with backend.computing_threads():
        yield


@pytest.fixture
def _few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """SGD as short as easy classes allow."""
    monkeypatch.setattr(linear_probe, "SGD_LEAST_STEPS", 50)


@pytest.fixture(scope="module")
def real() -> tuple[Arrays, Arrays]:
    """Training and test features of demo images, by an untrained nano model."""
    config = resolve(
        parse(
            {
                "compile": False,
                "data": {"name": "demo", "image_size": 32, "limit": 1500},
                "model": {"size": "nano", "patch_size": 8},
            }
        )
    )
    model = hj.HJEPA(config)
    mx.eval(model.parameters())
    train = hj.open_source(config.data, "train")
    test = hj.open_source(config.data, "test")
    found = [
        extract(lambda: [model_features(model)], source, config, Skipped())[0]
        for source in (train, test)
    ]
    (x, labels), (queries, truth) = ((f.by_name["level_2"], f.labels) for f in found)
    assert np.linalg.cond(np.cov(x.T)) > 1e6  # strongly correlated, as a JEPA's are
    return (x, labels), (queries, truth)


# k-NN


def cosine(queries: np.ndarray, bank: np.ndarray) -> np.ndarray:
    """[Q, N] in float64."""
    a, b = queries.astype(np.float64), bank.astype(np.float64)
    return (a @ b.T) / np.linalg.norm(a, axis=1)[:, None] / np.linalg.norm(b, axis=1)


def plain_knn(bank: np.ndarray, labels: np.ndarray, queries: np.ndarray, k: int) -> Arrays:
    """Each query's class, by counting votes in float64; and whether no tie is near."""
    winners, clear = [], []
    for row in cosine(queries, bank):
        order = np.argsort(-row)
        votes = np.zeros(max(2, labels.max() + 1))
        for neighbour in order[:k]:
            votes[labels[neighbour]] += math.exp(row[neighbour] / 0.07)
        second, first = np.sort(votes)[-2:]
        last_one_is_clear = k == len(row) or row[order[k - 1]] - row[order[k]] > 1e-6
        winners.append(votes.argmax())
        clear.append(first - second > 1e-4 * first and last_one_is_clear)
    return np.array(winners), np.array(clear)


@settings(max_examples=50)
@given(
    st.integers(1, 500), st.integers(1, 12), st.integers(2, 20), st.integers(1, 20), st.booleans(),
    st.integers(10, 600), st.integers(1, 5000), st.integers(1, 9), st.integers(0, 2**32 - 1),
)  # fmt: skip
def test_the_neighbours_and_their_vote_are_the_plain_ones_in_any_blocks(
    n: int, q: int, dim: int, k: int, opposite: bool, block: int, held: int, group: int, seed: int
) -> None:
    assume(k <= n)
    rng = np.random.default_rng(seed)
    bank = (rng.normal(size=(n, dim)) + 3 * opposite).astype(np.float32)
    queries = (rng.normal(size=(q, dim)) - 3 * opposite).astype(np.float32)  # similar to nothing
    labels = rng.integers(0, 4, n)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(knn, "BANK_BLOCK", block)
        patch.setattr(knn, "SIMILARITIES", held)
        patch.setattr(knn, "GROUP", group)
        similarity, rows = nearest(bank, queries, k)
        predicted = knn_predict(bank, labels, queries, k)
    expected = cosine(queries, bank)
    assert_allclose(similarity, -np.sort(-expected, 1)[:, :k], atol=2e-6)
    assert_allclose(similarity, np.take_along_axis(expected, rows, 1), atol=2e-6)
    assert all(len(set(row)) == k for row in rows.tolist())
    winners, clear = plain_knn(bank, labels, queries, k)
    assert_array_equal(predicted[clear], winners[clear])


@pytest.mark.parametrize("neighbours_lie_together", [True, False])
def test_a_large_bank_is_searched_exactly_at_once_and_in_blocks(
    neighbours_lie_together: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    N, k = 6001, 20
    assert 4 * k * knn.GROUP < N
    assert N % knn.GROUP
    bank, labels = clusters(1, N, 1.5)
    queries, _ = clusters(2, 150, 1.5)
    if neighbours_lie_together:
        order = np.argsort(cosine(queries[:1], bank)[0])
        bank, labels = bank[order], labels[order]
    winners, clear = plain_knn(bank, labels, queries, k)
    assert clear.mean() > 0.95
    assert_array_equal(knn_predict(bank, labels, queries)[clear], winners[clear])
    monkeypatch.setattr(knn, "BANK_BLOCK", 5130)  # its second block is too small for groups
    monkeypatch.setattr(knn, "SIMILARITIES", 5130 * 40)
    assert_array_equal(knn_predict(bank, labels, queries)[clear], winners[clear])


def test_knn_agrees_with_scikit_learn_on_real_features(real: tuple[Arrays, Arrays]) -> None:
    (bank, labels), (queries, truth) = (tuple(a[:500] for a in part) for part in real)
    weighted = KNeighborsClassifier(
        20, metric="cosine", algorithm="brute", weights=lambda d: np.exp((1 - d) / 0.07)
    ).fit(bank.astype(np.float64), labels)
    shares = np.sort(weighted.predict_proba(queries.astype(np.float64)), 1)
    clear = shares[:, -1] - shares[:, -2] > 1e-3
    assert clear.mean() > 0.95
    expected = weighted.predict(queries.astype(np.float64))
    assert_array_equal(knn_predict(bank, labels, queries)[clear], expected[clear])
    reached = knn_accuracy(bank, labels, queries, truth)
    assert reached == pytest.approx(100 * (expected == truth).mean(), abs=2)
    assert 30 < reached < 90  # the comparison would mean nothing at 0 or 100


def test_at_a_low_temperature_the_nearest_image_decides() -> None:
    bank, labels = clusters(1, 300, 1.5)
    queries, _ = clusters(2, 200, 1.5)
    nearest_ones = labels[cosine(queries, bank).argmax(1)]
    assert_array_equal(knn_predict(bank, labels, queries, temperature=1e-5), nearest_ones)


def test_knn_refuses_too_few_images_and_broken_features() -> None:
    x, labels = clusters(1, 10, 1.0)
    with pytest.raises(UsageError, match="at least 20 training images, there are 10"):
        knn_accuracy(x, labels, x, labels)
    x[0, 0] = np.nan
    with pytest.raises(UsageError, match="NaN"):
        knn_accuracy(x, labels, x, labels, k=5)


def test_as_many_neighbours_vote_as_the_protocol_says_at_its_temperature() -> None:
    (x, labels), (queries, truth) = clusters(1, 600, 2.5), clusters(2, 600, 2.5)
    reached = []
    for k, temperature in ((1, 0.07), (50, 0.07), (50, 1.0), (500, 1.0)):
        weighted = KNeighborsClassifier(
            k,
            metric="cosine",
            algorithm="brute",
            weights=lambda d, at=temperature: np.exp((1 - d) / at),
        )
        reached.append(100 * weighted.fit(x, labels).score(queries, truth))
        protocol = Protocol(k, temperature)
        found = level_scores(made(x, labels), made(queries, truth), "level_0", protocol, False)
        assert found["knn"] == pytest.approx(reached[-1], abs=0.2)
    assert min(np.abs(np.diff(sorted(reached)))) > 0.4  # none could be taken for another


# The linear probe


def objective(probe: Arrays, x: np.ndarray, labels: np.ndarray, l2: float) -> float:
    """Mean cross-entropy + ½·l2·|W|² of weights [D, C] and biases [C], by scikit-learn."""
    weight, bias = (part.astype(np.float64) for part in probe)
    probabilities = softmax(x @ weight + bias, axis=1)
    return float(log_loss(labels, probabilities) + l2 / 2 * np.square(weight).sum())


def test_logistic_regression_ends_where_scikit_learn_does_on_real_features(
    real: tuple[Arrays, Arrays],
) -> None:
    (x, labels), (queries, truth) = real
    mean, scale = linear_probe.moments(x)
    grid: list[linear_probe.Setting] = [(("l2", l2),) for l2 in (1e-2, 1e-4)]
    x32 = linear_probe.standardised(x, mean, scale)
    solved = linear_probe.logistic_regression(x32, labels, 10, grid, tolerance=linear_probe.FINAL)
    standard = StandardScaler().fit(x.astype(np.float64))
    x64, q64 = standard.transform(x), standard.transform(queries)
    for ((_, l2),), ours, converged in solved:
        assert converged
        reference = LogisticRegression(C=1 / (len(x) * l2), tol=1e-5, max_iter=5000)
        reference.fit(x64, labels)
        lowest = objective((reference.coef_.T, reference.intercept_), x64, labels, l2)
        assert objective(ours, x64, labels, l2) == pytest.approx(lowest, rel=1e-3)
        predicted = linear_probe.LinearProbe(mean, scale, *ours, {}).predict(queries)
        reached = 100 * (predicted == truth).mean()
        assert reached == pytest.approx(100 * reference.score(q64, truth), abs=0.5)


@pytest.mark.usefixtures("_few_steps")
@pytest.mark.parametrize("solver", linear_probe.SOLVERS)
def test_the_chosen_probe_is_as_good_as_scikit_learns(solver: str) -> None:
    (x, labels), (queries, truth) = clusters(1, 3000, 1.2), clusters(2, 1000, 1.2)
    probe = linear_probe.fit(x, labels, solver)
    reference = 100 * LogisticRegression().fit(x, labels).score(queries, truth)
    assert 80 < reference < 97
    assert 100 * (probe.predict(queries) == truth).mean() == pytest.approx(reference, abs=2)
    assert probe.setting in [dict(setting) for setting in linear_probe.GRIDS[solver]]


def test_sgd_comes_as_far_as_logistic_regression_on_real_features(
    real: tuple[Arrays, Arrays], monkeypatch: pytest.MonkeyPatch
) -> None:
    (x, labels), (queries, truth) = real
    monkeypatch.setitem(linear_probe.GRIDS, "sgd", linear_probe.GRIDS["sgd"][1::4])
    reached = [
        100 * (linear_probe.fit(x[:, ::4], labels, solver).predict(queries[:, ::4]) == truth).mean()
        for solver in linear_probe.SOLVERS
    ]
    assert reached[0] == pytest.approx(reached[1], abs=3)


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
    solve, tried = linear_probe.logistic_regression, []

    def counted(*arguments: Any, **options: Any) -> linear_probe.Solved:
        for solved in solve(*arguments, **options):
            tried.append(dict(solved[0])["l2"])
            yield solved

    monkeypatch.setitem(linear_probe.SOLVERS, linear_probe.SOLVER, counted)
    x, labels = clusters(1, 600, 0.1)  # far apart: the strongest penalty is never beaten
    assert linear_probe.fit(x, labels).setting == {"l2": linear_probe.L2[0]}
    assert tried == [*linear_probe.L2[:4], linear_probe.L2[0]]


def test_few_labels_are_fitted_as_scikit_learns_default() -> None:
    (x, labels), (queries, _) = clusters(1, 40, 1.0), clusters(2, 1000, 1.0)
    standard = StandardScaler().fit(x)
    reference = LogisticRegression(C=1.0, tol=1e-8, max_iter=1000)
    reference.fit(standard.transform(x), labels)
    probe = linear_probe.fit_few(x, labels, 5)
    assert_allclose(probe.weight, reference.coef_.T, atol=0.01)
    predicted = reference.predict(standard.transform(queries))
    assert (probe.predict(queries) == predicted).mean() > 0.99


def test_cross_entropy_and_its_slopes_are_those_of_the_formula() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(30, 6)), rng.integers(0, 4, 30)
    point = rng.normal(size=(7, 4))  # weights, and the biases last

    def loss(at: np.ndarray) -> float:
        probabilities = softmax(x @ at[:-1] + at[-1], axis=1)
        return float(log_loss(y, probabilities, normalize=False, labels=range(4)))

    found, slope, bias_slope = linear_probe._cross_entropy(np, x, y, point[:-1], point[-1])
    assert found == pytest.approx(loss(point))
    numeric = np.zeros_like(point)
    for place in np.ndindex(point.shape):
        step = np.zeros_like(point)
        step[place] = 1e-5
        numeric[place] = (loss(point + step) - loss(point - step)) / 2e-5
    assert_allclose(np.vstack([slope, bias_slope]), numeric, atol=1e-6)


def test_cross_entropy_by_mlx_in_blocks_is_that_by_numpy(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(100, 6)).astype(np.float32), rng.integers(0, 4, 100)
    weight, bias = (rng.normal(size=shape).astype(np.float32) for shape in ((6, 4), 4))
    monkeypatch.setattr(linear_probe, "LOGITS", 4 * 7)  # 15 blocks, the last of 2 images
    found = linear_probe._on_gpu(x, y)(weight, bias)
    expected = linear_probe._cross_entropy(np, x, y, weight, bias)
    for ours, theirs in zip(found, expected, strict=True):
        assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)


def test_a_probe_fitted_on_a_gpu_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    (x, labels), (queries, _) = clusters(1, 1000, 1.2), clusters(2, 1000, 1.2)
    on_cpu = linear_probe.fit(x, labels)
    monkeypatch.setattr(backend, "on_metal", lambda: True)
    monkeypatch.setattr(linear_probe, "WORTH_A_GPU", 0)
    monkeypatch.setattr(linear_probe, "LOGITS", 5 * 300)
    on_gpu = linear_probe.fit(x, labels)
    assert on_gpu.setting == on_cpu.setting
    assert_allclose(on_gpu.weight, on_cpu.weight, atol=0.02)
    assert (on_gpu.predict(queries) == on_cpu.predict(queries)).mean() > 0.99


def test_sgd_trains_every_setting_as_if_it_were_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear_probe, "SGD_LEAST_STEPS", 10)
    x, labels = clusters(1, 500, 1.2)  # one batch is all of them: no order to know
    grid = [(0.01, 0.0), (0.3, 0.0), (0.1, 0.5)]
    named: list[linear_probe.Setting] = [(("lr", lr), ("weight_decay", d)) for lr, d in grid]
    solved = list(linear_probe.sgd(x, labels, 5, named))
    ones, targets = np.hstack([x, np.ones((500, 1))]), np.eye(5)[labels]
    for (lr, decay), setting, (_, (weight, bias), _) in zip(grid, named, solved, strict=True):
        at, velocity = np.zeros((17, 5)), np.zeros((17, 5))
        for step in range(10):
            gradient = ones.T @ (softmax(ones @ at, axis=1) - targets) / 500
            velocity = 0.9 * velocity + gradient + decay * at
            at -= lr * (1 + math.cos(math.pi * step / 10)) / 2 * velocity
        assert_allclose(np.vstack([weight, bias]), at, atol=1e-4, err_msg=str(setting))


def test_moments_are_numpys_and_rounding_is_no_spread(monkeypatch: pytest.MonkeyPatch) -> None:
    x = (np.random.default_rng(0).normal(size=(1000, 3)) * (1, 1e-3, 1e3) + 5).astype(np.float32)
    rounded = np.full((1000, 2), (0.1, 1e4), np.float32)
    rounded[::2] = np.nextafter(rounded[::2], np.float32(np.inf))
    monkeypatch.setattr(linear_probe, "BLOCK", 300)
    mean, scale = linear_probe.moments(np.hstack([x, rounded]))
    assert_allclose(mean[:3], x.mean(0, dtype=np.float64), rtol=1e-6)
    assert_allclose(scale[:3], x.std(0, dtype=np.float64), rtol=1e-5)
    assert_array_equal(scale[3:], 1)


@pytest.mark.usefixtures("_few_steps")
def test_neither_scale_nor_origin_nor_constant_dimensions_change_a_probe() -> None:
    (x, labels), (queries, _) = clusters(1, 1500, 1.2), clusters(2, 1000, 1.2)
    rng = np.random.default_rng(3)
    scale = (2.0 ** rng.integers(-8, 9, 16)).astype(np.float32)
    shift = scale * rng.integers(-20, 21, 16).astype(np.float32)
    constant = np.repeat(np.array([[0, 0.1, -7.3, 1e4]], np.float32), len(x), 0)
    moved = np.hstack([x * scale + shift, constant])
    surprising = np.hstack([queries * scale + shift, rng.normal(size=(1000, 4)) * 100])
    for solver in linear_probe.SOLVERS:
        probe = linear_probe.fit(x, labels, solver)
        other = linear_probe.fit(moved, labels, solver)
        assert other.setting == probe.setting
        assert_allclose(other.weight[:16], probe.weight, atol=0.02)
        assert not other.weight[16:].any()
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
def test_probes_refuse_what_nothing_can_be_learnt_from(fit: Any) -> None:
    x, labels = clusters(1, 40, 1.0)
    with pytest.raises(UsageError, match="at least 10 training images, there are 9"):
        fit(x[:9], labels[:9])
    with pytest.raises(UsageError, match="all have the same label"):
        fit(x, np.ones(40, int))
    with pytest.raises(UsageError, match="40 images, but 39 labels"):
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


def test_features_that_are_all_zero_are_as_collapsed_as_can_be() -> None:
    found = rank.describe(np.zeros((10, 4), np.float32))
    assert (found["mean_cosine"], found["uniformity"], found["effective_rank"]) == (1, 0, 1)


# The attentive probe


def textbook(head: dict[str, np.ndarray], tokens: np.ndarray) -> np.ndarray:
    """Cross-attention with keys and values of every token, one attention head after the other."""
    seen = []
    for query, key, value in zip(head["query"], head["key"], head["value"], strict=True):
        keys, values = tokens @ key.T, tokens @ value  # [B, n, d]
        attention = softmax(keys @ query[0] / math.sqrt(len(key)), axis=1)  # [B, n]
        seen.append((attention[:, :, None] * values).sum(1))
    return np.hstack(seen) @ head["weight"] + head["bias"]


def test_the_attentive_probe_computes_the_textbooks_cross_attention() -> None:
    rng = np.random.default_rng(0)
    H, d, D, C = 3, 5, 7, 4
    shapes = {"query": (H, 1, d), "key": (H, d, D), "value": (H, D, d), "weight": (H * d, C)}
    heads = [
        {name: rng.normal(size=shape) for name, shape in (shapes | {"bias": (C,)}).items()}
        for _ in range(2)
    ]
    tokens = rng.normal(size=(6, 10, D))
    in_mlx = [{name: mx.array(a.astype(np.float32)) for name, a in head.items()} for head in heads]
    found = attentive_probe.logits(in_mlx, mx.array(tokens.astype(np.float32)))
    for scores, head in zip(found, heads, strict=True):
        assert_allclose(np.array(scores), textbook(head, tokens), rtol=1e-3, atol=1e-3)


def coins(seed: int, count: int) -> Arrays:
    """Tokens [N, 36, 16] that show one of two contents each; the sixth position is the class."""
    rng = np.random.default_rng(seed)
    position = np.random.default_rng(9).normal(size=(36, 16))
    content = np.random.default_rng(8).normal(size=(2, 16))
    shown = rng.integers(0, 2, (count, 36))
    noise = 0.2 * rng.normal(size=(count, 36, 16))  # drowns what rounding to float16 would tell
    return (position + content[shown] + noise).astype(np.float16), shown[:, 5]


def test_a_class_that_one_position_decides_is_found_by_attention_and_not_by_the_mean() -> None:
    (tokens, labels), (queries, truth) = coins(1, 1500), coins(2, 500)
    probe = attentive_probe.fit(tokens, labels)
    predicted = probe.predict(queries)
    assert (predicted == truth).mean() > 0.95
    means, query_means = (part.astype(np.float32).mean(1) for part in (tokens, queries))
    by_mean = linear_probe.fit(means, labels).predict(query_means)
    assert (by_mean == truth).mean() < 0.7  # Φ(1/√35) = 0.57 is what a sum of 36 coins tells
    alone = [probe.predict(queries[i : i + 1])[0] for i in range(20)]
    assert_array_equal(predicted[:20], alone)


def test_collapsed_tokens_have_an_attentive_probe_too() -> None:
    labels = np.arange(40) % 2
    for same in (0.0, 0.3):
        tokens = np.full((40, 4, 16), same)
        assert len(set(attentive_probe.fit(tokens, labels).predict(tokens))) == 1


@pytest.mark.parametrize("rates", [(3e-3, 1e-9), (1e-9, 3e-3)])
def test_the_learning_rate_that_does_best_is_kept(
    rates: tuple[float, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attentive_probe, "LEARNING_RATES", rates)
    assert attentive_probe.fit(*coins(1, 1000)).lr == 3e-3


@pytest.mark.usefixtures("_few_steps")
def test_probes_are_deterministic() -> None:
    x, labels = clusters(1, 300, 1.2)
    for solver in linear_probe.SOLVERS:
        once, again = (linear_probe.fit(x, labels, solver) for _ in range(2))
        assert_array_equal(once.weight, again.weight)
        assert_array_equal(once.bias, again.bias)
    first, second = (attentive_probe.fit(x.reshape(300, 4, 4), labels) for _ in range(2))
    assert first.lr == second.lr
    assert all(mx.array_equal(first.head[name], second.head[name]) for name in first.head)


# Controls: labels that say nothing, and test images that must not be learnt from


def accuracies(train: Features, test: Features) -> dict[str, float]:
    """Per cent by protocol."""
    by_sgd = level_scores(train, test, "level_0", Protocol(probe="sgd"), False)["linear_probe"]
    scores = level_scores(train, test, "level_0", Protocol(draws=3), True)
    return {
        "k-NN": scores["knn"],
        "logistic regression": scores["linear_probe"],
        "sgd": by_sgd,
        "attentive probe": token_scores(train, test, "level_0")["attentive_probe"],
        "1 % of labels": scores["few_labels_1_percent"]["mean"],
        "10 % of labels": scores["few_labels_10_percent"]["mean"],
    }


@pytest.mark.usefixtures("_few_steps")
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


@pytest.mark.usefixtures("_few_steps")
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


def test_few_labels_are_the_same_share_of_every_class_and_at_least_one() -> None:
    sizes = {0: 600, 1: 240, 2: 30, 4: 3}  # no image of class 3
    labels = np.random.default_rng(0).permutation(np.repeat(list(sizes), list(sizes.values())))
    queries, truth = clusters(2, 100, 1.0)
    drawn = []
    for seed in (1, 5):  # whatever the features
        x = Watched(np.random.default_rng(seed).normal(size=(len(labels), 16)).astype(np.float32))
        few_labels(made(x, labels), made(queries, truth), "level_0", 0.1, 3)  # type: ignore[arg-type]
        drawn.append(x.asked)
    for first, second in zip(*drawn, strict=True):
        assert Counter(labels[first].tolist()) == {0: 60, 1: 24, 2: 3, 4: 1}
        assert len(set(first.tolist())) == len(first)
        assert_array_equal(first, second)
    assert len({tuple(sorted(rows)) for rows in drawn[0]}) == 3


def test_few_labels_are_summed_up_by_mean_and_deviation_over_draws() -> None:
    (x, labels), (queries, truth) = clusters(1, 200, 1.5), clusters(2, 500, 1.5)
    watched = Watched(x)
    found = few_labels(made(watched, labels), made(queries, truth), "level_0", 0.05, 4)  # type: ignore[arg-type]
    reached = []
    for rows in watched.asked:
        standard = StandardScaler().fit(x[rows])
        reference = LogisticRegression(C=1.0).fit(standard.transform(x[rows]), labels[rows])
        reached.append(100 * reference.score(standard.transform(queries), truth))
    assert len(reached) == 4
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


# Rank and spread


def entropy_rank(values: np.ndarray) -> float:
    share = values[values > 0] / values.sum()
    return float(np.exp(-(share * np.log(share)).sum()))


def test_ranks_are_those_of_numpys_singular_values_in_any_blocks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    x = np.random.default_rng(1).normal(2, 1, (500, 12)) * np.linspace(0.1, 3, 12)
    singular = np.linalg.svd(x, compute_uv=False)
    centred = np.linalg.svd(x - x.mean(0), compute_uv=False)
    for block in (1 << 14, 70):
        monkeypatch.setattr(rank, "BLOCK", block)
        assert rank.effective_rank(x) == pytest.approx(entropy_rank(centred**2))
        assert rank.rankme(x) == pytest.approx(entropy_rank(singular), rel=1e-5)
        assert rank.feature_std(x.astype(np.float32)) == pytest.approx(plain_std(x), rel=1e-5)
        assert rank.mean_cosine(x) == pytest.approx(pair_mean(x, np.dot))


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


@pytest.mark.parametrize("point", [0.1, -30.0])
def test_features_that_collapsed_to_a_point_have_rank_one_and_no_spread(point: float) -> None:
    x = np.full((100, 32), point, np.float32)
    rounded = np.random.default_rng(0).integers(0, 2, x.shape) > 0
    x[rounded] = np.nextafter(x[rounded], np.float32(0))  # what float32 leaves of a point
    described = rank.describe(x)
    assert described["effective_rank"] == 1
    assert described["rankme"] == pytest.approx(1, abs=1e-3)
    assert described["feature_std"] == pytest.approx(0, abs=1e-6)
    assert described["mean_cosine"] == pytest.approx(1)
    assert described["uniformity"] == pytest.approx(0, abs=1e-9)


def test_isotropic_features_have_full_rank_and_the_spread_of_a_sphere() -> None:
    D = 16
    described = rank.describe(np.random.default_rng(0).normal(size=(20000, D)))
    assert described["effective_rank"] == pytest.approx(D, rel=0.01)
    assert described["rankme"] == pytest.approx(D, rel=0.01)
    assert described["feature_std"] == pytest.approx(1, abs=0.01)
    assert described["mean_cosine"] == pytest.approx(0, abs=0.001)
    # E exp(4·cosine) of two random directions is Γ(D/2)·2^(1−D/2)·I(4), I of order D/2 − 1.
    mean = gamma(D / 2) * (2 / 4) ** (D / 2 - 1) * iv(D / 2 - 1, 4)
    assert described["uniformity"] == pytest.approx(math.log(mean) - 4, abs=0.01)


def units(x: np.ndarray) -> list[np.ndarray]:
    return [row / math.sqrt(sum(row**2)) for row in x]


def plain_std(x: np.ndarray) -> float:
    return float(np.mean([np.std(column) for column in np.transpose(units(x))])) * x.shape[1] ** 0.5


def pair_mean(x: np.ndarray, of: Any) -> float:
    return float(np.mean([of(u, v) for u, v in combinations(units(x), 2)]))


def test_spread_is_that_of_plain_loops_over_images_and_pairs() -> None:
    rng = np.random.default_rng(2)
    x = rng.normal(size=(40, 6)) + 1
    assert rank.feature_std(x) == pytest.approx(plain_std(x))
    assert rank.mean_cosine(x) == pytest.approx(pair_mean(x, np.dot))
    potential = pair_mean(x, lambda u, v: math.exp(-2 * sum((u - v) ** 2)))
    assert rank.uniformity(x) == pytest.approx(math.log(potential))
    other = x + 0.5 * rng.normal(size=x.shape)
    distances = [sum((u - v) ** 2) for u, v in zip(units(x), units(other), strict=True)]
    assert rank.alignment(x, other) == pytest.approx(np.mean(distances))


def test_alignment_and_uniformity_have_their_known_extremes() -> None:
    x = np.random.default_rng(0).normal(size=(50, 8)).astype(np.float32)
    assert rank.alignment(x, 3 * x) == pytest.approx(0, abs=1e-9)
    assert rank.alignment(x, -x) == pytest.approx(4)
    assert rank.uniformity(np.stack([x[0], -x[0]])) == pytest.approx(-8)


def test_uniformity_of_many_images_is_estimated_from_some_of_all(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    x = np.random.default_rng(0).normal(size=(1500, 8))
    x[750:] = x[0]  # half of them collapsed: looking at one end only would show
    whole = rank.uniformity(x)
    monkeypatch.setattr(rank, "PAIRS_OF", 500)
    assert rank.uniformity(x) == pytest.approx(whole, abs=0.02)


# Pixels and joined levels


@pytest.mark.parametrize(("side", "factor"), [(28, 1), (70, 2), (100, 3)])
def test_the_pixel_baseline_averages_whole_squares(side: int, factor: int) -> None:
    images = np.random.default_rng(0).integers(0, 256, (3, side, side, 3), dtype=np.uint8)
    small = side // factor
    got = pixels(images)["pixels"]
    assert got.dtype == np.uint8
    squares = got.reshape(3, small, small, 3)
    for image, row, column, channel in np.ndindex(squares.shape):
        top, left = row * factor, column * factor
        square = images[image, top : top + factor, left : left + factor, channel]
        assert abs(squares[image, row, column, channel] - square.mean()) <= 0.5


def test_one_channel_of_grey_pixels_is_kept_and_all_of_coloured_ones() -> None:
    grey = np.repeat(np.random.default_rng(0).integers(0, 256, (9, 20, 1)), 3, 2)
    grey = grey.reshape(9, 60).astype(np.uint8)
    coloured = grey.copy()
    coloured[4, 7] ^= 1  # one value of one image
    for train, test, kept in ((grey, grey, 20), (grey, coloured, 60), (coloured, grey, 60)):
        parts = [Features({"pixels": x}, np.arange(9), np.arange(9), {}, 1) for x in (train, test)]
        drop_equal_channels(*parts)
        for part, whole in zip(parts, (train, test), strict=True):
            expected = whole if kept == 60 else whole.reshape(9, 20, 3)[:, :, 0]
            assert_array_equal(part.by_name["pixels"], expected)


def test_the_cosine_of_all_levels_is_the_mean_of_the_levels_cosines() -> None:
    rng = np.random.default_rng(0)
    levels = [rng.normal(size=(30, D)) * size for D, size in ((8, 1), (20, 100), (5, 0.01))]
    joined = concatenated([x.astype(np.float32) for x in levels])
    assert joined.shape == (30, 33)
    expected = np.mean([cosine(x, x) for x in levels], 0)
    assert_allclose(cosine(joined, joined), expected, atol=1e-6)


def test_large_arrays_are_mapped_to_a_file_that_has_no_name(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr("hjepa_mlx.eval.features.IN_MEMORY", 400)
    *small, mapped = room(((10, 10), np.float32), ((10, 10, 2), np.float16), ((101,), np.float32))
    assert not any(isinstance(array, np.memmap) for array in small)
    assert isinstance(mapped, np.memmap)
    mapped[:] = np.arange(101)
    assert mapped.sum() == 5050
    assert list(tmp_path.iterdir()) == []


def test_a_disk_too_full_for_the_features_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr("hjepa_mlx.eval.features.IN_MEMORY", 400)
    full = shutil.disk_usage(tmp_path)._replace(free=1_500_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: full)
    with pytest.raises(HJEPAError) as refused:
        room(((500_000, 500), np.float32), ((1_000_000, 500), np.float16))  # either would fit
    said = str(refused.value)
    assert "2.00 GB" in said
    assert "1.50 GB are free" in said
    assert str(tmp_path) in said
    assert "--token-gb" in said
    assert "\n" not in said
