"""Sources: where a data set's images and labels come from, found and checked before use.

A source has a length and `read(index)`, which gives an image as uint8: [H, W, 3] pixels, or, when
`encoded`, the bytes of a file.
"""

from __future__ import annotations

import difflib
import gzip
import os
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from hjepa_mlx.config import Data
from hjepa_mlx.data.download import download
from hjepa_mlx.data.images import EXTENSIONS, decodable
from hjepa_mlx.errors import HJEPAError, UsageError
from hjepa_mlx.rng import generator

Split = Literal["train", "test"]

FASHION_URL = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com"
FASHION_MD5 = {  # as published in the data set's README
    "train-images-idx3-ubyte.gz": "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
    "train-labels-idx1-ubyte.gz": "25c81989df183df01b3e8a0aad5dffbe",
    "t10k-images-idx3-ubyte.gz": "bef4ecab320f06d8554ea6380940ec79",
    "t10k-labels-idx1-ubyte.gz": "bb300cfdad3c16e7a12a480ee83cd310",
}
FASHION_CLASSES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag",
    "Ankle boot",
)  # fmt: skip
DEBIAN_FASHION = Path("/usr/share/datasets/fashion-mnist")
HELD_OUT = 10  # a folder without a test split keeps every tenth image for evaluation


@dataclass(frozen=True)
class Source:
    """Images of one split, as an array [N, H, W, C] uint8 or as paths of image files.

    `labels` [N] int64 index `classes`; both are empty when the data set has no classes.
    """

    name: str
    images: np.ndarray | list[Path]
    labels: np.ndarray
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.images)

    @property
    def encoded(self) -> bool:
        """Whether `read` gives the bytes of an image file instead of pixels."""
        return not isinstance(self.images, np.ndarray)

    def read(self, index: int) -> np.ndarray:
        """Image `index`; raises OSError, SyntaxError or ValueError when it cannot be read."""
        if not isinstance(self.images, np.ndarray):
            return decodable(self.images[index].read_bytes())
        image = self.images[index]
        return np.repeat(image, 3, 2) if image.shape[2] == 1 else image

    def label_of(self, index: int) -> str:
        """What to call image `index` in messages."""
        return str(self.images[index]) if self.encoded else f"{self.name}[{index}]"

    def take(self, indices: np.ndarray) -> Source:
        """The source with only these images."""
        if isinstance(self.images, np.ndarray):
            images: Any = self.images[indices]
        else:
            images = [self.images[i] for i in indices]
        return replace(
            self, images=images, labels=self.labels[indices] if self.classes else self.labels
        )


def open_source(data: Data, split: Split, fetch: bool = True) -> Source:
    """The images of a data set's split; `data.limit` cuts the training split.

    What is not on this machine is downloaded where that is possible, unless `fetch` is false.
    """
    if data.name not in SOURCES:
        near = difflib.get_close_matches(data.name, SOURCES, n=1)
        hint = f" Did you mean '{near[0]}'?" if near else ""
        raise UsageError(f"No data set '{data.name}'.{hint} There are: {', '.join(SOURCES)}.")
    source = SOURCES[data.name](data, split, fetch)
    if split == "train" and data.limit is not None and data.limit < len(source):
        order = generator(0, "limit").permutation(len(source))
        source = source.take(np.sort(order[: data.limit]))
    return source


def data_root(data: Data) -> Path:
    """The folder that holds one folder per data set."""
    return Path(data.dir or os.environ.get("HJEPA_DATA") or "data").expanduser()


def _demo(data: Data, split: Split, fetch: bool) -> Source:
    """5,500 + 1,000 images of Fashion-MNIST, in the package."""
    return _idx_source("demo", Path(__file__).parent / "demo", split)


def _fashion_mnist(data: Data, split: Split, fetch: bool) -> Source:
    """Fashion-MNIST (Xiao et al., arXiv 1708.07747): 60,000 + 10,000 pictures of clothes."""
    root = data_root(data)
    places = [root / "fashion-mnist", root]
    if data.dir is None:
        places.append(DEBIAN_FASHION)
    for place in places:
        if all((place / name).is_file() for name in FASHION_MD5):
            return _idx_source("fashion-mnist", place, split)
    if not fetch:
        raise HJEPAError(f"Fashion-MNIST is not in {root} yet; training downloads it (31 MB).")
    for name, md5 in FASHION_MD5.items():
        if not (places[0] / name).is_file():
            download(f"{FASHION_URL}/{name}", places[0] / name, md5)
    return _idx_source("fashion-mnist", places[0], split)


