"""The target encoder follows the context encoder as an exponential moving average."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map


def update(target: nn.Module, context: nn.Module, momentum: mx.array) -> None:
    """target ← momentum·target + (1 − momentum)·context, for every weight, in place."""
    target.update(
        tree_map(
            lambda old, new: momentum * old + (1 - momentum) * new,
            target.parameters(),
            context.parameters(),
        )
    )
