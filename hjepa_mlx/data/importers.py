"""Importers: every published layout of every data set, read once, in order, by `prepare`."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator
from functools import partial
from itertools import chain
from math import prod
from pathlib import Path

import numpy as np

from hjepa_mlx.data import imagenet
from hjepa_mlx.data.archives import opened_member
from hjepa_mlx.data.catalog import CATALOG, Binary, Dataset
from hjepa_mlx.data.original import Found, Item, Original, of_files, of_images
from hjepa_mlx.data.storage import Pixels, StorageError
from hjepa_mlx.errors import HJEPAError

DEBIAN_FASHION = Path("/usr/share/datasets/fashion-mnist")
DEMO = Path(__file__).parent / "demo"
LARGEST_IDX = 60_000 * 32 * 32  # bytes


def find(name: str, root: Path) -> Found | None:
    """The originals of data set `name` in `root/name` or `root`, or None; a quick look only."""
    if name.startswith("imagenet"):
        return imagenet.find(name, root)
    row = CATALOG[name]
    for place in (root / name, root, DEBIAN_FASHION):
        if row.binary and (where := _binary_place(row, row.binary, place)):
            return Found("binary files", partial(_binary, row, row.binary, where))
        files = [place / remote.name for remote in row.files]
        if name == "fashion-mnist" and all(path.is_file() for path in files):
            return Found("IDX files", partial(_idx, files))
    return None


def _idx(files: list[Path], split: str) -> Original:
    return of_images(*fashion(files[0].parent, split), files=files)


def fashion(place: Path, split: str) -> tuple[Pixels, np.ndarray, tuple[str, ...]]:
    """Images, labels and classes of Fashion-MNIST: 28×28, padded to 32×32 as the field does."""
    prefix, classes = "t10k" if split == "test" else "train", CATALOG["fashion-mnist"].class_names
    images = read_idx(place / f"{prefix}-images-idx3-ubyte.gz", 3)
    labels = read_idx(place / f"{prefix}-labels-idx1-ubyte.gz", 1)
    if not 0 < len(images) == len(labels) or labels.max() >= len(classes):
        raise _apart(place)
    if max(images.shape[1:]) > 32:
        raise HJEPAError(f"The images in {place} are larger than 32x32: not Fashion-MNIST's.")
    margins = [(0, 0), *(((32 - side) // 2, (33 - side) // 2) for side in images.shape[1:])]
    pixels = Pixels(np.pad(images, margins)[..., None], str(place))
    return pixels, labels.astype(np.int64), classes


def read_idx(path: Path, axes: int) -> np.ndarray:
    """A gzipped IDX file of unsigned bytes with `axes` axes, as an array.

    Raises HJEPAError that names the file when it is not complete. No more is unpacked than the
    file's own header, and the data set, allow.
    """
    head = 4 + 4 * axes
    try:
        with gzip.open(path) as file:
            header = file.read(head)
            shape = np.frombuffer(header[4:].ljust(head - 4, b"\0"), ">u4").tolist()
            size = prod(shape) if len(header) == head else LARGEST_IDX + 1
            sound = header[:4] == bytes((0, 0, 8, axes)) and size <= LARGEST_IDX
            body = file.read(size + 1) if sound else b""
    except (OSError, EOFError, zlib.error) as error:
        raise HJEPAError(f"{path} is damaged ({error}): delete it and download again.") from error
    if not sound or len(body) != size:
        raise HJEPAError(f"{path} is not a whole IDX file: delete it and download again.")
    return np.frombuffer(body, np.uint8).reshape(shape)


def _binary_place(row: Dataset, kind: Binary, place: Path) -> Path | None:
    """The folder that holds all files of a binary version, or else its archive."""
    names = [*chain(*kind.images.values()), *kind.labels.values()]
    for folder in (place / kind.folder, place):
        if all((folder / file).is_file() for file in names):
            return folder
    archive = place / row.files[0].name
    return archive if archive.is_file() else None


def _binary(row: Dataset, kind: Binary, place: Path, split: str) -> Original:
    """CIFAR-10 or STL-10 in the folder or archive `place`."""
    shape = (3, row.resolution, row.resolution)
    head, label_file = 0 if kind.labels else 1, kind.labels.get(split)
    classes = row.class_names if head or label_file else ()

    def records(file: str, size: int) -> Iterator[bytes]:
        member, largest = f"{kind.folder}/{file}", row.images * size  # a longer one is another
        folder, whole = place.is_dir(), 2 * row.images * 3 * row.resolution**2
        inside = (place, member, largest, whole)
        with open(place / file, "rb") if folder else opened_member(*inside) as read:
            while len(record := read.read(size)) == size:
                yield record
        if record:
            raise StorageError(f"{place / file} is cut. Delete it and download again.")

    def items() -> Iterator[Item]:
        labels = iter(b"".join(records(label_file, 1)) if label_file else b"")
        for file in kind.images[split]:
            for number, record in enumerate(records(file, head + 3 * row.resolution**2)):
                label = record[0] if head else next(labels, 0) - 1
                if classes and label not in range(len(classes)):
                    raise _apart(place)
                planes = np.frombuffer(record, np.uint8, offset=head).reshape(shape)
                read = partial(np.asarray, planes.transpose(kind.axes))
                yield Item(read, label, f"{place / file}[{number}]")
        if next(labels, None) is not None:
            raise _apart(place)

    names = [*kind.images[split], *filter(None, [label_file])]
    files = [place / file for file in names] if place.is_dir() else [place]
    return of_files(files, classes, row.splits[split], items, (*shape[1:], 3))


def _apart(place: Path) -> HJEPAError:
    return HJEPAError(f"Images and labels in {place} do not belong together.")
