"""Features: the outputs of frozen encoders for a data set's images, read once for all of them."""

from __future__ import annotations

import copy
import os
import tempfile
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from hjepa_mlx import backend
from hjepa_mlx.config import Config
from hjepa_mlx.data.frame import Frame
from hjepa_mlx.data.pipeline import Skipped, evaluation_images
from hjepa_mlx.data.source import Source
from hjepa_mlx.errors import HJEPAError, counted
from hjepa_mlx.eval.arrays import chunks
from hjepa_mlx.eval.rank import CHUNK
from hjepa_mlx.eval.whitening import fit
from hjepa_mlx.files import check_space
from hjepa_mlx.models.hjepa import HJEPA
from hjepa_mlx.progress import bar

BATCH = 64 if backend.on_gpu() else 16  # larger arrays page-fault on a CPU
PIXEL_SIDE = 32  # the pixel baseline looks at images reduced to about this
IN_MEMORY = 1 << 28  # bytes of an array; a larger one is mapped to a temporary file
WHITENED = "whitened"


class Encoded(NamedTuple):
    """An encoder's outputs for B images, by level: pooled [B, D] and tokens [B, cells, D]."""

    pooled: dict[str, np.ndarray]
    tokens: dict[str, np.ndarray]


Encoder = Callable[[np.ndarray], Encoded]  # of images [B, H, W, 3] uint8


@dataclass(frozen=True)
class Features:
    """One encoder's features of N images, by level, and the images' labels [N].

    pooled: [N, D] float32 (pixels: uint8). tokens: [n, cells, D] float16, of the images in rows
    `token_rows` [n]. indices: [N] of the images in their source; unreadable ones are missing.
    """

    pooled: dict[str, np.ndarray]
    tokens: dict[str, np.ndarray]
    labels: np.ndarray
    indices: np.ndarray
    token_rows: np.ndarray

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def token_labels(self) -> np.ndarray:
        """Labels [n] of the images that have tokens."""
        return self.labels[self.token_rows]


def model_features(
    model: HJEPA,
    encoder: str = "target",
    tokens: bool = False,
    pooled: bool = True,
) -> Encoder:
    """An encoder that gives each level's features averaged over the grid: level_0, level_1, …

    tokens: also all of a level's cells, each normalised (LayerNorm without affine), as float16.
    pooled: if not, every cell [B, rows, columns, D] instead of the average.
    """
    model, shape = replica(model), {} if pooled else {"grid": True}

    def compute(images: mx.array) -> tuple[dict[str, mx.array], dict[str, mx.array]]:
        levels = {f"level_{n}": x for n, x in enumerate(model.encode(images, encoder, **shape))}
        means = {name: x.mean(1) if pooled else x for name, x in levels.items()}
        cells = {
            name: mx.fast.layer_norm(x, None, None, 1e-5).astype(mx.float16)
            for name, x in levels.items()
            if tokens
        }
        return means, cells

    compiles = backend.compiles(model.config)
    run = mx.compile(compute, inputs=[model.state]) if compiles else compute

    def encode(images: np.ndarray) -> Encoded:
        outputs = run(mx.array(images))
        mx.eval(outputs)
        return Encoded(*({name: np.array(x) for name, x in part.items()} for part in outputs))

    return encode


def replica(part: Any) -> Any:
    """A module (or container) with the same arrays, held by containers of its own.

    While a compiled function is traced, the module it captures holds placeholders instead of its
    arrays: a thread that compiles needs a module that no other thread looks at.
    """
    if isinstance(part, nn.Module):
        twin = copy.copy(part)
        for name, value in part.items():
            twin[name] = replica(value)
        return twin
    return type(part)(map(replica, part)) if isinstance(part, (list, tuple)) else part


def whiten(bank: Features, queries: Features, without: str | None = None) -> None:
    """Add `whitened` to both: all levels side by side [N, ΣD], whitened by the bank's images.

    without: a level that only repeats another (see `Config.repeated`).
    """
    names = [name for name in bank.pooled if name != without]
    row = np.empty((1, sum(bank.pooled[name].shape[1] for name in names)), np.float32)
    _check_room([len(part) * row.nbytes for part in (bank, queries)])
    for part in (bank, queries):
        levels = [part.pooled[name] for name in names]
        joined = _empty(len(part), row)
        for rows in chunks(len(part), CHUNK):
            np.concatenate([x[rows] for x in levels], 1, out=joined[rows])
        part.pooled[WHITENED] = joined
    whitening = fit(bank.pooled[WHITENED])
    for part in (bank, queries):
        x = part.pooled[WHITENED]
        for rows in chunks(len(part), CHUNK):
            x[rows] = whitening(x[rows])


