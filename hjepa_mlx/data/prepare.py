"""`hjepa-mlx datasets prepare`: from what was downloaded to what trains fastest.

Images are reduced to a short side of 256 pixels, as JPEG, in tar shards with an index (shards.py).
The result depends on the source and the options only, not on the number of workers or on how often
it was interrupted: a shard that is whole is kept.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import tarfile
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import PIL

from hjepa_mlx import backend
from hjepa_mlx.data import shards
from hjepa_mlx.data.images import UNREADABLE, shrunk
from hjepa_mlx.data.source import Source, check_same_classes
from hjepa_mlx.data.storage import Files
from hjepa_mlx.errors import HJEPAError, UsageError
from hjepa_mlx.files import atomic_write, check_space, locked, sha256, write_json
from hjepa_mlx.progress import bar

LOCK = ".lock"
PLAN = "plan.json"  # there until the manifest is: what an interrupted call was doing
SIDE, QUALITY = 256, 90
IMAGE_BYTES = 45_000  # of a prepared image of 256 pixels, guessed for the check of disk space


def prepare(
    name: str,
    sources: dict[str, Source],
    folder: Path,
    side: int = SIDE,
    quality: int = QUALITY,
    workers: int | None = None,
) -> dict[str, Any]:
    """Write `sources` (train, test) as shards of JPEGs whose short side is at most `side`.

    Returns the manifest. An interrupted call goes on where it stopped; a finished one has nothing
    to do. Raises UsageError when `folder` holds something else, HJEPAError when the disk is small.
    """
    for source in sources.values():
        _check_original(source)
    check_same_classes(sources["train"], sources["test"])  # the manifest has one list for both
    plan = {
        "format": shards.FORMAT,
        "name": name,
        "short_side": side,
        "jpeg_quality": quality,
        "pillow": PIL.__version__,
        "classes": list(sources["train"].classes),
        "sources": {split: _fingerprint(source) for split, source in sources.items()},
    }
    if shards.complete(folder):
        made = shards.manifest(folder)
        _compare(plan, made, folder)
        return made
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder / LOCK, str(folder)):
        _check_space(folder, sum(map(len, sources.values())), side)
        _begin(folder, plan)
        return _write_all(folder, plan, sources, workers or backend.cpu_count())


def _begin(folder: Path, plan: dict[str, Any]) -> None:
    """Go on with what an interrupted call of the same plan left, or start in an empty folder."""
    if (folder / PLAN).is_file():
        try:
            begun = dict(json.loads((folder / PLAN).read_text()))
        except (OSError, ValueError, TypeError) as error:
            raise HJEPAError(f"{folder / PLAN} is damaged ({error}). Delete {folder}.") from None
        _compare(plan, begun, folder)
    elif any(not path.name.startswith(".") for path in folder.iterdir()):
        raise UsageError(f"{folder} is not empty: give a new folder with --out.")
    write_json(folder / PLAN, plan)


def _write_all(
    folder: Path, plan: dict[str, Any], sources: dict[str, Source], workers: int
) -> dict[str, Any]:
    """Write what is not there yet, then the manifest; returns that."""
    with bar(f"Preparing {plan['name']}", sum(map(len, sources.values())), "images") as advance:
        writer = _Writer(folder, plan["short_side"], plan["jpeg_quality"], advance)
        splits = {split: writer.write(split, source, workers) for split, source in sources.items()}
    made = {**plan, "splits": splits}
    write_json(folder / shards.MANIFEST, made)
    for part in splits.values():
        for shard in part["shards"]:
            (folder / shard["file"]).with_suffix(".json").unlink(missing_ok=True)
    (folder / PLAN).unlink()
    (folder / LOCK).unlink()
    return made


@dataclass
class _Writer:
    """Writes shards, several at once."""

    folder: Path
    side: int
    quality: int
    advance: Callable[[int], None]
    stopped: threading.Event = field(default_factory=threading.Event)

    def write(self, split: str, source: Source, workers: int) -> dict[str, Any]:
        """All shards of a split; returns its part of the manifest."""
        numbers = range(-(-len(source) // shards.SHARD))
        with ThreadPoolExecutor(workers) as pool:  # PIL's work runs outside Python's lock
            jobs = [pool.submit(self._shard, split, source, number) for number in numbers]
            try:
                made = [job.result() for job in jobs]
            except BaseException:
                self.stopped.set()
                pool.shutdown(cancel_futures=True)
                raise
        return {
            "images": sum(shard["images"] for shard in made),
            "skipped": [line for shard in made for line in shard.pop("skipped")],
            "shards": made,
        }

    def _shard(self, split: str, source: Source, number: int) -> dict[str, Any]:
        """One shard, its index and a record of it, each written whole; kept if it is there."""
        path = self.folder / f"{split}-{number:05d}.tar"
        record = path.with_suffix(".json")
        places = range(number * shards.SHARD, min((number + 1) * shards.SHARD, len(source)))
        if path.is_file() and record.is_file() and shards.read_index(path) is not None:
            self.advance(len(places))
            return json.loads(record.read_text())
        skipped: list[str] = []
        with atomic_write(path) as file:
            rows = self._fill(file, source, places, skipped)
        with atomic_write(path.with_suffix(".npy")) as file:
            np.save(file, rows)
        made = {"file": path.name, "images": len(rows), "sha256": sha256(path), "skipped": skipped}
        write_json(record, made)
        return made

    def _fill(
        self, file: BinaryIO, source: Source, places: range, skipped: list[str]
    ) -> np.ndarray:
        rows = []
        with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
            for index in places:
                if self.stopped.is_set():
                    raise HJEPAError("Stopped.")
                self.advance(1)
                try:
                    raw = source.images.read(int(source.rows[index]))
                    data = shrunk(bytes(raw), self.side, self.quality)
                except UNREADABLE as error:
                    skipped.append(f"{source.name_of(index)}: {error}")
                    continue
                label = int(source.labels[index]) if source.classes else -1
                group = source.classes[label] if source.classes else "images"
                plain = re.fullmatch(r"[\w-]{1,60}", group, re.ASCII)
                info = tarfile.TarInfo(f"{group if plain else label}/{index:08d}.jpg")
                info.size = len(data)
                rows.append((file.tell() + tarfile.BLOCKSIZE, len(data), label))
                tar.addfile(info, io.BytesIO(data))
        return np.array(rows, shards.ROW)


def _check_original(source: Source) -> None:
    """Refuse pixels, which need no preparation, and what was prepared already."""
    if not source.encoded:
        raise UsageError(f"{source.name} is stored as raw pixels, which train fast as they are.")
    for file in getattr(source.images, "files", [])[:1]:
        if shards.complete(file.path.parent):
            raise UsageError(
                f"{source.name} is read from the prepared shards in {file.path.parent}. Move that "
                "folder away to prepare the original again."
            )


def _size(path: str) -> int:
    try:
        return os.path.getsize(path)
    except OSError:  # a link to nothing: skipped when it is read
        return -1


def _fingerprint(source: Source) -> dict[str, Any]:
    """What tells one source from another: which images, their labels, the sizes of all files."""
    images = source.images
    if isinstance(images, Files):
        start = len(os.path.join(images.folder, ""))
        files = [(path[start:], _size(path)) for path in images.paths]
    else:
        files = [(file.path.name, file.size) for file in getattr(images, "files", [])]
    digest = hashlib.sha256(repr(files).encode("utf-8", "surrogateescape"))
    digest.update(source.rows.tobytes() + source.labels.tobytes())
    return {"images": len(source), "sha256": digest.hexdigest()}


def _compare(plan: dict[str, Any], made: dict[str, Any], folder: Path) -> None:
    for key, value in plan.items():
        if made.get(key) != value:
            what = "other images" if key in ("sources", "classes") else f"{key}={made.get(key)}"
            raise UsageError(
                f"{folder} was prepared with {what}. Delete it, or give another folder with --out."
            )


def _check_space(folder: Path, images: int, side: int) -> None:
    there = sum(path.stat().st_size for path in folder.glob("*.tar"))
    needed = images * IMAGE_BYTES * min(side, 2 * SIDE) ** 2 // SIDE**2 - there
    needs = f"{images:,} images of {side} pixels need about"
    check_space(needs, needed, folder, "Free some, or give another folder with --out.")
