"""Importers: every published layout of every data set, read once, in order, by `prepare`."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import partial
from itertools import count, repeat
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np

from hjepa_mlx.data import imagenet
from hjepa_mlx.data.archives import opened_member
from hjepa_mlx.data.catalog import CATALOG
from hjepa_mlx.data.original import Item, Original, of_files, of_images
from hjepa_mlx.data.storage import Pixels, StorageError
from hjepa_mlx.errors import HJEPAError

DEBIAN_FASHION = Path("/usr/share/datasets/fashion-mnist")
DEMO = Path(__file__).parent / "demo"
FASHION_CLASSES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag",
    "Ankle boot",
)  # fmt: skip
LARGEST_IDX = 60_000 * 32 * 32  # bytes
CIFAR_CLASSES = (
    "airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck",
)  # fmt: skip
CIFAR_RECORD, STL_RECORD = 1 + 3 * 32 * 32, 3 * 96 * 96  # bytes; CIFAR-10's begins with the label
CIFAR_TRAIN = [f"data_batch_{number}.bin" for number in range(1, 6)]
STL_CLASSES = (
    "airplane", "bird", "car", "cat", "deer", "dog", "horse", "monkey", "ship", "truck",
)  # fmt: skip
BINARY = {  # folder in the archive; its files, and the most bytes that each may have
    "cifar10": (
        "cifar-10-batches-bin",
        dict.fromkeys([*CIFAR_TRAIN, "test_batch.bin"], 10_000 * CIFAR_RECORD),
    ),
    "stl10": (
        "stl10_binary",
        {
            "unlabeled_X.bin": 100_000 * STL_RECORD,
            "train_X.bin": 5_000 * STL_RECORD,
            "train_y.bin": 5_000,
            "test_X.bin": 8_000 * STL_RECORD,
            "test_y.bin": 8_000,
        },
    ),
}


Items = Callable[[], Iterator[Item]]


class Found(NamedTuple):
    """A published data set on this machine: its layout in words, and how to open a split of it."""

    layout: str
    open: Callable[[str], Original]


def find(name: str, root: Path) -> Found | None:
    """The originals of data set `name` in `root/name` or `root`, or None; a quick look only."""
    if name.startswith("imagenet"):
        found = imagenet.find(name, root)
        return found and Found(*found)
    for place in (root / name, root, DEBIAN_FASHION):
        if name in BINARY and (where := _binary(name, place)):
            return Found("binary files", partial(_cifar10 if name == "cifar10" else _stl10, where))
        files = [place / remote.name for remote in CATALOG[name].files]
        if name == "fashion-mnist" and all(path.is_file() for path in files):
            return Found("IDX files", partial(idx, place))
    return None


def idx(place: Path, split: str) -> Original:
    """28×28 grey images in the IDX format of MNIST, padded to 32×32 as the field does."""
    prefix = "t10k" if split == "test" else "train"
    paths = [place / f"{prefix}-images-idx3-ubyte.gz", place / f"{prefix}-labels-idx1-ubyte.gz"]
    images, labels = read_idx(paths[0], 3), read_idx(paths[1], 1)
    if len(images) != len(labels) or labels.max(initial=0) >= len(FASHION_CLASSES):
        raise _apart(place)
    if max(images.shape[1:]) > 32:
        raise HJEPAError(f"The images in {place} are larger than 32x32: not Fashion-MNIST's.")
    margins = [(0, 0), *(((32 - side) // 2, (33 - side) // 2) for side in images.shape[1:])]
    pixels = Pixels(np.pad(images, margins)[..., None], str(paths[0]))
    return of_images(pixels, labels.astype(np.int64), FASHION_CLASSES, files=paths)


def read_idx(path: Path, axes: int) -> np.ndarray:
    """A gzipped IDX file of unsigned bytes with `axes` axes, as an array.

    Raises HJEPAError that names the file when it is not complete. No more is unpacked than the
    file's own header, and the data set, allow.
    """
    head = 4 + 4 * axes
    try:
        with gzip.open(path) as file:
            header = file.read(head)
            shape = np.frombuffer(header[4:].ljust(head - 4, b"\0"), ">u4").astype(int)
            size = int(np.prod(shape))
            sound = len(header) == head and header[:4] == bytes((0, 0, 8, axes))
            sound &= size <= LARGEST_IDX
            body = file.read(size + 1) if sound else b""
    except (OSError, EOFError, zlib.error) as error:
        raise HJEPAError(
            f"{path} cannot be read ({error}): delete it and download again."
        ) from error
    if not sound or len(body) != size:
        raise HJEPAError(f"{path} is not a whole IDX file: delete it and download again.")
    return np.frombuffer(body, np.uint8).reshape(shape)


class _Binary(NamedTuple):
    """The files of a binary version: in the folder `place`, or in the archive `place`."""

    name: str
    place: Path

    def original(
        self, split: str, names: list[str], classes: tuple[str, ...], items: Items
    ) -> Original:
        paths = (self.place / name for name in names) if self.place.is_dir() else (self.place,)
        files = tuple(paths)
        images, side = CATALOG[self.name].splits[split], CATALOG[self.name].resolution
        return Original(classes, images, of_files(files), items, files, (side, side, 3))

    def records(self, name: str, size: int) -> Iterator[tuple[np.ndarray, str]]:
        """Records of `size` bytes of a file, [size] uint8, and their names."""
        with self._opened(name) as file:
            for number in count():
                record = file.read(size)
                if not record:
                    return
                if len(record) < size:
                    raise StorageError(
                        f"{self.place}: {name} is not whole, its record {number} ends early. "
                        "Delete it and download again."
                    )
                yield np.frombuffer(record, np.uint8), f"{self.place}:{name}[{number}]"

    def _opened(self, name: str) -> AbstractContextManager[IO[bytes]]:
        folder, files = BINARY[self.name]
        if self.place.is_dir():
            return open(self.place / name, "rb")
        return opened_member(self.place, f"{folder}/{name}", files[name])


def _binary(name: str, place: Path) -> _Binary | None:
    inner, names = BINARY[name]
    for folder in (place / inner, place):
        if all((folder / file).is_file() for file in names):
            return _Binary(name, folder)
    archive = place / CATALOG[name].files[0].name
    return _Binary(name, archive) if archive.is_file() else None


def _cifar10(binary: _Binary, split: str) -> Original:
    """CIFAR-10's binary version: records of a label and three 32×32 planes stored by rows."""
    names = ["test_batch.bin"] if split == "test" else CIFAR_TRAIN

    def items() -> Iterator[Item]:
        for file in names:
            for record, name in binary.records(file, CIFAR_RECORD):
                if record[0] >= len(CIFAR_CLASSES):
                    raise _apart(binary.place)
                pixels = record[1:].reshape(3, 32, 32).transpose(1, 2, 0)
                yield Item(partial(np.asarray, pixels), int(record[0]), name)

    return binary.original(split, names, CIFAR_CLASSES, items)


def _stl10(binary: _Binary, split: str) -> Original:
    """STL-10's binary version: three 96×96 planes an image, stored by columns; labels from 1."""
    stem = "unlabeled" if split == "pretrain" else split
    names = [f"{stem}_X.bin"] if split == "pretrain" else [f"{stem}_X.bin", f"{stem}_y.bin"]

    def items() -> Iterator[Item]:
        labels = repeat(-1)
        if split != "pretrain":
            labels = iter([int(byte[0]) - 1 for byte, _ in binary.records(names[1], 1)])
        for record, name in binary.records(names[0], STL_RECORD):
            label = next(labels, -2)
            if not (-1 if split == "pretrain" else 0) <= label < len(STL_CLASSES):
                raise _apart(binary.place)
            pixels = record.reshape(3, 96, 96).transpose(2, 1, 0)
            yield Item(partial(np.asarray, pixels), label, name)
        if split != "pretrain" and next(labels, None) is not None:
            raise _apart(binary.place)

    return binary.original(split, names, STL_CLASSES if split != "pretrain" else (), items)


def _apart(place: Path) -> HJEPAError:
    return HJEPAError(f"Images and labels in {place} do not belong together.")