def pixels(images: np.ndarray) -> Encoded:
    """The pixel baseline: images [B, H, W, 3] reduced to about 32×32 whole grey levels, flat."""
    B, H, W, _ = images.shape
    factor = max(1, min(H, W) // PIXEL_SIDE)
    h, w = H // factor, W // factor
    x = images[:, : h * factor, : w * factor]
    x = x.reshape(B, h, factor, w, factor, 3).mean((2, 4))
    return Encoded({"pixels": np.rint(x).astype(np.uint8).reshape(B, -1)}, {})


def drop_equal_channels(*parts: Features) -> None:
    """Keep one channel of pixels that are all grey: the others only make the probe larger."""
    arrays = [part.pooled["pixels"] for part in parts]
    if all((x[:, 0::3] == x[:, channel::3]).all() for x in arrays for channel in (1, 2)):
        for part, x in zip(parts, arrays, strict=True):
            part.pooled["pixels"] = x[:, ::3]


def extract(
    make_encoders: Callable[[], Sequence[Encoder]],
    source: Source,
    config: Config,
    skipped: Skipped,
    keep_tokens: np.ndarray | None = None,
    frame: Frame | None = None,
    quiet: bool = False,
) -> list[Features]:
    """Run every encoder over every readable image of `source`; one Features each, in order.

    make_encoders is called in every thread that computes. keep_tokens: of which images [N], as
    booleans; None: of all. frame: the size and part of the images (see `evaluation_images`). quiet:
    in this thread only and without a progress bar.
    """
    N = len(source)
    keep_tokens = np.ones(N, bool) if keep_tokens is None else keep_tokens
    arrays: list[Encoded] = []
    done: list[int] = []
    with_tokens = 0
    samples = evaluation_images(source, config, skipped, frame)
    with bar("Encoding", N, "images", not quiet) as advance:
        for numbers, outputs in _computed(make_encoders, samples, quiet):
            arrays = arrays or _allocated(outputs, N, int(keep_tokens.sum()))
            count, kept = len(numbers), keep_tokens[numbers]
            rows = slice(len(done), len(done) + count)
            token_rows = slice(with_tokens, with_tokens + int(kept.sum()))
            for (pooled, tokens), found in zip(arrays, outputs, strict=True):
                for name, x in found.pooled.items():
                    pooled[name][rows] = x[:count]
                for name, x in found.tokens.items():
                    tokens[name][token_rows] = x[:count][kept]
            done += numbers
            with_tokens = token_rows.stop
            advance(count)
    if not done:
        raise HJEPAError(f"{source.name}: of {counted(N)}, none can be read. {skipped.first()}")
    mx.clear_cache()
    of = np.array(done)
    labels = source.labels[of] if source.classes else source.labels
    return [
        Features(
            {name: x[: len(of)] for name, x in pooled.items()},
            {name: x[:with_tokens] for name, x in tokens.items()},
            *(labels, of, np.flatnonzero(keep_tokens[of])),
        )
        for pooled, tokens in arrays
    ]


def _allocated(outputs: list[Encoded], images: int, with_tokens: int) -> list[Encoded]:
    """Arrays for the features of all images, shaped like those of one batch."""
    counts = (images, with_tokens)
    parts = [pair for made in outputs for pair in zip(counts, made, strict=True)]
    _check_room([n * x[0].nbytes for n, part in parts for x in part.values()])
    empty = iter([{name: _empty(n, x) for name, x in part.items()} for n, part in parts])
    return [Encoded(next(empty), next(empty)) for _ in outputs]


def _check_room(sizes: Sequence[int]) -> None:
    """Refuse arrays of so many bytes for which the disk has no room."""
    needed = sum(size for size in sizes if size > IN_MEMORY)
    advice = "Free some, set TMPDIR to a larger disk, or lower eval --attentive-images."
    check_space("Features need", needed, Path(tempfile.gettempdir()), advice)


def _empty(count: int, like: np.ndarray) -> np.ndarray:
    """`count` rows; many are mapped to a file without a name."""
    shape, size = (count, *like.shape[1:]), count * like[0].nbytes
    if size <= IN_MEMORY:
        return np.empty(shape, like.dtype)
    with tempfile.TemporaryFile() as file:
        if hasattr(os, "posix_fallocate"):  # a full disk is an error here, and a crash when mapped
            os.posix_fallocate(file.fileno(), 0, size)
        return np.memmap(file, like.dtype, "w+", shape=shape)


def _computed(
    make_encoders: Callable[[], Sequence[Encoder]],
    samples: Iterator[tuple[int, np.ndarray]],
    alone: bool,
) -> Iterator[tuple[list[int], list[Encoded]]]:
    """Indices of each batch in order, and all encoders' outputs of BATCH images, the last repeated.

    All batches have one shape: one compilation. alone: in this thread.
    """
    local = threading.local()
    batches = iter(lambda: list(islice(samples, BATCH)), [])

    def compute(batch: list[tuple[int, np.ndarray]]) -> tuple[list[int], list[Encoded]]:
        if not hasattr(local, "encoders"):
            local.encoders = make_encoders()
        images = [image for _, image in batch]
        padded = np.stack(images + images[-1:] * (BATCH - len(images)))
        return [index for index, _ in batch], [encode(padded) for encode in local.encoders]

    if alone or backend.on_gpu():
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
