"""The ranks of a run, one a machine or GPU, as `mlx.launch` starts them; MLX's engine joins them.

All ranks call these functions in the same order. Alone, a rank gets back what it gave.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from itertools import accumulate
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten, tree_unflatten

BACKENDS = {  # by the variable that the launcher sets
    "MLX_JACCL_COORDINATOR": "jaccl", "NCCL_HOST_IP": "nccl", "MLX_HOSTFILE": "ring",
    "OMPI_COMM_WORLD_SIZE": "mpi",
}  # fmt: skip
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


def stream() -> Any:
    """Where ranks talk: Metal ends GPU commands that wait for seconds; NCCL computes on GPUs."""
    return mx.gpu if backend() == "nccl" else mx.cpu


def total(array: mx.array) -> mx.array:
    """The sum over the ranks."""
    mx.eval(array)
    found = mx.distributed.all_sum(array, stream=stream())
    mx.eval(found)
    return found


def gather(x: mx.array, axis: int = 0) -> mx.array:
    """The rows of all ranks in order, for a statistic of the whole batch.

    Its gradient is that of this rank's rows, times what `average` will divide it by.
    """
    if size() == 1:
        return x
    fixed = mx.stop_gradient(x)
    own = (fixed + size() * (x - fixed)).swapaxes(0, axis)
    return mx.distributed.all_gather(own, stream=stream()).swapaxes(0, axis)


def by_name(tree: Any) -> list[tuple[str, Any]]:
    """A tree's arrays in one order: an optimizer that was restored lists its keys in another."""
    return sorted(dict(tree_flatten(tree)).items())


def average(tree: Any) -> Any:
    """The mean over the ranks of a tree of float32 arrays."""
    if size() == 1:
        return tree
    own = by_name(tree)
    mean = total(mx.concatenate([x.reshape(-1) for _, x in own])) / size()
    parts = mx.split(mean, list(accumulate(x.size for _, x in own))[:-1])
    return tree_unflatten([(k, p.reshape(x.shape)) for (k, x), p in zip(own, parts, strict=True)])
