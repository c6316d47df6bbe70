"""Features: what frozen encoders make of a data set's images, read once for all of them."""

from __future__ import annotations

import os
import tempfile
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from hjepa_mlx import backend
from hjepa_mlx.config import Config
from hjepa_mlx.data.pipeline import Skipped, evaluation_images
from hjepa_mlx.data.source import Source
from hjepa_mlx.errors import HJEPAError
from hjepa_mlx.eval.blocks import blocks
from hjepa_mlx.files import check_space
from hjepa_mlx.models.hjepa import HJEPA, replica
from hjepa_mlx.progress import bar

BATCH = 64 if backend.on_metal() else 16  # larger arrays page-fault on a CPU
PIXEL_SIDE = 32  # the pixel baseline looks at images reduced to about this
IN_MEMORY = 1 << 28  # bytes; a larger array is mapped to a temporary file without a name
TOKENS = "tokens_"  # before the name of a level: all its cells instead of their mean
ALL_LEVELS = "all_levels"

Outputs = dict[str, Any]  # arrays of MLX or numpy
Encoder = Callable[[np.ndarray], Outputs]  # [B, S, S, 3] uint8 to named [B, D] or [B, n, D]


@dataclass(frozen=True)
class Features:
    """What one encoder made of N images, by name, and the images' labels [N].

    by_name: [N, D] float32 (pixels: uint8). tokens: [⌈N/stride⌉, n, D] float16, of every
    `stride`-th image. indices: [N] of the images in their source; the unreadable ones are missing.
    """

    by_name: dict[str, np.ndarray]
    indices: np.ndarray
    labels: np.ndarray
    tokens: dict[str, np.ndarray]
    stride: int

    def __len__(self) -> int:
        return len(next(iter(self.by_name.values())))

    @property
    def token_labels(self) -> np.ndarray:
        """Labels of the images that have tokens."""
        return self.labels[:: self.stride]


def model_features(
    model: HJEPA, encoder: str = "target", tokens: bool = False, pooled: bool = True
) -> Encoder:
    """An encoder that gives each level's features averaged over the grid: level_0, level_1, …

    tokens: also all of a level's cells, each normalised (LayerNorm without affine), as float16.
    pooled: if not, every cell [B, n, D] instead of the average.
    """
    model = replica(model)

    def compute(images: mx.array) -> dict[str, mx.array]:
        named = {}
        for number, x in enumerate(model.encode(images, encoder)):
            named[f"level_{number}"] = x.mean(1) if pooled else x
            if tokens:
                normal = mx.fast.layer_norm(x, None, None, 1e-5)
                named[f"{TOKENS}level_{number}"] = normal.astype(mx.float16)
        return named

    compiles = backend.compiles(model.config)
    run = mx.compile(compute, inputs=[model.state]) if compiles else compute
    return lambda images: run(mx.array(images))


