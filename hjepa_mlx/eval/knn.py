"""k-NN on frozen features, votes weighted: exact, in bounded memory; and training's quick one."""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from hjepa_mlx.config import Config
from hjepa_mlx.data.pipeline import Skipped
from hjepa_mlx.data.source import Source
from hjepa_mlx.errors import UsageError
from hjepa_mlx.eval.arrays import accuracy, check_finite, check_labels, chunks
from hjepa_mlx.eval.features import extract, model_features, whiten
from hjepa_mlx.models.hjepa import HJEPA

K, TEMPERATURE = 20, 0.07  # DINO's protocol, arXiv 2104.14294, appendix F
BANK_CHUNK = 1 << 16  # bank images compared at once
SIMILARITIES = 1 << 25  # similarities held at once (128 MB)
GROUP = 64  # bank images whose largest similarity stands for them in a first look
BANK, QUERIES = 5000, 1000  # images of the k-NN that training logs


def knn_accuracy(
    bank: np.ndarray,
    bank_labels: np.ndarray,
    queries: np.ndarray,
    query_labels: np.ndarray,
    k: int = K,
    temperature: float = TEMPERATURE,
) -> float:
    """Per cent of queries [Q, D] whose class wins the vote of their k nearest in bank [N, D].

    Raises UsageError for features that are not finite and for a bank of fewer than k images.
    """
    check_labels(queries, query_labels, "k-NN")
    predicted = knn_predict(bank, bank_labels, queries, k, temperature)
    return accuracy(predicted, query_labels)


def knn_predict(
    bank: np.ndarray,
    bank_labels: np.ndarray,
    queries: np.ndarray,
    k: int = K,
    temperature: float = TEMPERATURE,
) -> np.ndarray:
    """The class [Q] that wins the vote of each query's k nearest images in the bank.

    Cosine similarity, votes weighted by exp(similarity/temperature) (DINO; Wu et al.,
    arXiv 1805.01978).
    """
    check_labels(bank, bank_labels, "k-NN")
    similarity, neighbours = nearest(bank, queries, k)
    classes = int(bank_labels.max()) + 1
    winners = np.empty(len(queries), np.int64)
    for rows in chunks(len(queries), max(1, SIMILARITIES // classes)):
        behind = similarity[rows] - similarity[rows, :1]  # the nearest counts 1: none overflows
        weights = np.exp(behind.astype(np.float64) / temperature)
        places = np.arange(len(weights))[:, None] * classes + bank_labels[neighbours[rows]]
        votes = np.bincount(places.ravel(), weights.ravel(), len(weights) * classes)
        winners[rows] = votes.reshape(-1, classes).argmax(1)
    return winners


def nearest(bank: np.ndarray, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Cosine similarity [Q, k] of each query's k most similar bank images, and their rows [Q, k].

    The most similar comes first. bank: [N, D], queries: [Q, D]; may be memory-mapped, only chunks
    of them are copied.
    """
    if not 0 < k <= len(bank):
        raise UsageError(
            f"k-NN with k={k} needs at least {max(1, k)} training images; there are {len(bank)}."
        )
    similarity = np.full((len(queries), k), -np.inf, np.float32)
    neighbours = np.zeros((len(queries), k), np.int64)
    for columns in chunks(len(bank), BANK_CHUNK):
        chunk = _unit(bank[columns])
        for rows in chunks(len(queries), max(1, SIMILARITIES // len(chunk))):
            found, where = _largest(_unit(queries[rows]) @ chunk.T, min(k, len(chunk)))
            found = mx.concatenate([mx.array(similarity[rows]), found], 1)
            where = mx.concatenate([mx.array(neighbours[rows]), where + columns.start], 1)
            best = mx.argpartition(-found, k - 1, 1)[:, :k]
            similarity[rows] = np.array(mx.take_along_axis(found, best, 1))
            neighbours[rows] = np.array(mx.take_along_axis(where, best, 1))
    order = np.argsort(-similarity, 1, kind="stable")
    return np.take_along_axis(similarity, order, 1), np.take_along_axis(neighbours, order, 1)


def _largest(x: mx.array, k: int) -> tuple[mx.array, mx.array]:
    """The k largest of each row of x [Q, N] and their columns, in no particular order.

    They lie in the k groups of columns whose maxima are largest; only those are looked at closely,
    since a full partition costs many times the matmul that made x.
    """
    Q, N = x.shape
    if 4 * k * GROUP > N:
        columns = mx.argpartition(-x, k - 1, 1)[:, :k]
        return mx.take_along_axis(x, columns, 1), columns
    padded = mx.pad(x, [(0, 0), (0, -N % GROUP)], constant_values=-np.inf) if N % GROUP else x
    maxima = padded.reshape(Q, -1, GROUP).max(2)
    groups = mx.argpartition(-maxima, k - 1, 1)[:, :k]
    columns = (groups[:, :, None] * GROUP + mx.arange(GROUP)).reshape(Q, k * GROUP)
    candidates = mx.take_along_axis(padded, columns, 1)
    chosen = mx.argpartition(-candidates, k - 1, 1)[:, :k]
    return mx.take_along_axis(candidates, chosen, 1), mx.take_along_axis(columns, chosen, 1)


def _unit(features: np.ndarray) -> mx.array:
    check_finite(features)
    x = mx.array(np.asarray(features, np.float32))
    return x / mx.maximum(mx.linalg.norm(x, axis=1, keepdims=True), 1e-12)


class QuickKNN:
    """The k-NN that training logs: target encoder, every level and all whitened, of some images."""

    def __init__(self, model: HJEPA, train: Source, test: Source, config: Config) -> None:
        self.model, self.config = model, config
        self.sources = train.some(BANK, "quick k-NN"), test.some(QUERIES, "quick k-NN")

    def __call__(self) -> dict[str, float]:
        """Accuracy in per cent with the weights of now: knn_level_0, …, knn_whitened."""
        bank, queries = (
            extract(
                lambda: [model_features(self.model)], source, self.config, Skipped(), quiet=True
            )[0]
            for source in self.sources
        )
        whiten(bank, queries, self.config.repeated)
        return {
            f"knn_{level}": knn_accuracy(x, bank.labels, queries.pooled[level], queries.labels)
            for level, x in bank.pooled.items()
        }
