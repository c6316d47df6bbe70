"""An original: one split of a data set as published, for `prepare` to read once, in order."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from hjepa_mlx.data.storage import Images


class Item(NamedTuple):
    """An image: how to read it, its label (-1: none) and its name in messages.

    `read` gives pixels [H, W, C] uint8 or the bytes of an image file; OSError or ValueError when
    only this image is unreadable.
    """

    read: Callable[[], np.ndarray | bytes]
    label: int
    name: str


@dataclass(frozen=True)
class Original:
    """A split to prepare; labels are indices of `classes`.

    images: how many, exactly or as published. files: not needed any more once it is prepared.
    shape: of each image's pixels (H, W, C); None: they are image files. bits: that 16-bit greys
    use. notes: lines about files that are left out.
    """

    classes: tuple[str, ...]
    images: int
    fingerprint: str
    items: Callable[[], Iterator[Item]]
    files: tuple[Path, ...] = ()
    shape: tuple[int, ...] | None = None
    bits: int | None = None
    notes: tuple[str, ...] = ()


class Found(NamedTuple):
    """A published data set on this machine: its layout in words, and how to open a split of it."""

    layout: str
    open: Callable[[str], Original]


def of_images(
    images: Images,
    labels: np.ndarray,
    classes: tuple[str, ...],
    rows: np.ndarray | None = None,
    files: Sequence[Path] = (),
) -> Original:
    """The images numbered `rows` of a storage (by default all); `labels` may be empty."""
    rows = np.arange(len(images)) if rows is None else rows

    def items() -> Iterator[Item]:
        for place, row in enumerate(rows.tolist()):
            label = int(labels[place]) if len(labels) else -1
            yield Item(partial(images.read, row), label, images.name(row))

    digest = hashlib.sha256(images.fingerprint().encode() + rows.tobytes() + labels.tobytes())
    first = None if images.encoded else images.read(0)
    shape = first.shape if isinstance(first, np.ndarray) else None
    return Original(classes, len(rows), digest.hexdigest(), items, tuple(files), shape)


def of_files(
    files: Sequence[Path],
    classes: tuple[str, ...],
    images: int,
    items: Callable[[], Iterator[Item]],
    shape: tuple[int, ...] | None = None,
) -> Original:
    """About `images` images that `items` reads out of `files`."""
    sizes = repr([(path.name, path.stat().st_size) for path in files])
    fingerprint = hashlib.sha256(sizes.encode()).hexdigest()
    return Original(classes, images, fingerprint, items, tuple(files), shape)
