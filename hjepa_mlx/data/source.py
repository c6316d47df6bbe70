"""A source: the images of one split of a data set, by number, with their labels."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass, replace
from pathlib import Path
from shlex import quote
from typing import Literal, get_args

import numpy as np

from hjepa_mlx.data import importers, prepared
from hjepa_mlx.data.catalog import CATALOG
from hjepa_mlx.data.images import EXTENSIONS, as_ppm, decodable
from hjepa_mlx.data.storage import Files, Images, Joined, image_paths
from hjepa_mlx.errors import HJEPAError, UsageError, did_you_mean
from hjepa_mlx.rng import generator
from hjepa_mlx.sections import Data

# images to pretrain on; labelled images that evaluation trains on; labelled images that it tests on
Split = Literal["pretrain", "train", "test"]
SOURCES = tuple(name for name, row in CATALOG.items() if not row.parts)
TRAIN_FOLDERS = "train", "training"
TEST_FOLDERS = "val", "test", "valid", "validation", "testing"
HELD_OUT = 10  # a folder without a test split keeps every tenth image for evaluation


@dataclass(frozen=True)
class Source:
    """Images of one split: those numbered `rows` [N] of a storage.

    `labels` [N] int64 index `classes`; both are empty when the data set has no classes.
    """

    name: str
    images: Images
    rows: np.ndarray
    labels: np.ndarray
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def encoded(self) -> bool:
        """Whether `read` gives the bytes of an image file instead of pixels."""
        return self.images.encoded

    @property
    def fingerprint(self) -> str:
        """A string that other images, another order or other labels would change."""
        digest = hashlib.sha256(self.images.fingerprint().encode())
        digest.update(self.rows.tobytes() + self.labels.tobytes())
        return digest.hexdigest()

    def read(self, index: int) -> np.ndarray:
        """Image `index`; OSError or ValueError when it cannot be read.

        StorageError when the data set as a whole cannot be.
        """
        image = self.images.read(int(self.rows[index]))
        if isinstance(image, bytes):
            return decodable(image)
        if image.shape[2] == 1:
            image = np.repeat(image, 3, 2)
        return as_ppm(image) if self.encoded else np.ascontiguousarray(image)

    def name_of(self, index: int) -> str:
        """The name of image `index` in messages."""
        return self.images.name(int(self.rows[index]))

    def take(self, indices: np.ndarray) -> Source:
        """The source with only these images."""
        labels = self.labels[indices] if self.classes else self.labels
        return replace(self, rows=self.rows[indices], labels=labels)

    def some(self, count: int | None, purpose: str) -> Source:
        """`count` random images, always the same for one purpose; all where there are no more."""
        if count is None or count >= len(self):
            return self
        return self.take(np.sort(generator(0, purpose).permutation(len(self))[:count]))

    def pass_order(self, seed: int, number: int) -> np.ndarray:
        """The order of pass `number`: a permutation [N] of the images."""
        return generator(seed, "shuffle", number).permutation(len(self))


def make_source(
    name: str,
    images: Images,
    labels: np.ndarray | None = None,
    classes: tuple[str, ...] = (),
) -> Source:
    """All images of a storage."""
    labels = np.zeros(0, np.int64) if labels is None else labels.astype(np.int64)
    return Source(name, images, np.arange(len(images)), labels, classes)


def check_classes(name: str, train: tuple[str, ...], test: tuple[str, ...]) -> None:
    """Refuse the classes of two splits of data set `name` that differ."""
    if train != test:
        only = [f"{one} for training" for one in sorted({*train} - {*test})]
        only += [f"{one} for testing" for one in sorted({*test} - {*train})]
        advice = "" if train and test else " (classes are subfolders that hold every image)"
        raise UsageError(
            f"{name}: training and test images have different classes: {len(train)} and "
            f"{len(test)}{advice}; only {', '.join(only[:3])}{', …' if len(only) > 3 else ''}."
        )


def open_source(data: Data, split: Split) -> Source:
    """The images of a data set's split; `data.limit` cuts the splits for training.

    `a+b` is both: pretraining sees both, evaluation the first. Raises HJEPAError with the command
    that gets or prepares a data set that is not ready on this machine.
    """
    if split not in get_args(Split):
        raise UsageError(f"No split '{split}'. There are: {', '.join(get_args(Split))}.")
    names = check_name(data.name)
    if split != "pretrain" or len(names) == 1:
        source = _open_one(names[0], data, split)
        return source if split == "test" else source.some(data.limit, "limit")
    sources = [_open_one(name, data, split) for name in names]
    if data.limit is not None:
        total = sum(map(len, sources))
        limits = [max(1, round(data.limit * len(source) / total)) for source in sources]
        sources = [s.some(limit, "limit") for s, limit in zip(sources, limits, strict=True)]
    offsets = np.cumsum([0, *(len(source.images) for source in sources)])
    rows = [source.rows + offset for source, offset in zip(sources, offsets, strict=False)]
    joined = Joined([source.images for source in sources])
    return Source(data.name, joined, np.concatenate(rows), np.zeros(0, np.int64), ())


def check_name(name: str) -> list[str]:
    """The data sets of `a+b`; UsageError when one is unknown or comes twice."""
    names = name.split("+")
    known = SOURCES if len(names) > 1 else (*SOURCES, "folder")
    for one in names:
        if one not in known:
            raise UsageError(
                f"No data set '{one}'.{did_you_mean(one, known)} There are: {', '.join(known)}; "
                "a+b for both."
            )
    if len(set(names)) < len(names):
        raise UsageError(f"data.name={name} names a data set twice.")
    return names


def _open_one(name: str, data: Data, split: Split) -> Source:
    if name == "folder":
        if data.dir is None:
            raise UsageError("data.name=folder needs the folder of images: give --data-dir FOLDER.")
        return open_folder(Path(data.dir).expanduser(), split)
    if name == "demo":
        return make_source(name, *importers.fashion(importers.DEMO, split))
    root = data_root(data)
    folder = prepared.find(name, root)
    if folder is None:
        raise HJEPAError(not_ready(name, root))
    return make_source(name, *prepared.read(folder, split))


def layout(name: str, data: Data) -> str | None:
    """How a data set of the catalog can be trained on from this machine, in words; None: not."""
    names, root = name.split("+"), data_root(data)
    ready = all(one == "demo" or prepared.find(one, root) for one in names)
    return None if not ready else "prepared" if name != "demo" else "in the package"


def not_ready(name: str, root: Path) -> str:
    """The line that says how to get a data set, or to prepare its originals."""
    row = CATALOG[name]
    place = "" if str(root) == "data" else f" --data-dir {quote(str(root))}"
    found = importers.find(name, root)
    if found:
        return (
            f"{row.title} is here ({found.layout}), but not prepared for training. Run: "
            f"hjepa-mlx datasets prepare {name}{place}"
        )
    get = f"Get it ({row.download_gb:g} GB) with" if row.files or row.hub else "How to get it"
    return f"{row.title} is not in {root / name}. {get}: hjepa-mlx datasets download {name}{place}"


def data_root(data: Data) -> Path:
    """The folder that holds one folder per data set."""
    return Path(data.dir or os.environ.get("HJEPA_DATA") or "data").expanduser()


def open_folder(root: Path, split: Split) -> Source:
    """Any tree of images. Subfolders of the split (or of the tree) are the classes.

    With `train` and `val` (or `test` and the like, in any case) inside, those are the splits;
    otherwise every tenth image of a fixed shuffle is held out for evaluation.
    """
    if not root.is_dir():
        raise UsageError(f"The image folder {root} does not exist.")
    if prepared.complete(root):
        return make_source("folder", *prepared.read(root, split))
    folders = [path for path in root.iterdir() if not path.name.startswith(".") and path.is_dir()]
    inside = {
        path.name.lower(): path for path in sorted(folders)
    }  # where both are, train wins over Train
    train, held_out = (
        next((inside[name] for name in names if name in inside), None)
        for names in (TRAIN_FOLDERS, TEST_FOLDERS)
    )
    if train and held_out:
        return tree(held_out if split == "test" else train)
    everything = tree(train if train and folders == [train] else root)
    shuffled = generator(0, "held out").permutation(len(everything))
    tenth = np.arange(len(shuffled)) % HELD_OUT == HELD_OUT - 1
    return everything.take(np.sort(shuffled[tenth if split == "test" else ~tenth]))


def tree(root: Path) -> Source:
    """All images under `root`; its subfolders are the classes if every image lies in one."""
    paths = image_paths(root)
    if not paths:
        raise UsageError(
            f"There are no images in {root} (looked for {', '.join(sorted(EXTENSIONS))})."
        )
    start = len(os.path.join(root, ""))
    tops = [path[start:].partition(os.sep) for path in paths]
    classes = tuple(sorted({top for top, _, _ in tops}))
    if len(classes) < 2 or not all(inside for _, inside, _ in tops):
        return make_source("folder", Files(root, paths))
    number = {name: i for i, name in enumerate(classes)}
    labels = np.array([number[top] for top, _, _ in tops])
    return make_source("folder", Files(root, paths), labels, classes)
