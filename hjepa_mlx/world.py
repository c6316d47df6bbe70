"""The ranks of a run, one a machine or GPU, as `mlx.launch` starts them; MLX's engine joins them.

All ranks call these functions in the same order. Alone, a rank gets back what it gave.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from itertools import accumulate
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

from hjepa_mlx.errors import HJEPAError, UsageError

BACKENDS = {  # by the variable that the launcher sets
    "MLX_JACCL_COORDINATOR": "jaccl", "NCCL_HOST_IP": "nccl", "MLX_HOSTFILE": "ring",
    "OMPI_COMM_WORLD_SIZE": "mpi",
}  # fmt: skip
LONGEST = 1 << 15  # bytes of a value as JSON
_alone: list[bool] = []


def backend() -> str:
    """Which of MLX's backends joins the ranks; empty for a single one."""
    return next((name for key, name in BACKENDS.items() if os.environ.get(key)), "")


@cache
def _joined() -> tuple[int, int]:
    group = mx.distributed.init(strict=True, backend=backend()) if backend() else None
    return (group.rank(), group.size()) if group else (0, 1)


def rank() -> int:
    """This rank's number; rank 0 keeps the run's folder, and speaks."""
    return 0 if _alone else _joined()[0]


def size() -> int:
    """How many ranks there are."""
    return 1 if _alone else _joined()[1]


@contextmanager
def alone() -> Iterator[None]:
    """Inside, this rank works by itself."""
    _alone.append(True)
    try:
        yield
    finally:
        _alone.pop()


def rows(count: int) -> slice:
    """This rank's rows of `count`."""
    share = count // size()
    return slice(rank() * share, (rank() + 1) * share)


def _stream() -> Any:
    # Metal ends GPU commands that wait for seconds; NCCL computes on GPUs only
    return mx.gpu if backend() == "nccl" else mx.cpu


def _sum(array: mx.array) -> mx.array:
    mx.eval(array)
    total = mx.distributed.all_sum(array, stream=_stream())
    mx.eval(total)
    return total


def gather(x: mx.array, axis: int = 0) -> mx.array:
    """The rows of all ranks in order, for a statistic of the whole batch.

    Its gradient is that of this rank's rows, times what `average` will divide it by.
    """
    if size() == 1:
        return x
    fixed = mx.stop_gradient(x)
    x = (fixed + size() * (x - fixed)).swapaxes(0, axis)
    return mx.distributed.all_gather(x, stream=_stream()).swapaxes(0, axis)


def _by_name(tree: Any) -> list[tuple[str, Any]]:
    # an optimizer that was restored lists its keys in another order
    return sorted(dict(tree_flatten(tree)).items())


def average(tree: Any) -> Any:
    """The mean over the ranks of a tree of float32 arrays."""
    if size() == 1:
        return tree
    names, arrays = zip(*_by_name(tree), strict=True)
    mean = _sum(mx.concatenate([array.reshape(-1) for array in arrays])) / size()
    parts = mx.split(mean, list(accumulate(array.size for array in arrays))[:-1])
    shaped = (part.reshape(array.shape) for part, array in zip(parts, arrays, strict=True))
    return tree_unflatten(list(zip(names, shaped, strict=True)))


def of_rank_0(tree: Any) -> Any:
    """Rank 0's arrays."""
    own = mx.array if rank() == 0 else mx.zeros_like
    return tree_unflatten([(name, _sum(own(array))) for name, array in _by_name(tree)])


def anywhere(*wishes: bool) -> list[bool]:
    """Whether any rank wishes each of these."""
    if size() == 1:
        return [*wishes]
    return [bool(count) for count in _sum(mx.array(wishes, mx.int32))]


def values(value: Any) -> list[Any]:
    """What each rank gives, by rank; JSON can hold it."""
    if size() == 1:
        return [value]
    own = mx.array([*json.dumps(value).encode().ljust(LONGEST)], mx.uint8)
    found = mx.distributed.all_gather(own[None], stream=_stream())
    mx.eval(found)  # this raises when a rank is lost; reading the array alone would not
    return [json.loads(bytes(row)) for row in np.array(found)]


def shared_error(text: str, status: int = 1) -> HJEPAError:
    """An error that all ranks raise, and rank 0 says; status: that of the command."""
    return (UsageError if status == 2 else HJEPAError)("" if rank() else text)


@contextmanager
def together() -> Iterator[None]:
    """Whatever HJEPAError a rank meets inside, all raise."""
    error = None
    try:
        yield
    except HJEPAError as own:
        if size() == 1:
            raise
        error = own
    for number, met in enumerate(values(error and [str(error), error.exit_status])):
        if met:
            text, status = met
            raise shared_error(f"Rank {number}: {text}" if number else text, status) from error
