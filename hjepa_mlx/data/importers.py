"""Importers: every published layout of every data set, read once, in order, by `prepare`."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator
from functools import partial
from itertools import count
from pathlib import Path
from typing import NamedTuple

import numpy as np

from hjepa_mlx.data import imagenet
from hjepa_mlx.data.archives import opened_member
from hjepa_mlx.data.catalog import CATALOG
from hjepa_mlx.data.original import Found, Item, Original, of_files, of_images
from hjepa_mlx.data.storage import Pixels, StorageError
from hjepa_mlx.errors import HJEPAError

DEBIAN_FASHION = Path("/usr/share/datasets/fashion-mnist")
DEMO = Path(__file__).parent / "demo"
FASHION_CLASSES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag",
    "Ankle boot",
)  # fmt: skip
LARGEST_IDX = 60_000 * 32 * 32  # bytes


class Binary(NamedTuple):
    """A binary version, [N] records of three planes: its folder, and how it is laid out.

    images: the files of each split. labels: the files whose bytes are the labels from 1; without
    any, a label from 0 comes first in each record. axes: of a record's [3, ...] as [H, W, 3].
    """

    folder: str
    images: dict[str, list[str]]
    labels: dict[str, str]
    axes: tuple[int, int, int]
    classes: tuple[str, ...]


BINARY = {
    "cifar10": Binary(
        "cifar-10-batches-bin",
        {"train": [f"data_batch_{n}.bin" for n in range(1, 6)], "test": ["test_batch.bin"]},
        {},
        (1, 2, 0),
        tuple("airplane automobile bird cat deer dog frog horse ship truck".split()),
    ),
    "stl10": Binary(
        "stl10_binary",
        {"pretrain": ["unlabeled_X.bin"], "train": ["train_X.bin"], "test": ["test_X.bin"]},
        {"train": "train_y.bin", "test": "test_y.bin"},
        (2, 1, 0),  # planes are stored by columns
        tuple("airplane bird car cat deer dog horse monkey ship truck".split()),
    ),
}


def find(name: str, root: Path) -> Found | None:
    """The originals of data set `name` in `root/name` or `root`, or None; a quick look only."""
    if name.startswith("imagenet"):
        return imagenet.find(name, root)
    for place in (root / name, root, DEBIAN_FASHION):
        if name in BINARY and (where := _binary_place(name, place)):
            return Found("binary files", partial(_binary, name, where))
        files = [place / remote.name for remote in CATALOG[name].files]
        if name == "fashion-mnist" and all(path.is_file() for path in files):
            return Found("IDX files", lambda split: of_images(*fashion(place, split), files=files))
    return None


def fashion(place: Path, split: str) -> tuple[Pixels, np.ndarray, tuple[str, ...]]:
    """Images, labels and classes of Fashion-MNIST: 28×28, padded to 32×32 as the field does."""
    prefix = "t10k" if split == "test" else "train"
    images = read_idx(place / f"{prefix}-images-idx3-ubyte.gz", 3)
    labels = read_idx(place / f"{prefix}-labels-idx1-ubyte.gz", 1)
    if not 0 < len(images) == len(labels) or labels.max() >= len(FASHION_CLASSES):
        raise _apart(place)
    if max(images.shape[1:]) > 32:
        raise HJEPAError(f"The images in {place} are larger than 32x32: not Fashion-MNIST's.")
    margins = [(0, 0), *(((32 - side) // 2, (33 - side) // 2) for side in images.shape[1:])]
    pixels = Pixels(np.pad(images, margins)[..., None], str(place))
    return pixels, labels.astype(np.int64), FASHION_CLASSES


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


def _binary_place(name: str, place: Path) -> Path | None:
    """The folder that holds all files of a binary version, or else its archive."""
    kind = BINARY[name]
    names = [*sum(kind.images.values(), []), *kind.labels.values()]
    for folder in (place / kind.folder, place):
        if all((folder / file).is_file() for file in names):
            return folder
    archive = place / CATALOG[name].files[0].name
    return archive if archive.is_file() else None


def _binary(name: str, place: Path, split: str) -> Original:
    """CIFAR-10 or STL-10 in the folder or archive `place`."""
    kind, side = BINARY[name], CATALOG[name].resolution
    head, label_file = 0 if kind.labels else 1, kind.labels.get(split)
    classes = kind.classes if head or label_file else ()

    def items() -> Iterator[Item]:
        labels = iter(b"".join(_records(name, place, label_file, 1)) if label_file else b"")
        for file in kind.images[split]:
            for number, record in enumerate(_records(name, place, file, head + 3 * side * side)):
                label = record[0] if head else next(labels, 0) - 1
                if classes and label not in range(len(classes)):
                    raise _apart(place)
                planes = np.frombuffer(record, np.uint8, offset=head).reshape(3, side, side)
                read = partial(np.asarray, planes.transpose(kind.axes))
                yield Item(read, label, f"{place / file}[{number}]")
        if next(labels, None) is not None:
            raise _apart(place)

    names = [*kind.images[split], *filter(None, [label_file])]
    files = [place / file for file in names] if place.is_dir() else [place]
    return of_files(files, classes, CATALOG[name].splits[split], items, (side, side, 3))


def _records(name: str, place: Path, file: str, size: int) -> Iterator[bytes]:
    """The records of a file, `size` bytes each."""
    path, member = place / file, f"{BINARY[name].folder}/{file}"
    largest = CATALOG[name].images * size  # a longer member is not the published one
    with open(path, "rb") if place.is_dir() else opened_member(place, member, largest) as stream:
        for number in count():
            record = stream.read(size)
            if len(record) < size:
                break
            yield record
    if record:
        raise StorageError(
            f"{path} is not whole: its record {number} ends early. Delete it and download again."
        )


def _apart(place: Path) -> HJEPAError:
    return HJEPAError(f"Images and labels in {place} do not belong together.")
