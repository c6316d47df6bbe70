"""Weights in long arrays, so that an update takes a few kernels instead of many a weight."""

from __future__ import annotations

import sys
from itertools import accumulate
from math import prod
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten, tree_unflatten

from hjepa_mlx import backend

Flat = dict[str, dict[str, mx.array]]  # by part of the model, then "vectors", "matrices 0", …
ROW = 1024  # matrices are summed row by row: on a CPU a long float32 sum loses digits
# About so many numbers are in an array of matrices on a CPU. An update makes its arrays anew, one
# after the other: if they are short, it needs little memory beside the old ones, and finds it in
# the cache.
MOST = 1_000_000


class Layout:
    """The places of a model's weights in a few arrays for each of its parts.

    "matrices 0" [R, ROW], and on a CPU more of them, hold the weights of two axes or more, each
    transposed, as gradients of linear layers come; zeros fill the last row. "vectors" [n] holds
    biases, norms and mask token.
    """

    def __init__(self, parts: dict[str, Any]) -> None:
        self.shapes: dict[str, dict[str, dict[str, tuple[int, ...]]]] = {}
        most = sys.maxsize if backend.on_gpu() else MOST
        for part, tree in parts.items():
            numbers = 0
            for name, weight in dict(tree_flatten(tree)).items():
                kind = "vectors"
                if weight.ndim > 1:
                    kind = f"matrices {numbers // most}"
                    numbers += weight.size
                self.shapes.setdefault(part, {}).setdefault(kind, {})[name] = weight.shape

    def join(self, parts: dict[str, Any]) -> Flat:
        """Copy weights, a tree for each part, into the arrays."""
        joined: Flat = {}
        for part, kinds in self.shapes.items():
            if part in parts:
                weights = dict(tree_flatten(parts[part]))
                joined[part] = {
                    kind: _end_to_end([weights[name] for name in shapes], kind != "vectors")
                    for kind, shapes in kinds.items()
                }
        return joined

    def split(self, joined: Flat) -> dict[str, Any]:
        """A tree of weights for each part: views of the arrays."""
        parts = {}
        for part, arrays in joined.items():
            weights = []
            for kind, shapes in self.shapes[part].items():
                ends = list(accumulate(map(prod, shapes.values())))
                pieces = mx.split(arrays[kind].reshape(-1), ends)[:-1]  # the rest is padding
                for (name, shape), piece in zip(shapes.items(), pieces, strict=True):
                    weights.append((name, piece.reshape(shape[::-1]).T))
            parts[part] = tree_unflatten(weights)
        return parts


def _end_to_end(weights: list[mx.array], in_rows: bool) -> mx.array:
    flat = [weight.T.reshape(-1) for weight in weights]
    if not in_rows:
        return mx.concatenate(flat)
    padding = -sum(weight.size for weight in flat) % ROW
    return mx.concatenate([*flat, mx.zeros(padding, flat[0].dtype)]).reshape(-1, ROW)
