"""`hjepa-mlx datasets prepare`: from published files to the prepared form (prepared.py).

Photographs become JPEGs with a short side of 256 pixels, in shards; small images stay as they are,
in one array. The result depends on the originals and the options only, not on the number of workers
or on interruptions: whole shards are recorded in the manifest and kept.
"""

from __future__ import annotations

import io
import re
import tarfile
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import PIL

from hjepa_mlx import backend
from hjepa_mlx.data import importers, prepared
from hjepa_mlx.data.catalog import look_up
from hjepa_mlx.data.images import UNREADABLE, shrunk
from hjepa_mlx.data.original import Item, Original, of_images
from hjepa_mlx.data.source import not_ready, open_sources
from hjepa_mlx.errors import HJEPAError, UsageError
from hjepa_mlx.files import (
    atomic_write,
    check_space,
    locked,
    make_folder,
    read_json,
    sha256,
    write_json,
)
from hjepa_mlx.progress import bar
from hjepa_mlx.sections import Data

LOCK = ".lock"
SIDE, QUALITY = 256, 90
IMAGE_BYTES = 45_000  # of a prepared image of 256 pixels, guessed for the check of disk space
AHEAD = 32  # images that are read and wait to be written
Advance = Callable[[int], None]
Reduced = tuple[Item, bytes, str]  # made smaller, or the reason why it is unreadable


def originals_of(name: str, root: Path, labels: str = "auto") -> dict[str, Original]:
    """The splits to prepare of a data set in `root`; `folder`: of the pictures in `root`.

    labels: of those pictures, as `data.labels`.
    Raises HJEPAError with the command that gets the data set when it is not there.
    """
    if name == "folder":
        data = Data(dir=str(root), labels=labels)
        sources = open_sources(data, splits=("train", "test"))
        return {
            split: replace(
                of_images(source.images, source.labels, source.classes, source.rows),
                bits=source.bits,
                notes=source.notes,
            )
            for split, source in sources.items()
        }
    if name == "demo":
        raise UsageError("The demo's images come with the package and need no preparation.")
    splits = look_up(name).stored_splits
    found = importers.find(name, root)
    if found is None:
        raise HJEPAError(not_ready(name, root))
    return {split: found.open(split) for split in splits}


def fingerprints(originals: dict[str, Original]) -> dict[str, str]:
    """The fingerprint of each split, as the manifest records it."""
    return {split: original.fingerprint for split, original in originals.items()}


def prepare(
    name: str,
    originals: dict[str, Original],
    folder: Path,
    side: int = SIDE,
    quality: int = QUALITY,
    workers: int | None = None,
) -> dict[str, Any]:
    """Write `originals` in the prepared form; photographs get a short side of at most `side`.

    Returns the manifest. An interrupted call goes on where it stopped; a finished one has nothing
    to do. Raises UsageError when `folder` holds something else, HJEPAError when the disk is small.
    """
    _check_classes(name, *(set(originals[split].classes) for split in ("train", "test")))
    shape, bits = originals["train"].shape, originals["train"].bits
    options = {"short_side": side, "jpeg_quality": quality, "pillow": PIL.__version__}
    plan = {
        "format": prepared.FORMAT,
        "name": name,
        **({} if shape else options | ({"bits": bits} if bits else {})),
        "classes": list(originals["train"].classes),
        "originals": fingerprints(originals),
    }
    if prepared.complete(folder):
        made = prepared.manifest(folder)
        _compare(plan, made, folder)
        return made
    make_folder(folder)
    total = sum(original.images for original in originals.values())
    with locked(folder / LOCK, str(folder)):
        each = int(np.prod(shape)) if shape else IMAGE_BYTES * min(side, 2 * SIDE) ** 2 // SIDE**2
        there = sum(path.stat().st_size for path in folder.iterdir())
        needs = f"{total:,} prepared images need about"
        advice = "Free some, or give `datasets prepare` another folder with --out."
        check_space(needs, total * each - there, folder, advice)
        splits = _begun(folder, plan)
        record = partial(write_json, folder / prepared.MANIFEST, plan | {"begun": splits})
        record()
        with bar(f"Preparing {name}", total, "images") as advance:
            for split, original in originals.items():
                if shape is None:
                    part = splits.setdefault(split, {"images": 0, "skipped": [], "files": []})
                    reduced = partial(_reduced, side, quality, bits, workers)
                    _write_shards(folder / split, original, reduced, part, record, advance)
                else:
                    splits[split] = _write_array(folder / split, original, advance)
                _check_readable(f"{name}: no {split} image", splits[split], folder)
        write_json(folder / prepared.MANIFEST, plan | {"splits": splits})
        (folder / LOCK).unlink()
    return prepared.manifest(folder)


def _check_classes(name: str, train: set[str], test: set[str]) -> None:
    """Refuse splits of a data set whose classes differ."""
    if train != test:
        only = [f"{one} for training" for one in sorted(train - test)]
        only += [f"{one} for testing" for one in sorted(test - train)]
        raise UsageError(
            f"{name}: training and test images have different classes: {len(train)} and "
            f"{len(test)}; only {', '.join(only[:3])}{', …' if len(only) > 3 else ''}."
        )