def _idx_source(name: str, place: Path, split: Split) -> Source:
    """28×28 grey images in the IDX format of MNIST, padded to 32×32 as the field does."""
    prefix = {"train": "train", "test": "t10k"}[split]
    images = read_idx(place / f"{prefix}-images-idx3-ubyte.gz", 3)
    labels = read_idx(place / f"{prefix}-labels-idx1-ubyte.gz", 1).astype(np.int64)
    if len(images) != len(labels) or labels.max(initial=0) >= len(FASHION_CLASSES):
        raise HJEPAError(f"Images and labels in {place} do not belong together ({prefix}).")
    if max(images.shape[1:]) > 32:
        raise HJEPAError(f"The images in {place} are larger than 32x32: not Fashion-MNIST's.")
    margins = [(0, 0), *(((32 - side) // 2, (33 - side) // 2) for side in images.shape[1:])]
    return Source(name, np.pad(images, margins)[..., None], labels, FASHION_CLASSES)


def read_idx(path: Path, axes: int) -> np.ndarray:
    """A gzipped IDX file of unsigned bytes with `axes` axes, as an array.

    Raises HJEPAError that names the file when it is not complete.
    """
    try:
        raw = gzip.decompress(path.read_bytes())
    except (OSError, EOFError, zlib.error) as error:
        raise HJEPAError(
            f"{path} cannot be read ({error}): delete it and download again."
        ) from error
    head = 4 + 4 * axes
    shape = np.frombuffer(raw[4:head].ljust(head - 4, b"\0"), ">u4").astype(int)
    if raw[:4] != bytes((0, 0, 8, axes)) or len(raw) != head + int(np.prod(shape)):
        raise HJEPAError(f"{path} is not a whole IDX file: delete it and download again.")
    return np.frombuffer(raw, np.uint8, offset=head).reshape(shape)


def _folder(data: Data, split: Split, fetch: bool) -> Source:
    """Any tree of images. Subfolders of the split (or of the tree) are the classes.

    With `train` and `val` (or `test`, `validation`) inside, those are the splits; otherwise every
    tenth image of a fixed shuffle is held out for evaluation.
    """
    if data.dir is None:
        raise UsageError("data.name=folder needs the folder of images: give --data-dir FOLDER.")
    root = Path(data.dir).expanduser()
    if not root.is_dir():
        raise UsageError(f"The image folder {root} does not exist.")
    held_out = next((root / n for n in ("val", "test", "validation") if (root / n).is_dir()), None)
    if held_out is not None and (root / "train").is_dir():
        return _tree(root / "train" if split == "train" else held_out)
    everything = _tree(root / "train" if (root / "train").is_dir() else root)
    shuffled = generator(0, "held out").permutation(len(everything))
    tenth = np.arange(len(shuffled)) % HELD_OUT == HELD_OUT - 1
    return everything.take(np.sort(shuffled[tenth if split == "test" else ~tenth]))


def _tree(root: Path) -> Source:
    paths = []
    for folder, _, names in os.walk(root, onerror=_raise, followlinks=True):
        paths += [
            Path(folder, name)
            for name in names
            if os.path.splitext(name)[1].lower() in EXTENSIONS and not name.startswith(".")
        ]
    if not paths:
        raise UsageError(
            f"There are no images in {root} (looked for {', '.join(sorted(EXTENSIONS))})."
        )
    paths.sort()
    tops = [path.relative_to(root).parts[0] for path in paths]
    classes = tuple(sorted(set(tops)))
    if len(classes) < 2 or any(path.parent == root for path in paths):
        return Source("folder", paths, np.zeros(0, np.int64), ())
    number = {name: i for i, name in enumerate(classes)}
    return Source("folder", paths, np.array([number[top] for top in tops]), classes)


def _raise(error: OSError) -> None:
    raise error


SOURCES: dict[str, Callable[[Data, Split, bool], Source]] = {
    "demo": _demo,
    "fashion-mnist": _fashion_mnist,
    "folder": _folder,
}
