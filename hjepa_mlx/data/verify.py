"""`hjepa-mlx datasets verify`: is this the data set it says it is, whole and readable?"""

from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from hjepa_mlx import backend
from hjepa_mlx.data import prepared
from hjepa_mlx.data.catalog import (
    CATALOG,
    CMC,
    IMAGENET,
    KAGGLE,
    KAGGLE_IMAGES,
    class_list_name,
)
from hjepa_mlx.data.images import UNREADABLE, check_decodes
from hjepa_mlx.data.source import Source, Split, check_name, data_root, open_sources
from hjepa_mlx.errors import HJEPAError
from hjepa_mlx.files import sha256
from hjepa_mlx.progress import bar
from hjepa_mlx.sections import Data

NAMED = 5  # of the images that are wrong, in a report
CHUNK = 256  # images a worker takes at once


@dataclass(frozen=True)
class Check:
    """One question about a data set, the answer, and whether that is right."""

    what: str
    right: bool
    found: str


def verify(data: Data) -> list[Check]:
    """Check each part of a data set: counts, checksums, classes, every image, duplicates.

    Raises HJEPAError when it is not ready on this machine.
    """
    return [check for name in check_name(data.name) for check in _one(name, data.whole(name))]


def _one(name: str, data: Data) -> list[Check]:
    splits: list[Split] = ["pretrain", "test"]
    if name in CATALOG and "pretrain" in CATALOG[name].stored_splits:
        splits.insert(1, "train")
    sources = open_sources(data, splits=tuple(splits))
    checks = _checksums(name, data)
    checks += [_count(name, split, source) for split, source in sources.items()]
    if name.startswith("imagenet"):
        checks.append(_classes(name, sources["pretrain"].classes))
    digests: dict[Split, list[bytes]] = {}
    for split, source in sources.items():
        digests[split], unreadable = _read_all(source)
        found = f"{len(unreadable)} of {len(source)}{_named(unreadable)}"
        checks.append(Check(f"{name} {split}: unreadable", not unreadable, found))
    return [*checks, _duplicates(name, sources, digests)]


def _checksums(name: str, data: Data) -> list[Check]:
    root = data_root(data)
    folder = root if name == "folder" else prepared.find(name, root)
    if folder is None or not prepared.complete(folder):
        return []
    splits = prepared.manifest(folder)["splits"].values()
    files = [file for split in splits for file in split["files"]]
    wrong = []
    with bar("Checking checksums", len(files), "files") as advance:
        for file in files:
            if sha256(folder / file["file"]) != file["sha256"]:
                wrong.append(f"{folder / file['file']} has changed")
            advance(1)
    found = "; ".join(wrong[:NAMED]) or f"{len(files)} as recorded"
    return [Check(f"{name} files", not wrong, found)]


def _count(name: str, split: Split, source: Source) -> Check:
    found = f"{len(source):,} images"
    if source.classes:
        counts = np.bincount(source.labels[source.labels >= 0], minlength=len(source.classes))
        found += f" in {len(source.classes)} classes of {counts.min():,} to {counts.max():,}"
    if name not in CATALOG:
        return Check(f"{name} {split}", True, found)
    wanted = CATALOG[name].splits[split]
    if split == "pretrain" and class_list_name(source.classes) == KAGGLE:
        wanted = KAGGLE_IMAGES
    right = len(source) == wanted
    return Check(f"{name} {split}", right, found if right else f"{found}; published: {wanted:,}")


def _classes(name: str, classes: tuple[str, ...]) -> Check:
    """Which list of classes this is."""
    which = class_list_name(classes)
    if which == KAGGLE:
        which += f": scores do not compare with those on {CMC}, which has other classes"
    known = (CMC, KAGGLE) if name == "imagenet100" else (IMAGENET,)
    return Check(f"{name} classes", which.startswith(known), which)


def _read_all(source: Source) -> tuple[list[bytes], list[str]]:
    """A hash of each image's content, and which images cannot be read; on all cores."""
    digests, unreadable = [], []

    def read(begin: int) -> list[tuple[bytes, str]]:
        return [_read(source, i) for i in range(begin, min(begin + CHUNK, len(source)))]

    with (
        bar(f"Reading {source.name}", len(source), "images") as advance,
        ThreadPoolExecutor(backend.cpu_count()) as pool,
    ):
        for chunk in pool.map(read, range(0, len(source), CHUNK)):
            advance(len(chunk))
            digests += [digest for digest, _ in chunk]
            unreadable += [error for _, error in chunk if error]
    return digests, unreadable


def _read(source: Source, index: int) -> tuple[bytes, str]:
    """Hash of the image's content, and why it cannot be read."""
    try:
        image = source.images.read(int(source.rows[index]))
        if isinstance(image, bytes):
            check_decodes(image)
    except (HJEPAError, *UNREADABLE) as error:
        return b"", f"{source.name_of(index)} ({error})"
    raw = image if isinstance(image, bytes) else image.tobytes()
    return hashlib.blake2b(raw, digest_size=16).digest(), ""


def _duplicates(
    name: str, sources: dict[Split, Source], digests: dict[Split, list[bytes]]
) -> Check:
    """Test images that are also trained on, by content."""
    trained = {
        digest: (split, index)
        for split in sources
        if split != "test"
        for index, digest in enumerate(digests[split])
    }
    pairs = [
        f"{sources['test'].name_of(index)} is {sources[split].name_of(number)}"
        for index, digest in enumerate(digests["test"])
        if digest and digest in trained
        for split, number in [trained[digest]]
    ]
    what = f"{name}: test images that are also trained on"
    return Check(what, not pairs, f"{len(pairs)}{_named(pairs)}")


def _named(items: list[str]) -> str:
    return f": {'; '.join(items[:NAMED])}" if items else ""
