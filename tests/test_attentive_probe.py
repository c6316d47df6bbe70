"""The attentive probe against the textbook's cross-attention, and on a task made for it."""

import math

import mlx.core as mx
import numpy as np
import pytest
from evaluating import Arrays
from numpy.testing import assert_allclose, assert_array_equal
from scipy.special import softmax

from hjepa_mlx.eval import attentive_probe, linear_probe


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
