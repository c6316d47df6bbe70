"""A source: the images of one split of a data set, by number, with their labels."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from shlex import quote
from typing import Literal, get_args

import numpy as np

from hjepa_mlx.data import importers, prepared
from hjepa_mlx.data.catalog import CATALOG
from hjepa_mlx.data.folder import Folder, bits_of, open_folder
from hjepa_mlx.data.images import as_ppm, decodable
from hjepa_mlx.data.listing import Listing, scan
from hjepa_mlx.data.storage import Files, Images, Joined
from hjepa_mlx.errors import HJEPAError, UsageError, check_choice
from hjepa_mlx.rng import generator
from hjepa_mlx.sections import Auto, Data

# images to pretrain on; labelled images that evaluation trains on; labelled images that it tests on
Split = Literal["pretrain", "train", "test"]
SOURCES = tuple(name for name, row in CATALOG.items() if not row.parts)


@dataclass(frozen=True)
class Source:
    """Images of one split: those numbered `rows` [N] of a storage.

    `labels` [N] int64 index `classes`, -1 for none; both are empty when the data set has no
    classes. bits: that 16-bit greys use. folder: where the images come from, if from one. notes:
    lines about what was decided.
    """

    name: str
    images: Images
    rows: np.ndarray
    labels: np.ndarray
    classes: tuple[str, ...]
    bits: int | None = None
    folder: Folder | None = None
    notes: tuple[str, ...] = ()

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
            return decodable(image, self.bits)
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


def open_source(data: Data, split: Split) -> Source:
    """The images of one split of a data set; see `open_sources`."""
    check_choice("split", split, get_args(Split))
    return open_sources(data, splits=(split,))[split]


def open_sources(
    data: Data, record: Path | None = None, splits: tuple[Split, ...] = get_args(Split)
) -> dict[Split, Source]:
    """The images of a data set's splits; `data.limit` cuts those for training.

    `a+b` is both: pretraining sees both, evaluation the first. record: a run's file of the images
    of its folder. Raises HJEPAError with the command that gets or prepares a data set that is not
    ready on this machine.
    """
    names = check_name(data.name)
    if names == ["folder"] and not (data.dir and prepared.complete(data_root(data))):
        opened = open_folder(data, record)
        train, test = (_of_folder(opened, side) for side in (0, 1))
        both: dict[Split, Source] = {"pretrain": train.some(data.limit, "limit"), "test": test}
        return {split: both["test" if split == "test" else "pretrain"] for split in splits}
    return {split: _open(names, data, split) for split in splits}


def _of_folder(opened: Folder, side: int) -> Source:
    """A split of a folder. A split with a folder of its own is a storage of its own."""
    rows, paths = np.flatnonzero(opened.sides == side), opened.listing.paths
    labels = opened.labels[rows] if opened.classes else opened.labels[:0]
    root = Path(opened.listing.root, opened.tops[side])
    if opened.tops[0] != opened.tops[1]:
        paths, rows = [paths[row] for row in rows], np.arange(len(rows))
    files, of = Files(root, paths), (opened.classes, opened.bits, opened, opened.notes)
    return Source("folder", files, rows, labels, *of)


def pictures(places: Sequence[str | Path], bits: Auto | int = "auto") -> tuple[Source, Listing]:
    """All pictures in folders, list files and single files, without labels; bits: `data.bits`."""
    found = scan(places)
    source = make_source("folder", Files(Path(found.root), found.paths))
    return replace(source, bits=bits_of(found.paths) if bits == "auto" else bits), found


def _open(names: list[str], data: Data, split: Split) -> Source:
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
        check_choice("data set", one, known, "; a+b for both")
    if len(set(names)) < len(names):
        raise UsageError(f"data.name={name} names a data set twice.")
    return names


def _open_one(name: str, data: Data, split: Split) -> Source:
    if name == "demo":
        return make_source(name, *importers.fashion(importers.DEMO, split))
    root = data_root(data)
    folder = root if name == "folder" else prepared.find(name, root)
    if folder is None:
        raise HJEPAError(not_ready(name, root))
    source = make_source(name, *prepared.read(folder, split))
    if name != "folder":
        return source
    note = (
        f"data.labels={data.labels} does nothing here: {folder} is a prepared copy and keeps the "
        "labels that it was made with. For others: hjepa-mlx datasets prepare folder --labels …"
    )
    notes = () if data.labels == "auto" else (note,)
    return replace(source, bits=prepared.manifest(folder).get("bits"), notes=notes)


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
    return Path(os.path.expanduser(data.dir or os.environ.get("HJEPA_DATA") or "data"))
