"""`hjepa-mlx datasets verify`: is this the data set it says it is, whole and readable?"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

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
from hjepa_mlx.data.images import UNREADABLE, Look, look_at
from hjepa_mlx.data.source import Source, Split, check_name, data_root, open_sources
from hjepa_mlx.errors import HJEPAError, counted
from hjepa_mlx.files import sha256
from hjepa_mlx.progress import bar
from hjepa_mlx.sections import Data

NAMED = 5  # of the images that are wrong, in a report
CHUNK = 256  # images a worker takes at once
NEAR_EMPTY = 5  # images of a class

# Hash of an image's content, why it cannot be read, and what it holds if it is a file
Read = tuple[bytes, str, Look | None]


@dataclass(frozen=True)
class Check:
    """One question about a data set, the answer, and whether that is right (None: a fact)."""

    what: str
    right: bool | None
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
    folder = sources["pretrain"].folder  # of loose images: training leaves unreadable ones out
    checks = _checksums(name, data)
    checks += [_count(name, split, source) for split, source in sources.items()]
    if name.startswith("imagenet"):
        checks.append(_classes(name, sources["pretrain"].classes))
    read: dict[Split, list[Read]] = {}
    for split, source in sources.items():
        read[split] = _read_all(source)
        unreadable = [error for _, error, _ in read[split] if error]
        found = f"{len(unreadable)} of {len(source)}{_named(unreadable)}"
        right: bool | None = not unreadable
        if folder and 0 < len(unreadable) < len(source):
            right, found = None, f"{found}. Training leaves them out"
        checks.append(Check(f"{name} {split}: unreadable", right, found))
    copies = _duplicates(name, sources, read)
    checks.append(replace(copies, right=copies.right or None) if folder else copies)
    return [*checks, *_facts(folder.notes, sources, read)] if folder else checks


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
    found = counted(len(source))
    if source.classes:
        counts = np.bincount(source.labels[source.labels >= 0], minlength=len(source.classes))
        found += f" in {len(source.classes)} classes of {counts.min():,} to {counts.max():,}"
    if name not in CATALOG:
        return Check(f"{name} {split}", None if len(source) else False, found)
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


def _read_all(source: Source) -> list[Read]:
    """Every image, read on all cores."""
    found = []

    def read(begin: int) -> list[Read]:
        return [_read(source, i) for i in range(begin, min(begin + CHUNK, len(source)))]

    with (
        bar(f"Reading {source.name}", len(source), "images") as advance,
        ThreadPoolExecutor(backend.cpu_count()) as pool,
    ):
        for chunk in pool.map(read, range(0, len(source), CHUNK)):
            advance(len(chunk))
            found += chunk
    return found


def _read(source: Source, index: int) -> Read:
    try:
        image = source.images.read(int(source.rows[index]))
        look = look_at(image) if isinstance(image, bytes) else None
    except (HJEPAError, *UNREADABLE) as error:
        return b"", f"{source.name_of(index)} ({error})", None
    raw = image if isinstance(image, bytes) else image.tobytes()
    return hashlib.blake2b(raw, digest_size=16).digest(), "", look


def _duplicates(name: str, sources: dict[Split, Source], read: dict[Split, list[Read]]) -> Check:
    """Test images that are also trained on, by content."""
    trained = {
        digest: (split, index)
        for split in sources
        if split != "test"
        for index, (digest, _, _) in enumerate(read[split])
    }
    pairs = [
        f"{sources['test'].name_of(index)} is {sources[split].name_of(number)}"
        for index, (digest, _, _) in enumerate(read["test"])
        if digest and digest in trained
        for split, number in [trained[digest]]
    ]
    what = f"{name}: test images that are also trained on"
    return Check(what, not pairs, f"{len(pairs)}{_named(pairs)}")


def _facts(
    notes: tuple[str, ...], sources: dict[Split, Source], read: dict[Split, list[Read]]
) -> list[Check]:
    """What a person's folder holds: formats, sizes, colour, small classes, copies; and the rest."""
    names = [sources[split].name_of(n) for split in read for n in range(len(sources[split]))]
    every = [item for items in read.values() for item in items]
    first = {digest: row for row, (digest, _, _) in reversed(list(enumerate(every)))}
    alike = [
        look.hash if look and first[digest] == row else 0
        for row, (digest, _, look) in enumerate(every)
    ]
    looks = [look for _, _, look in every if look]
    shorts = np.array([look.short for look in looks] or [0])
    longest = max((look.long / look.short for look in looks), default=0)
    low, middle, high = np.percentile(shorts, (0, 50, 100))
    classes = sources["pretrain"].classes
    labels = np.concatenate([source.labels for source in sources.values()])
    counts = np.bincount(labels[labels >= 0], minlength=len(classes))
    few = [f"{name} ({n})" for name, n in zip(classes, counts, strict=True) if n < NEAR_EMPTY]
    facts = {
        "formats": _counted(look.format for look in looks),
        "short sides": f"{low:.0f} to {high:.0f} pixels, median {middle:.0f}; the longest image is "
        f"{longest:.1f} times as long as wide",
        "colour": _counted(look.mode for look in looks),
        f"classes of fewer than {NEAR_EMPTY} images": f"{len(few)}{_named(few)}",
        "copies": _copies([digest for digest, _, _ in every], names),
        "others that look alike": _copies(alike, names),
        "note": " ".join(notes) or "nothing is left out",
    }
    return [Check(f"folder: {what}", None, found) for what, found in facts.items()]


def _counted(items: Iterable[str]) -> str:
    return ", ".join(f"{item} {count:,}" for item, count in Counter(items).most_common())


def _copies(keys: list[Any], names: list[str]) -> str:
    """How many images have the key of an earlier one; empty keys do not count."""
    first: dict[Any, str] = {}
    pairs = [
        f"{name} is like {first[key]}"
        for key, name in zip(keys, names, strict=True)
        if key and first.setdefault(key, name) != name
    ]
    return f"{len(pairs):,}{_named(pairs)}"


def _named(items: list[str]) -> str:
    return f": {'; '.join(items[:NAMED])}" if items else ""
