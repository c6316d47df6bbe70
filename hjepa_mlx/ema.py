"""The target encoder follows the context encoder as an exponential moving average."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
from mlx.utils import tree_map


def update(target: Any, context: Any, momentum: mx.array) -> Any:
    """momentum·target + (1 − momentum)·context, for every weight of two equal trees."""
    return tree_map(lambda old, new: momentum * old + (1 - momentum) * new, target, context)
