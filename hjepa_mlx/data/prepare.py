"""`hjepa-mlx datasets prepare`: from published files to the prepared form (prepared.py).

Photographs become JPEGs with a short side of 256 pixels, in shards; small images stay as they are,
in one array. The result depends on the originals and the options only, not on the number of workers
or on interruptions: a shard that is whole is kept.
"""

from __future__ import annotations

import io
import json
import re
import tarfile
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
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
from hjepa_mlx.data.source import check_classes, not_ready, open_folder
from hjepa_mlx.errors import HJEPAError, UsageError
from hjepa_mlx.files import atomic_write, check_space, locked, sha256, write_json
from hjepa_mlx.progress import bar

LOCK = ".lock"
RECORDS = "*-[0-9]*.json"  # one a shard, until the manifest is written
SIDE, QUALITY = 256, 90
IMAGE_BYTES = 45_000  # of a prepared image of 256 pixels, guessed for the check of disk space
AHEAD = 512  # images that are read and wait to be written
Advance = Callable[[int], None]
Reduced = tuple[Item, bytes, str]  # made smaller, or the reason why it is unreadable


def originals_of(name: str, root: Path) -> dict[str, Original]:
    """The splits to prepare of a data set in `root`; `folder`: of the pictures in `root`.

    Raises HJEPAError with the command that gets the data set when it is not there.
    """
    if name == "folder":
        folders = {split: open_folder(root, split) for split in ("train", "test")}
        return {
            split: of_images(source.images, source.labels, source.classes, source.rows)
            for split, source in folders.items()
        }
    if name == "demo":
        raise UsageError("The demo's images come with the package and need no preparation.")
    splits = look_up(name).stored_splits
    found = importers.find(name, root)
    if found is None:
        raise HJEPAError(not_ready(name, root))
    return {split: found.open(split) for split in splits}


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
    check_classes(name, originals["train"].classes, originals["test"].classes)
    encoded = originals["train"].shape is None
    options = {"short_side": side, "jpeg_quality": quality, "pillow": PIL.__version__}
    plan = {
        "format": prepared.FORMAT,
        "name": name,
        **(options if encoded else {}),
        "classes": list(originals["train"].classes),
        "originals": {split: original.fingerprint for split, original in originals.items()},
    }
    if prepared.complete(folder):
        _compare(plan, prepared.manifest(folder), folder)
        return prepared.manifest(folder)
    write = partial(_write_shards, side, quality, workers) if encoded else _write_array
    total = sum(original.images for original in originals.values())
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder / LOCK, str(folder)):
        _check_space(folder, originals, side)
        _begin(folder, plan)
        with bar(f"Preparing {name}", total, "images") as advance:
            splits = {s: write(folder / s, original, advance) for s, original in originals.items()}
        write_json(folder / prepared.MANIFEST, plan | {"splits": splits})
        for left in (*folder.glob(RECORDS), folder / LOCK):
            left.unlink()
    return prepared.manifest(folder)


def _begin(folder: Path, plan: dict[str, Any]) -> None:
    """Go on with an interrupted call of the same plan, or start in an empty folder.

    Until everything is written, the manifest is the plan.
    """
    path = folder / prepared.MANIFEST
    if path.is_file():
        begun = json.loads(path.read_text())
        if any(folder.glob(RECORDS)) or begun.get("name") != plan["name"]:
            _compare(plan, begun, folder)
    elif any(not path.name.startswith(".") for path in folder.iterdir()):
        raise UsageError(f"{folder} is not empty: give a new folder with --out.")
    write_json(path, plan)


def _compare(plan: dict[str, Any], made: dict[str, Any], folder: Path) -> None:
    for key, value in plan.items():
        if made.get(key) != value:
            other = "other images" if key in ("originals", "classes") else f"{key}={made.get(key)}"
            raise UsageError(
                f"{folder} was prepared with {other}. Delete it, or give another folder with --out."
            )


def _check_space(folder: Path, originals: dict[str, Original], side: int) -> None:
    photo = IMAGE_BYTES * min(side, 2 * SIDE) ** 2 // SIDE**2
    sizes = [o.images * (int(np.prod(o.shape)) if o.shape else photo) for o in originals.values()]
    there = sum(path.stat().st_size for path in folder.iterdir())
    needs = f"{sum(o.images for o in originals.values()):,} prepared images need about"
    advice = "Free some, or give another folder with --out."
    check_space(needs, sum(sizes) - there, folder, advice)


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
    side: int, quality: int, workers: int | None, path: Path, original: Original, advance: Advance
) -> dict[str, Any]:
    """Shards of the split `path` that are not there yet; returns its part of the manifest."""
    made: list[dict[str, Any]] = []
    tar = path.with_name(f"{path.name}-00000.tar")
    while all(tar.with_suffix(kind).is_file() for kind in (".tar", ".npy", ".json")):
        made.append(json.loads(tar.with_suffix(".json").read_text()))
        tar = path.with_name(f"{path.name}-{len(made):05d}.tar")
    items = original.items()
    for _ in islice(items, len(made) * prepared.SHARD):
        advance(1)
    with closing(_reduced(items, side, quality, workers)) as images:
        while first := next(images, None):
            tar = path.with_name(f"{path.name}-{len(made):05d}.tar")
            shard = chain([first], islice(images, prepared.SHARD - 1))
            number = len(made) * prepared.SHARD
            made.append(_write_shard(tar, enumerate(shard, number), original.classes, advance))
    skipped = [line for shard in made for line in shard.pop("skipped")]
    return {"images": sum(shard["images"] for shard in made), "skipped": skipped, "files": made}


def _reduced(
    items: Iterator[Item], side: int, quality: int, workers: int | None
) -> Generator[Reduced, None, None]:
    """The images in order, read and made smaller by threads (PIL works outside Python's lock)."""

    def reduce(item: Item) -> Reduced:
        try:
            return item, shrunk(bytes(item.read()), side, quality), ""
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
) -> dict[str, Any]:
    """One shard, its index and its record, each written whole; returns the record."""
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
            group = classes[item.label] if classes else "images"
            plain = re.fullmatch(r"[\w-]{1,60}", group, re.ASCII)
            info = tarfile.TarInfo(f"{group if plain else item.label}/{number:08d}.jpg")
            info.size = len(data)
            rows.append((file.tell() + tarfile.BLOCKSIZE, len(data), item.label))
            tar.addfile(info, io.BytesIO(data))
    with atomic_write(path.with_suffix(".npy")) as file:
        np.save(file, np.array(rows, prepared.ROW))
    made = {"file": path.name, "images": len(rows), "sha256": sha256(path), "skipped": skipped}
    write_json(path.with_suffix(".json"), made)
    return made
