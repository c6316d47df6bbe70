"""Importers: every published layout of every data set, read once, in order, by `prepare`."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from itertools import count, repeat, zip_longest
from pathlib import Path

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
CIFAR_RECORD, STL_RECORD = 1 + 3 * 32 * 32, 3 * 96 * 96  # bytes; CIFAR-10's begins with the label
CIFAR_TRAIN = [f"data_batch_{number}.bin" for number in range(1, 6)]
CLASSES = {
    "cifar10": (
        "airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck",
    ),
    "stl10": (
        "airplane", "bird", "car", "cat", "deer", "dog", "horse", "monkey", "ship", "truck",
    ),
}  # fmt: skip
BINARY = {  # folder in the archive, and its files
    "cifar10": ("cifar-10-batches-bin", [*CIFAR_TRAIN, "test_batch.bin"]),
    "stl10": (
        "stl10_binary",
        ["unlabeled_X.bin", "train_X.bin", "train_y.bin", "test_X.bin", "test_y.bin"],
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
            return Found("IDX files", partial(_idx, place))
    return None


def _idx(place: Path, split: str) -> Original:
    files = [place / remote.name for remote in CATALOG["fashion-mnist"].files]
    return of_images(*fashion(place, split), files=files)


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
    inner, names = BINARY[name]
    for folder in (place / inner, place):
        if all((folder / file).is_file() for file in names):
            return folder
    archive = place / CATALOG[name].files[0].name
    return archive if archive.is_file() else None


def _binary(name: str, place: Path, split: str) -> Original:
    """CIFAR-10 or STL-10 in the folder or archive `place`."""
    files, items = (_cifar10 if name == "cifar10" else _stl10)(place, split)
    paths = tuple(place / file for file in files) if place.is_dir() else (place,)
    side, images = CATALOG[name].resolution, CATALOG[name].splits[split]
    classes = () if split == "pretrain" else CLASSES[name]
    return Original(classes, images, of_files(paths), items, paths, (side, side, 3))


def _cifar10(place: Path, split: str) -> tuple[list[str], Callable[[], Iterator[Item]]]:
    """Records of a label and three 32×32 planes stored by rows."""
    files = ["test_batch.bin"] if split == "test" else CIFAR_TRAIN

    def items() -> Iterator[Item]:
        for file in files:
            for record, name in _records("cifar10", place, file, CIFAR_RECORD):
                if record[0] >= 10:
                    raise _apart(place)
                pixels = record[1:].reshape(3, 32, 32).transpose(1, 2, 0)
                yield Item(partial(np.asarray, pixels), int(record[0]), name)

    return files, items


def _stl10(place: Path, split: str) -> tuple[list[str], Callable[[], Iterator[Item]]]:
    """Three 96×96 planes an image, stored by columns; labels from 1 in a file of their own."""
    stem = "unlabeled" if split == "pretrain" else split
    files = [f"{stem}_X.bin", *([] if split == "pretrain" else [f"{stem}_y.bin"])]

    def items() -> Iterator[Item]:
        images = _records("stl10", place, files[0], STL_RECORD)
        labels = [_records("stl10", place, file, 1) for file in files[1:]]
        for image, label in zip_longest(images, *labels) if labels else zip(images, repeat(None)):
            number = int(label[0][0]) - 1 if label else -1
            if image is None or (labels and number not in range(10)):
                raise _apart(place)
            pixels = image[0].reshape(3, 96, 96).transpose(2, 1, 0)
            yield Item(partial(np.asarray, pixels), number, image[1])

    return files, items


def _records(name: str, place: Path, file: str, size: int) -> Iterator[tuple[np.ndarray, str]]:
    """Records of `size` bytes, [size] uint8, and their names."""
    path, member = place / file, f"{BINARY[name][0]}/{file}"
    largest = CATALOG[name].images * size  # a longer member is not the published one
    with open(path, "rb") if place.is_dir() else opened_member(place, member, largest) as stream:
        for number in count():
            record = stream.read(size)
            if not record:
                return
            if len(record) < size:
                raise StorageError(
                    f"{path} is not whole: its record {number} ends early. Delete it and download "
                    "again."
                )
            yield np.frombuffer(record, np.uint8), f"{path}[{number}]"


def _apart(place: Path) -> HJEPAError:
    return HJEPAError(f"Images and labels in {place} do not belong together.")
