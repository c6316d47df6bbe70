"""What ranks tell each other: rank 0's state, wishes, values, and errors that all raise.

All ranks call these functions in the same order.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_unflatten

from hjepa_mlx import world
from hjepa_mlx.errors import HJEPAError, UsageError


def of_rank_0(tree: Any) -> Any:
    """Rank 0's arrays."""
    own = mx.array if world.rank() == 0 else mx.zeros_like
    return tree_unflatten([(name, world.total(own(array))) for name, array in world.by_name(tree)])


def anywhere(*wishes: bool) -> list[bool]:
    """Whether any rank wishes each of these."""
    if world.size() == 1:
        return [*wishes]
    return [bool(count) for count in world.total(mx.array(wishes, mx.int32))]


def _gathered(rows: mx.array) -> mx.array:
    found = mx.distributed.all_gather(rows, stream=world.stream())
    mx.eval(found)  # this raises when a rank is lost; reading the array alone would not
    return found


def values(value: Any) -> list[Any]:
    """What each rank gives, by rank; JSON can hold it."""
    if world.size() == 1:
        return [value]
    own = json.dumps(value).encode()
    longest = int(_gathered(mx.array([len(own)])).max())
    found = _gathered(mx.array([[*own.ljust(longest)]], mx.uint8))
    return [json.loads(bytes(row)) for row in np.array(found)]


def shared_error(text: str, status: int = 1) -> HJEPAError:
    """An error that all ranks raise, and rank 0 says; status: that of the command."""
    return (UsageError if status == 2 else HJEPAError)("" if world.rank() else text)


@contextmanager
def together() -> Iterator[None]:
    """Whatever HJEPAError a rank meets inside, all raise."""
    error = None
    try:
        yield
    except HJEPAError as own:
        if world.size() == 1:
            raise
        error = own
    for number, met in enumerate(values(error and [str(error), error.exit_status])):
        if met:
            text, status = met
            raise shared_error(f"Rank {number}: {text}" if number else text, status) from error