def pixels(images: np.ndarray) -> Outputs:
    """The pixel baseline: images [B, S, S, 3] reduced to about 32×32 whole grey levels, flat."""
    B, S = images.shape[:2]
    factor = max(1, S // PIXEL_SIDE)
    side = S // factor
    x = images[:, : side * factor, : side * factor]
    x = x.reshape(B, side, factor, side, factor, 3).mean((2, 4))
    return {"pixels": np.rint(x).astype(np.uint8).reshape(B, -1)}


def drop_equal_channels(*parts: Features) -> None:
    """Keep one channel of pixels that are all grey: the others only make the probe larger."""
    if all(
        (x[:, 0::3] == x[:, channel::3]).all()
        for f in parts
        for x in f.by_name.values()
        for channel in (1, 2)
    ):
        for f in parts:
            f.by_name["pixels"] = f.by_name["pixels"][:, ::3]


def extract(
    make_encoders: Callable[[], Sequence[Encoder]],
    source: Source,
    config: Config,
    skipped: Skipped,
    stride: int = 1,
    cropped: bool = False,
    shown: bool = True,
    parallel: bool = True,
    joined: bool = True,
) -> list[Features]:
    """Run every encoder over every readable image of `source`; one Features each, in order.

    make_encoders is called in every thread that computes. stride: tokens are kept of every
    stride-th image. cropped: look at a random crop of each image instead of its central square.
    shown: with a progress bar. parallel: in as many threads as suit the machine. joined: with all
    levels side by side as one more.
    """
    N = len(source)
    indices: list[int] = []
    kept: list[dict[str, np.ndarray]] = []
    done = 0
    images = _batches(evaluation_images(source, config, skipped, cropped), indices)
    with bar("Encoding", N, "images", shown) as advance:
        for outputs in _computed(make_encoders, images, parallel):
            kept = kept or _room_for(outputs, N, stride)
            for arrays, named in zip(kept, outputs, strict=True):
                count = _keep(arrays, named, done, stride)
            done += count
            advance(count)
    if not done:
        raise HJEPAError(f"{source.name}: none of the {N} images can be read. {skipped.first()}")
    mx.clear_cache()
    return [_features(arrays, np.array(indices), source, stride, joined) for arrays in kept]


def _batches(samples: Iterator[tuple[int, np.ndarray]], indices: list[int]) -> Iterator[np.ndarray]:
    """Batches of up to BATCH images; the images' indices are appended to `indices`."""
    batch: list[np.ndarray] = []
    for index, image in samples:
        indices.append(index)
        batch.append(image)
        if len(batch) == BATCH:
            yield np.stack(batch)
            batch.clear()
    if batch:
        yield np.stack(batch)


def _computed(
    make_encoders: Callable[[], Sequence[Encoder]],
    batches: Iterator[np.ndarray],
    parallel: bool,
) -> Iterator[list[dict[str, np.ndarray]]]:
    """Outputs of all encoders for each batch, in order."""
    local = threading.local()

    def compute(images: np.ndarray) -> list[dict[str, np.ndarray]]:
        if not hasattr(local, "encoders"):
            local.encoders = make_encoders()
        padding = np.repeat(images[-1:], BATCH - len(images), 0)
        padded = np.concatenate([images, padding])  # one shape: one compilation
        outputs = [encode(padded) for encode in local.encoders]
        mx.eval(outputs)
        return [{key: np.array(x)[: len(images)] for key, x in o.items()} for o in outputs]

    if not parallel or backend.on_metal():
        yield from map(compute, batches)
        return
    with backend.computing_threads() as threads, ThreadPoolExecutor(threads) as pool:
        pending: deque[Future] = deque()
        for batch in batches:
            pending.append(pool.submit(compute, batch))
            if len(pending) > threads:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


def _room_for(
    outputs: list[dict[str, np.ndarray]], count: int, stride: int
) -> list[dict[str, np.ndarray]]:
    """Arrays for every encoder's outputs of `count` images, shaped after those of a first batch."""
    wanted = []
    for named in outputs:
        for name, x in named.items():
            rows = -(-count // stride) if name.startswith(TOKENS) else count
            wanted.append(((rows, *x.shape[1:]), x.dtype))
    arrays = iter(room(*wanted))
    return [{name: next(arrays) for name in named} for named in outputs]


def room(*wanted: tuple[tuple[int, ...], Any]) -> list[np.ndarray]:
    """Arrays of these shapes and dtypes, to be filled.

    Large ones lie in files, so that the system can take their memory back.
    """
    sizes = [int(np.prod(shape)) * np.dtype(dtype).itemsize for shape, dtype in wanted]
    needed = sum(size for size in sizes if size > IN_MEMORY)
    advice = "Free some, set TMPDIR to a larger disk, or keep fewer tokens (eval: --token-gb)."
    check_space("Features need", needed, Path(tempfile.gettempdir()), advice)
    return [
        _mapped(shape, dtype, size) if size > IN_MEMORY else np.empty(shape, dtype)
        for (shape, dtype), size in zip(wanted, sizes, strict=True)
    ]


def _mapped(shape: tuple[int, ...], dtype: Any, size: int) -> np.ndarray:
    """An array of `size` bytes in a temporary file without a name."""
    with tempfile.TemporaryFile() as file:
        if hasattr(os, "posix_fallocate"):  # a full disk is an error here, and a crash when mapped
            os.posix_fallocate(file.fileno(), 0, size)
        return np.memmap(file, dtype, "w+", shape=shape)


def _keep(
    arrays: dict[str, np.ndarray], outputs: dict[str, np.ndarray], done: int, stride: int
) -> int:
    """Put a batch's outputs where they belong, after `done` images; the number of its images."""
    first = -done % stride  # of the batch's images that have their tokens kept
    for name, x in outputs.items():
        if name.startswith(TOKENS):
            x = x[first::stride]
            start = (done + first) // stride
        else:
            start, count = done, len(x)
        arrays[name][start : start + len(x)] = x
    return count


def _features(
    arrays: dict[str, np.ndarray], indices: np.ndarray, source: Source, stride: int, joined: bool
) -> Features:
    count = len(indices)
    by_name = {n: x[:count] for n, x in arrays.items() if not n.startswith(TOKENS)}
    tokens = {
        n.removeprefix(TOKENS): x[: -(-count // stride)]
        for n, x in arrays.items()
        if n.startswith(TOKENS)
    }
    if joined and len(by_name) > 1:
        by_name[ALL_LEVELS] = concatenated(list(by_name.values()))
    labels = source.labels[indices] if source.classes else source.labels
    return Features(by_name, indices, labels, tokens, stride)


def concatenated(levels: list[np.ndarray]) -> np.ndarray:
    """Features of all levels side by side [N, ΣD], each level's scaled to unit length.

    The cosine similarity of two images is then the mean of their similarities at each level.
    """
    N = len(levels[0])
    (joined,) = room(((N, sum(x.shape[1] for x in levels)), np.float32))
    for rows in blocks(N, 1 << 16):
        parts = [
            x[rows] / np.maximum(np.linalg.norm(x[rows], axis=1, keepdims=True), 1e-12)
            for x in levels
        ]
        joined[rows] = np.concatenate(parts, 1)
    return joined
