"""`hjepa-mlx datasets verify`: is this the data set it says it is, whole and readable?"""

from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from hjepa_mlx import backend
from hjepa_mlx.config import Data
from hjepa_mlx.data import shards
from hjepa_mlx.data.catalog import (
    CATALOG,
    CMC,
    IMAGENET,
    KAGGLE,
    KAGGLE_IMAGES,
    class_list_name,
)
from hjepa_mlx.data.fetch import CHECKSUMS, checksums
from hjepa_mlx.data.images import UNREADABLE, check_decodes
from hjepa_mlx.data.source import Source, Split
from hjepa_mlx.data.sources import check_name, data_root, open_source
from hjepa_mlx.errors import HJEPAError
from hjepa_mlx.files import sha256
from hjepa_mlx.progress import bar

NAMED = 5  # of the images that are wrong, in a report
CHUNK = 256  # images a worker takes at once


@dataclass(frozen=True)
class Check:
    """One thing that was looked at: whether it is right, and what was found."""

    what: str
    right: bool
    found: str


@dataclass
class _Split:
    """What reading every image of a split found."""

    unreadable: list[str] = field(default_factory=list)
    hashes: list[bytes] = field(default_factory=list)


def verify(data: Data) -> list[Check]:
    """Check each part of a data set: counts, checksums, classes, every image, duplicates.

    Raises HJEPAError when it is not on this machine.
    """
    checks: list[Check] = []
    for name in check_name(data):
        checks += _verify_one(name, data.whole(name))
    return checks


def _verify_one(name: str, data: Data) -> list[Check]:
    splits: list[Split] = ["pretrain", "test"]
    if name in CATALOG and CATALOG[name].splits["pretrain"] != CATALOG[name].splits["train"]:
        splits.insert(1, "train")
    checks = _files(name, data)
    sources: dict[Split, Source] = {}
    for split in splits:
        try:
            sources[split] = open_source(data, split)
        except HJEPAError as error:
            if split == "pretrain":
                raise
            checks.append(Check(f"{name} {split}", False, str(error)))
    checks += [_count(name, split, source) for split, source in sources.items()]
    if name.startswith("imagenet"):
        checks += _classes(name, sources)
    read = {split: _read_all(source) for split, source in sources.items()}
    for split, result in read.items():
        found = f"{len(result.unreadable)} of {len(sources[split])}{_named(result.unreadable)}"
        checks.append(Check(f"{name} {split}: unreadable", not result.unreadable, found))
    checks.append(_duplicates(name, sources, read))
    return checks


def _files(name: str, data: Data) -> list[Check]:
    """Checksums of what was downloaded, unpacked or prepared."""
    root = data_root(data)
    for folder in (root / name / shards.FOLDER, root / name, root / shards.FOLDER, root):
        if shards.complete(folder):
            made = shards.manifest(folder)["splits"].values()
            wanted = {shard["file"]: shard["sha256"] for split in made for shard in split["shards"]}
            return [_compare(f"{name} shards", folder, wanted)]
    for folder in (root / name, root):
        if (folder / CHECKSUMS).is_file():
            return [_compare(f"{name} files", folder, checksums(folder))]
    return []


def _compare(what: str, folder: Path, wanted: dict[str, str]) -> Check:
    with bar("Checking checksums", len(wanted), "files") as advance:
        wrong = []
        for file, digest in wanted.items():
            path = folder / file
            if not path.is_file():
                wrong.append(f"{path} is missing")
            elif sha256(path) != digest:
                wrong.append(f"{path} has changed")
            advance(1)
    found = "; ".join(wrong[:NAMED]) or f"{len(wanted)} as recorded"
    return Check(what, not wrong, found)


def _count(name: str, split: Split, source: Source) -> Check:
    found = f"{len(source):,} images"
    if source.classes:
        counts = np.bincount(source.labels, minlength=len(source.classes))
        found += f" in {len(source.classes)} classes of {counts.min():,} to {counts.max():,}"
    if name not in CATALOG:
        return Check(f"{name} {split}", True, found)
    wanted = CATALOG[name].splits[split]
    if split == "pretrain" and class_list_name(source.classes) == KAGGLE:
        wanted = KAGGLE_IMAGES
    right = len(source) == wanted
    return Check(f"{name} {split}", right, found if right else f"{found}; published: {wanted:,}")


def _classes(name: str, sources: dict[Split, Source]) -> list[Check]:
    """Which list of classes this is, and whether both splits have it."""
    classes = sources["pretrain"].classes
    which = class_list_name(classes)
    if which == KAGGLE:
        which += f": scores do not compare with those on {CMC}, which has other classes"
    known = (CMC, KAGGLE) if name == "imagenet100" else (IMAGENET,)
    checks = [Check(f"{name} classes", which.startswith(known), which)]
    if "test" in sources and sources["test"].classes != classes:
        found = f"{len(classes)} for training, {len(sources['test'].classes)} for evaluation"
        checks.append(Check(f"{name} classes of both splits", False, found))
    return checks


def _read_all(source: Source) -> _Split:
    """Decode every image and hash its content, on all cores."""
    result = _Split()

    def read(begin: int) -> list[tuple[bytes, str]]:
        return [_read(source, i) for i in range(begin, min(begin + CHUNK, len(source)))]

    workers = backend.cpu_count()
    with (
        bar(f"Reading {source.name}", len(source), "images") as advance,
        ThreadPoolExecutor(workers) as pool,
    ):
        for chunk in pool.map(read, range(0, len(source), CHUNK)):
            advance(len(chunk))
            for digest, error in chunk:
                result.hashes.append(digest)
                if error:
                    result.unreadable.append(error)
    return result


def _read(source: Source, index: int) -> tuple[bytes, str]:
    """Hash of the image's content, and what is wrong with it."""
    raw = b""
    try:
        image = source.images.read(int(source.rows[index]))
        raw = image if isinstance(image, bytes) else image.tobytes()
        if isinstance(image, bytes):
            check_decodes(image)
    except (HJEPAError, *UNREADABLE) as error:
        return b"", f"{source.name_of(index)} ({error})"
    return hashlib.blake2b(raw, digest_size=16).digest(), ""


def _duplicates(name: str, sources: dict[Split, Source], read: dict[Split, _Split]) -> Check:
    """Images of the evaluation that are also trained on, by content."""
    trained = {
        digest: (split, index)
        for split, result in read.items()
        if split != "test"
        for index, digest in enumerate(result.hashes)
        if digest
    }
    pairs = [
        f"{sources['test'].name_of(index)} is {sources[split].name_of(number)}"
        for index, digest in enumerate(read["test"].hashes if "test" in read else [])
        if digest in trained
        for split, number in [trained[digest]]
    ]
    found = f"{len(pairs)}{_named(pairs)}"
    return Check(f"{name}: evaluation images that are also trained on", not pairs, found)


def _named(items: list[str]) -> str:
    return f": {'; '.join(items[:NAMED])}" if items else ""
