"""Weights in long arrays, so that an update takes a few kernels instead of many a weight."""

from __future__ import annotations

import sys
from collections import Counter
from itertools import accumulate
from math import prod
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten, tree_unflatten

from hjepa_mlx import backend
from hjepa_mlx.optimizer import of_block

# By part of the model, then "vectors", "matrices 0", "stack 384x1536 0", …
Flat = dict[str, dict[str, mx.array]]
ROW = 1024  # matrices are summed row by row: on a CPU a long float32 sum loses digits
# About so many numbers are in an array of matrices on a CPU. An update makes its arrays anew, one
# after the other: if they are short, it needs little memory beside the old ones, and finds it in
# the cache.
MOST = 1_000_000


class Layout:
    """The places of a model's weights in a few arrays for each of its parts.

    "matrices 0" [R, ROW], and on a CPU more of them, hold the weights of two axes or more, each
    transposed, as gradients of linear layers come; zeros fill the last row. "vectors" [n] holds
    biases, norms and mask token. With `stacked`, the matrices of transformer blocks are in stacks
    of equal ones instead, "stack OUTxIN 0" [n, in, out] and so on.
    """

    def __init__(self, parts: dict[str, Any], stacked: bool = False) -> None:
        self.shapes: dict[str, dict[str, dict[str, tuple[int, ...]]]] = {}
        most = sys.maxsize if backend.on_gpu() else MOST
        for part, tree in parts.items():
            numbers: Counter[str] = Counter()
            for name, weight in dict(tree_flatten(tree)).items():
                kind = "vectors"
                if weight.ndim > 1:
                    apart = stacked and of_block(name, weight)
                    kind = "stack {}x{}".format(*weight.shape) if apart else "matrices"
                    numbers[kind] += weight.size
                    kind += f" {(numbers[kind] - weight.size) // most}"
                self.shapes.setdefault(part, {}).setdefault(kind, {})[name] = weight.shape

    def join(self, parts: dict[str, Any]) -> Flat:
        """Copy weights, a tree for each part, into the arrays; an array without any is left out."""
        joined: Flat = {}
        for part, kinds in self.shapes.items():
            if part in parts:
                weights = dict(tree_flatten(parts[part]))
                joined[part] = {
                    kind: _joined(kind, [weights[name] for name in shapes])
                    for kind, shapes in kinds.items()
                    if shapes.keys() & weights.keys()
                }
        return joined

    def split(self, joined: Flat) -> dict[str, Any]:
        """A tree of weights for each part: views of the arrays."""
        parts = {}
        for part, arrays in joined.items():
            weights = []
            for kind, array in arrays.items():
                shapes = self.shapes[part][kind]
                ends = list(accumulate(map(prod, shapes.values())))
                pieces = mx.split(array.reshape(-1), ends)[:-1]  # the rest is padding
                for (name, shape), piece in zip(shapes.items(), pieces, strict=True):
                    weights.append((name, piece.reshape(shape[::-1]).T))
            parts[part] = tree_unflatten(weights)
        return parts


def _joined(kind: str, weights: list[mx.array]) -> mx.array:
    if kind.startswith("stack"):
        return mx.stack([weight.T for weight in weights])
    flat = [weight.T.reshape(-1) for weight in weights]
    if kind == "vectors":
        return mx.concatenate(flat)
    padding = -sum(weight.size for weight in flat) % ROW
    return mx.concatenate([*flat, mx.zeros(padding, flat[0].dtype)]).reshape(-1, ROW)