def _check_readable(none: str, part: dict[str, Any], folder: Path) -> None:
    """Refuse a split without images: "`none` can be read"."""
    if not part["images"]:
        first = "".join(f" First: {line}." for line in part["skipped"][:1])
        raise HJEPAError(
            f"{none} can be read.{first} Put whole files there, delete {folder} and run again."
        )


def _begun(folder: Path, plan: dict[str, Any]) -> dict[str, Any]:
    """The shards that an interrupted call of the same plan finished; none in an empty folder."""
    path = folder / prepared.MANIFEST
    if path.is_file():
        made = read_json(path)
        if isinstance(made, dict):
            if made.get("begun") or made.get("name") != plan["name"]:
                _compare(plan, made, folder)
            return made.get("begun", {})
    if any(not path.name.startswith(".") for path in folder.iterdir()):
        raise UsageError(f"{folder} is not empty: give a new folder with --out.")
    return {}


def _compare(plan: dict[str, Any], made: dict[str, Any], folder: Path) -> None:
    for key, value in plan.items():
        if made.get(key) != value:
            other = "other images" if key in ("originals", "classes") else f"{key}={made.get(key)}"
            raise UsageError(
                f"{folder} was prepared with {other}. Delete it, or give another --out."
            )


def _write_array(path: Path, original: Original, advance: Advance) -> dict[str, Any]:
    """Pixels and labels of the split `path`; returns its part of the manifest."""
    paths, labels = [path.with_name(f"{path.name}-images.npy")], []
    with atomic_write(paths[0]) as file:
        _write_header(file, 0, original.shape)
        for item in original.items():
            file.write(np.ascontiguousarray(item.read()).data)
            labels.append(item.label)
            advance(1)
        file.seek(0)
        _write_header(file, len(labels), original.shape)
    if original.classes:
        paths.append(path.with_name(f"{path.name}-labels.npy"))
        with atomic_write(paths[1]) as file:
            np.save(file, np.array(labels, np.int64))
    files = [{"file": p.name, "images": len(labels), "sha256": sha256(p)} for p in paths]
    return {"images": len(labels), "skipped": [], "files": files}


def _write_header(file: Any, count: int, shape: tuple[int, ...] | None) -> None:
    """Of a .npy file; numpy leaves room in it for any count."""
    header = {"descr": "|u1", "fortran_order": False, "shape": (count, *(shape or ()))}
    np.lib.format.write_array_header_1_0(file, header)


def _write_shards(
    path: Path,
    original: Original,
    reduced: Callable[[Iterator[Item]], Generator[Reduced, None, None]],
    part: dict[str, Any],
    record: Callable[[], None],
    advance: Advance,
) -> None:
    """Shards of the split `path` that are not in `part`, its part of the manifest, and `record`s.

    Each shard and its index are written whole before they are recorded.
    """
    files = part["files"]
    done = len(files) * prepared.SHARD
    advance(min(done, original.images))
    with closing(reduced(islice(original.items(), done, None))) as images:
        while first := next(images, None):
            tar = path.with_name(f"{path.name}-{len(files):05d}.tar")
            shard = chain([first], islice(images, prepared.SHARD - 1))
            numbered = enumerate(shard, len(files) * prepared.SHARD)
            count, skipped = _write_shard(tar, numbered, original.classes, advance)
            files.append({"file": tar.name, "images": count, "sha256": sha256(tar)})
            part["images"] += count
            part["skipped"] += skipped
            record()


def _reduced(
    side: int, quality: int, bits: int | None, workers: int | None, items: Iterator[Item]
) -> Generator[Reduced, None, None]:
    """The images in order, read and made smaller by threads (PIL works outside Python's lock)."""

    def reduce(item: Item) -> Reduced:
        try:
            return item, shrunk(bytes(item.read()), side, quality, bits), ""
        except UNREADABLE as error:
            return item, b"", str(error) or type(error).__name__

    pool = ThreadPoolExecutor(workers or backend.cpu_count())
    try:
        waiting = deque(pool.submit(reduce, item) for item in islice(items, AHEAD))
        while waiting:
            yield waiting.popleft().result()
            waiting.extend(pool.submit(reduce, item) for item in islice(items, 1))
    finally:
        pool.shutdown(cancel_futures=True)


def _write_shard(
    path: Path, images: Iterable[tuple[int, Reduced]], classes: tuple[str, ...], advance: Advance
) -> tuple[int, list[str]]:
    """One shard and its index; returns the number of images, and those left out with reasons."""
    rows, skipped = [], []
    with (
        atomic_write(path) as file,
        tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar,
    ):
        for number, (item, data, error) in images:
            advance(1)
            if error:
                skipped.append(f"{item.name}: {error}")
                continue
            group = classes[item.label] if classes and item.label >= 0 else "images"
            plain = re.fullmatch(r"[\w-]{1,60}", group, re.ASCII)
            info = tarfile.TarInfo(f"{group if plain else item.label}/{number:08d}.jpg")
            info.size = len(data)
            rows.append((file.tell() + tarfile.BLOCKSIZE, len(data), item.label))
            tar.addfile(info, io.BytesIO(data))
    with atomic_write(path.with_suffix(".npy")) as file:
        np.save(file, np.array(rows, prepared.ROW))
    return len(rows), skipped
