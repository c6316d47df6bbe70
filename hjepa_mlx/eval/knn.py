"""Weighted k-nearest-neighbour accuracy on frozen features."""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from hjepa_mlx.errors import UsageError

BLOCK = 1 << 26  # similarities held at once (256 MB)


def knn_accuracy(
    bank: np.ndarray,
    bank_labels: np.ndarray,
    queries: np.ndarray,
    query_labels: np.ndarray,
    k: int = 20,
    temperature: float = 0.07,
) -> float:
    """Per cent of queries [Q, D] whose class wins the vote of their k nearest in bank [N, D].

    Cosine similarity, votes weighted by exp(similarity/temperature), exact search
    (DINO, arXiv 2104.14294, appendix F; Wu et al., arXiv 1805.01978).
    """
    if len(bank) < k:
        raise UsageError(
            f"k-NN with k={k} needs at least {k} training images, there are {len(bank)}."
        )
    bank, queries = _unit(bank), _unit(queries)
    transposed = mx.array(bank).T
    classes = int(max(bank_labels.max(), query_labels.max())) + 1
    block = max(1, BLOCK // len(bank))
    correct = 0
    for start in range(0, len(queries), block):
        similarity = np.array(mx.array(queries[start : start + block]) @ transposed)  # [q, N]
        nearest = np.argpartition(similarity, len(bank) - k, axis=1)[:, -k:]  # [q, k]
        weights = np.exp(
            np.take_along_axis(similarity, nearest, 1).astype(np.float64) / temperature
        )
        votes = np.zeros((len(nearest), classes))
        np.add.at(votes, (np.arange(len(nearest))[:, None], bank_labels[nearest]), weights)
        correct += int((votes.argmax(1) == query_labels[start : start + block]).sum())
    return 100 * correct / len(queries)


def _unit(features: np.ndarray) -> np.ndarray:
    if not np.isfinite(features).all():
        raise UsageError("k-NN: the features hold NaN or infinity; this model cannot be evaluated.")
    norm = np.linalg.norm(features, axis=1, keepdims=True)
    return np.asarray(features / np.maximum(norm, 1e-12), np.float32)
