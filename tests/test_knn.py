"""k-NN against scikit-learn and plain loops."""

import math

import numpy as np
import pytest
from evaluating import Arrays, clusters, cosine, made
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal
from sklearn.neighbors import KNeighborsClassifier

from hjepa_mlx.errors import UsageError
from hjepa_mlx.eval import knn
from hjepa_mlx.eval.evaluation import Protocol, level_scores
from hjepa_mlx.eval.knn import knn_accuracy, knn_predict, nearest


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
def test_the_neighbours_and_their_vote_are_the_plain_ones_in_any_chunks(
    n: int, q: int, dim: int, k: int, opposite: bool, chunk: int, held: int, group: int, seed: int
) -> None:
    assume(k <= n)
    rng = np.random.default_rng(seed)
    bank = (rng.normal(size=(n, dim)) + 3 * opposite).astype(np.float32)
    queries = (rng.normal(size=(q, dim)) - 3 * opposite).astype(np.float32)  # similar to nothing
    labels = rng.integers(0, 4, n)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(knn, "BANK_CHUNK", chunk)
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
def test_a_large_bank_is_searched_exactly_at_once_and_in_chunks(
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
    monkeypatch.setattr(knn, "BANK_CHUNK", 5130)  # its second chunk is too small for groups
    monkeypatch.setattr(knn, "SIMILARITIES", 5130 * 40)
    assert_array_equal(knn_predict(bank, labels, queries)[clear], winners[clear])


def test_knn_refuses_too_few_images_and_broken_features() -> None:
    x, labels = clusters(1, 10, 1.0)
    with pytest.raises(UsageError, match="at least 20 training images; there are 10"):
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
        found = level_scores(made(x, labels), made(queries, truth), "level_0", protocol)
        assert found["knn"] == pytest.approx(reached[-1], abs=0.2)
    assert min(np.abs(np.diff(sorted(reached)))) > 0.4  # none could be taken for another
