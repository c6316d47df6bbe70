"""Files that are either whole or not there: power can go at any moment."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from hjepa_mlx.errors import HJEPAError

LARGEST = 1 << 26  # bytes of a list, table or record: a million names


@contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """Open a temporary file beside `path` that takes its name once it is safely on disk."""
    part = path.with_name(f".{path.name}.part")
    try:
        with open(part, "wb") as file:
            yield file
            publish(file, part, path)
    finally:
        part.unlink(missing_ok=True)


def publish(file: BinaryIO, part: Path, path: Path) -> None:
    """Bring what was written to `file`, the open `part`, safely to disk under the name `path`."""
    file.flush()
    _to_disk(file.fileno())
    os.replace(part, path)
    sync(path.parent)


def write_json(path: Path, content: Any) -> None:
    """Write `content` as a JSON file, whole or not at all."""
    with atomic_write(path) as file:
        file.write((json.dumps(content, indent=1) + "\n").encode())


@contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """A folder beside `folder` that takes its name once all in it is safely on disk.

    A `folder` that is there already has to be empty.
    """
    folder = Path(os.path.abspath(folder))  # "." has no name
    part = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    try:
        make_folder(part)
        yield part
        for path in [*part.rglob("*"), part]:
            sync(path)
        os.replace(part, folder)
        sync(folder.parent)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def make_folder(folder: Path) -> None:
    """Make a folder, and those above it, to last."""
    if not folder.is_dir():
        make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        sync(folder.parent)


@contextmanager
def locked(path: Path, what: str) -> Iterator[BinaryIO]:
    """Open `path` for appending under an exclusive lock; HJEPAError if another process holds it.

    what: what is locked, in the error's words.
    """
    with open(path, "a+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise HJEPAError(f"{what} is being written by another process.") from None
        except OSError:
            pass  # a file system without locks
        if not _is_still(file, path):
            raise HJEPAError(f"{what} was written by another process just now.")
        yield file


def _is_still(file: BinaryIO, path: Path) -> bool:
    """Whether `path` still is the file that was opened before the lock was had."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    except FileNotFoundError:
        return False


def sync(path: Path) -> None:
    """Make a file's content last, or names inside a folder."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except PermissionError:  # in a folder that one may write to, but not list
        return
    try:
        _to_disk(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EBADF):  # some file systems sync no folders
            raise
    finally:
        os.close(handle)


def _to_disk(handle: int) -> None:
    """fsync; on a Mac also out of the drive's own cache, which fsync leaves alone there."""
    if sys.platform == "darwin":
        try:
            fcntl.fcntl(handle, fcntl.F_FULLFSYNC)
            return
        except OSError:
            pass  # network and foreign file systems do not know it
    os.fsync(handle)


def free_space(place: Path) -> int:
    """Bytes free on the disk where `place` is, or would be made."""
    place = place.absolute()
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free


def check_space(needs: str, size: float, place: Path, advice: str) -> None:
    """Refuse `size` bytes that the disk of `place` cannot hold: "`needs` … GB in …. `advice`"."""
    free = free_space(place)
    if free < size:
        raise HJEPAError(
            f"{needs} {size / 1e9:.2f} GB in {place}, where {free / 1e9:.2f} GB are free. {advice}"
        )


def read(path: Path, most: int = LARGEST) -> bytes:
    """The bytes of a small file, which may be a pipe; HJEPAError where there are more than `most`.

    A device has no end, and a file with holes takes no room on the disk that it came on.
    """
    with open(path, "rb") as file:
        data = file.read(most + 1)
    if len(data) > most:
        raise HJEPAError(f"{path} is larger than {most / 1e6:,.0f} MB, too large for its kind.")
    return data


def read_json(path: Path, most: int = LARGEST) -> Any:
    """What a JSON file holds; ValueError where it is none."""
    try:
        return json.loads(read(path, most))
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()


def as_unicode(path: str) -> str:
    """A path as Unicode that every format can hold: bytes that are no UTF-8 become \\xff."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")
