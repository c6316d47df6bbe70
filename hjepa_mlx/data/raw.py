"""Data sets published as raw pixels: Fashion-MNIST (and the demo), CIFAR-10, STL-10.

Each function takes the folders to look in and gives the split's source, or None when it is in none.
"""

from __future__ import annotations

import gzip
import zlib
from pathlib import Path

import numpy as np

from hjepa_mlx.data.catalog import CATALOG
from hjepa_mlx.data.source import Source, Split, make_source
from hjepa_mlx.data.storage import Joined, Pixels, Records
from hjepa_mlx.errors import HJEPAError

FASHION_CLASSES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag",
    "Ankle boot",
)  # fmt: skip
LARGEST_IDX = 60_000 * 32 * 32  # bytes
CIFAR_CLASSES = (
    "airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck",
)  # fmt: skip
STL_CLASSES = (
    "airplane", "bird", "car", "cat", "deer", "dog", "horse", "monkey", "ship", "truck",
)  # fmt: skip


def demo(places: list[Path], split: Split) -> Source | None:
    """5,500 + 1,000 images of Fashion-MNIST, in the package."""
    return _idx_source("demo", Path(__file__).parent / "demo", split)


def fashion_mnist(places: list[Path], split: Split) -> Source | None:
    """Fashion-MNIST (Xiao et al., arXiv 1708.07747): 60,000 + 10,000 pictures of clothes."""
    for place in places:
        if all((place / remote.name).is_file() for remote in CATALOG["fashion-mnist"].files):
            return _idx_source("fashion-mnist", place, split)
    return None


def _idx_source(name: str, place: Path, split: Split) -> Source:
    """28×28 grey images in the IDX format of MNIST, padded to 32×32 as the field does."""
    prefix = "t10k" if split == "test" else "train"
    images = read_idx(place / f"{prefix}-images-idx3-ubyte.gz", 3)
    labels = read_idx(place / f"{prefix}-labels-idx1-ubyte.gz", 1)
    if len(images) != len(labels) or labels.max(initial=0) >= len(FASHION_CLASSES):
        raise HJEPAError(f"Images and labels in {place} do not belong together ({prefix}).")
    if max(images.shape[1:]) > 32:
        raise HJEPAError(f"The images in {place} are larger than 32x32: not Fashion-MNIST's.")
    margins = [(0, 0), *(((32 - side) // 2, (33 - side) // 2) for side in images.shape[1:])]
    pixels = Pixels(np.pad(images, margins)[..., None], name)
    return make_source(name, pixels, labels, FASHION_CLASSES)


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


def cifar10(places: list[Path], split: Split) -> Source | None:
    """CIFAR-10's binary version: records of a label and three 32×32 planes stored by rows."""
    names = ["test_batch.bin"]
    if split != "test":
        names = [f"data_batch_{number}.bin" for number in range(1, 6)]
    place = _holding(places, "cifar-10-batches-bin", names)
    if place is None:
        return None
    batches = [Records(place / name, 32, (1, 2, 0), header=1) for name in names]
    images, labels = Joined(batches), np.concatenate([b.headers()[:, 0] for b in batches])
    _check_labels(labels, len(images), len(CIFAR_CLASSES), place)
    return make_source("cifar10", images, labels, CIFAR_CLASSES)


def stl10(places: list[Path], split: Split) -> Source | None:
    """STL-10's binary version: three 96×96 planes an image, stored by columns; labels from 1."""
    stem = {"pretrain": "unlabeled", "train": "train", "test": "test"}[split]
    names = [f"{stem}_X.bin"] if split == "pretrain" else [f"{stem}_X.bin", f"{stem}_y.bin"]
    place = _holding(places, "stl10_binary", names)
    if place is None:
        return None
    images = Records(place / names[0], 96, (2, 1, 0))
    if split == "pretrain":
        return make_source("stl10", images)
    labels = np.fromfile(place / names[1], np.uint8).astype(np.int64) - 1
    _check_labels(labels, len(images), len(STL_CLASSES), place)
    return make_source("stl10", images, labels, STL_CLASSES)


def _holding(places: list[Path], inner: str, names: list[str]) -> Path | None:
    candidates = [folder for place in places for folder in (place / inner, place)]
    return next((c for c in candidates if all((c / name).is_file() for name in names)), None)


def _check_labels(labels: np.ndarray, images: int, classes: int, place: Path) -> None:
    if len(labels) != images or labels.min(initial=0) < 0 or labels.max(initial=0) >= classes:
        raise HJEPAError(
            f"Images and labels in {place} do not belong together: {images} images, {len(labels)} "
            f"labels from {labels.min(initial=0)} to {labels.max(initial=0)}."
        )
