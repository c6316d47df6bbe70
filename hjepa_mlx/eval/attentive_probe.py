"""The attentive probe: a learned query attends to a level's tokens, then a linear classifier.

JEPA features are spread over tokens, and a mean over them loses the detail of one place. Source:
AIM (El-Nouby et al., arXiv 2401.08541, section 3.2): cross-attention with one query, no MLP.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np

from hjepa_mlx.eval.arrays import accuracy, check, chunks, validation
from hjepa_mlx.rng import generator

LEARNING_RATES = (1e-3, 3e-3, 1e-2)
WEIGHT_DECAY = 0.01
BATCH, EPOCHS, LEAST_STEPS = 64, 5, 300
WHITENED_BY = 2000  # images
RIDGE = 1e-3  # of the mean variance
HEAD_DIM = 64

Head = dict[str, mx.array]


@dataclass(frozen=True)
class AttentiveProbe:
    """A fitted classifier of tokens [N, n, D], and the learning rate that was chosen for it."""

    head: Head
    lr: float

    def predict(self, tokens: np.ndarray) -> np.ndarray:
        """Classes [N] of tokens [N, n, D]."""
        classify = mx.compile(logits)
        winners = [
            np.array(classify([self.head], mx.array(tokens[rows]))[0].argmax(1))
            for rows in chunks(len(tokens), BATCH)
        ]
        return np.concatenate(winners)


def logits(heads: list[Head], tokens: mx.array) -> list[mx.array]:
    """Class scores [B, C] of tokens [B, n, D], from each of several probes.

    A query that is the same for every image lets the key projection be applied to the query instead
    of to the tokens, and the value projection to the averages that attention makes: the same
    function as the textbook's, at a cost of n·D instead of n·D² for each head and image.
    """
    x = tokens.astype(mx.float32)
    B, _, D = x.shape
    H, _, d = heads[0]["query"].shape  # attention heads, 1, D/H
    queries = mx.concatenate([(head["query"] @ head["key"]).squeeze(1) for head in heads])
    attention = mx.softmax(x @ queries.T / math.sqrt(d), axis=1)  # [B, n, heads·H]
    seen = (attention.swapaxes(1, 2) @ x).reshape(B, -1, H, D)
    scores = []
    for number, head in enumerate(heads):
        values = (seen[:, number].swapaxes(0, 1) @ head["value"]).swapaxes(0, 1)  # [B, H, d]
        scores.append(values.reshape(B, H * d) @ head["weight"] + head["bias"])
    return scores


def fit(tokens: np.ndarray, labels: np.ndarray) -> AttentiveProbe:
    """Fit the attentive probe to training tokens [N, n, D] (normalised) and labels [N].

    AdamW at three learning rates side by side; the one that does best on held-out training images
    is kept. Deterministic. Raises UsageError as the linear probe does.
    """
    check(tokens, labels, "The attentive probe")
    fitted, held_out = validation(len(labels))
    probes = map(AttentiveProbe, _train(tokens, labels, fitted), LEARNING_RATES)
    inspected = np.asarray(tokens[held_out])
    return max(probes, key=lambda probe: accuracy(probe.predict(inspected), labels[held_out]))


def _new_head(dim: int, classes: int) -> Head:
    heads = max(1, dim // HEAD_DIM)
    draws = generator(0, "attentive probe", dim)

    def normal(*shape: int) -> mx.array:
        return mx.array(draws.normal(0, 1 / math.sqrt(dim), shape).astype(np.float32))

    return {
        "query": normal(heads, 1, dim // heads),
        "key": normal(heads, dim // heads, dim),
        "value": normal(heads, dim, dim // heads),
        "weight": mx.zeros((dim // heads * heads, classes)),
        "bias": mx.zeros(classes),
    }


def _whitening(tokens: np.ndarray, rows: np.ndarray) -> tuple[mx.array, mx.array]:
    """Mean [D] of the tokens and a matrix [D, D] that makes their dimensions uncorrelated."""
    some = np.asarray(tokens[rows[:: max(1, len(rows) // WHITENED_BY)]], np.float32)
    x = some.reshape(-1, some.shape[-1])
    mean = x.mean(0)
    covariance = (x - mean).T @ (x - mean) / len(x)
    ridge = (RIDGE * covariance.trace() / len(covariance) or 1.0) * np.eye(len(covariance))
    factor = np.linalg.cholesky((covariance + ridge).astype(np.float64))
    return mx.array(mean), mx.array(np.linalg.inv(factor).astype(np.float32))


def _of_raw_tokens(head: Head, mean: mx.array, white: mx.array) -> Head:
    """The head for raw tokens that does the same as `head` does for whitened ones."""
    value = white.T @ head["value"]  # [H, D, d]
    shift = (mean @ value).reshape(-1) @ head["weight"]
    key, bias = head["key"] @ white, head["bias"] - shift
    return {**head, "key": key, "value": value, "bias": bias}


def _train(tokens: np.ndarray, labels: np.ndarray, rows: np.ndarray) -> list[Head]:
    """One head per learning rate, all seeing the same batches of the images in `rows`.

    The heads train on whitened tokens: a JEPA's dimensions are so correlated that on the raw ones
    AdamW gets 5 to 10 points less far in the same steps. Its moments are not corrected for their
    start at zero, so first steps are longer: no worse (docs/experiments.md).
    """
    whitening = _whitening(tokens, rows)
    heads = [_new_head(tokens.shape[2], int(labels.max()) + 1) for _ in LEARNING_RATES]
    optimizers = [optim.AdamW(0.0, weight_decay=WEIGHT_DECAY) for _ in heads]
    for optimizer, head in zip(optimizers, heads, strict=True):
        optimizer.init(head)
    per_epoch = max(1, len(rows) // BATCH)
    total = max(LEAST_STEPS, EPOCHS * per_epoch)
    state = [heads, [optimizer.state for optimizer in optimizers]]

    def loss_fn(heads: list[Head], x: mx.array, y: mx.array) -> mx.array:
        raw = [_of_raw_tokens(head, *whitening) for head in heads]
        scores = mx.stack(logits(raw, x))  # [heads, B, C]
        return nn.losses.cross_entropy(scores, mx.stack([y] * len(heads))).mean(1).sum()

    def step(x: mx.array, y: mx.array, cosine: mx.array) -> None:
        gradients = mx.grad(loss_fn)(heads, x, y)
        for number, (optimizer, lr) in enumerate(zip(optimizers, LEARNING_RATES, strict=True)):
            optimizer.learning_rate = lr * cosine
            heads[number] = optimizer.apply_gradients(gradients[number], heads[number])

    compiled = mx.compile(step, inputs=state, outputs=state)
    for number in range(total):
        epoch, place = divmod(number, per_epoch)
        if place == 0:
            order = rows[generator(0, "probe", epoch).permutation(len(rows))]
        batch = order[place * BATCH : (place + 1) * BATCH]
        cosine = mx.array((1 + math.cos(math.pi * number / total)) / 2)
        compiled(mx.array(tokens[batch]), mx.array(labels[batch]), cosine)
        mx.eval(state)
    return [_of_raw_tokens(head, *whitening) for head in heads]
