"""Archives: known members are taken out, or images are found to be read in place.

Nothing is ever written under a name that an archive chose.
"""

from __future__ import annotations

import lzma
import os
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import BinaryIO, NamedTuple

import numpy as np

from hjepa_mlx.data.images import EXTENSIONS
from hjepa_mlx.errors import HJEPAError
from hjepa_mlx.files import atomic_write

CHUNK = 1 << 20
PADDING = 1 << 20  # zeros that may follow the end of a tar; more of them are a gap
NOT_OURS = (  # what numpy raises on an index that is damaged or another version's
    OSError, ValueError, KeyError, EOFError, RuntimeError, zipfile.BadZipFile,
)  # fmt: skip
Advance = Callable[[int], None]


class Member(NamedTuple):
    """A file in a tar: the name of the class (its folder's or inner archive's), and its place."""

    group: str
    name: str
    offset: int
    size: int


def unpack(archive: Path, wanted: dict[str, int], folder: Path, advance: Advance) -> list[Path]:
    """Take `wanted` (member name → largest size in bytes) out of `archive` into `folder`.

    `advance` is told the number of bytes written. HJEPAError when a member is missing, larger
    than it may be or no plain file, or when the archive is damaged; each file is whole or absent.
    """
    left, written = dict(wanted), []
    try:
        with tarfile.open(archive, "r:*") as tar:
            for member in tar:
                name = _checked(member, archive).removeprefix("./")
                if name not in wanted:
                    continue
                if name not in left:
                    raise HJEPAError(f"{archive} is not the published file: it has {name} twice.")
                if not member.isfile() or member.size > left.pop(name):
                    raise HJEPAError(
                        f"{archive} is not the published file: its {name} is no plain file of at "
                        f"most {wanted[name]:,} bytes. Delete it and download again."
                    )
                path = folder / name
                path.parent.mkdir(parents=True, exist_ok=True)
                content = tar.extractfile(member)
                assert content is not None  # it is a plain file
                with atomic_write(path) as file:
                    _copy(content, file, member.size, advance)
                written.append(path)
                if not left:
                    break
    except (tarfile.TarError, EOFError, OSError, ValueError, zlib.error, lzma.LZMAError) as error:
        if isinstance(error, OSError) and error.errno:
            raise  # the disk's, not the archive's
        raise HJEPAError(
            f"{archive} cannot be unpacked ({error}). Delete it and download again."
        ) from error
    if left:
        raise HJEPAError(f"{archive} is not the published file: it lacks {', '.join(left)}.")
    return written


def _copy(source: object, target: BinaryIO, size: int, advance: Advance) -> None:
    while size:
        chunk = source.read(min(CHUNK, size))  # type: ignore[attr-defined]
        if not chunk:
            raise EOFError("a member ends early")
        target.write(chunk)
        size -= len(chunk)
        advance(len(chunk))


def _checked(member: tarfile.TarInfo, archive: Path) -> str:
    """The member's name; HJEPAError for what no image archive holds."""
    path = PurePosixPath(member.name)
    if path.is_absolute() or ".." in path.parts:
        raise HJEPAError(f"{archive} is unsafe: it holds a file named {member.name!r}.")
    if not (member.isfile() or member.isdir()):
        raise HJEPAError(f"{archive} is unsafe: {member.name!r} is a link or a device.")
    return member.name


def images_in_tar(path: Path, advance: Advance) -> Iterator[Member]:
    """Every image in an uncompressed tar, also in tars inside it, in the archive's order.

    `advance` is told how far in bytes the search has come. HJEPAError when the archive is cut,
    damaged or unsafe.
    """
    with open(path, "rb") as file:
        end = os.fstat(file.fileno()).st_size
        try:
            yield from _walk(file, path, 0, end, "", advance)
        except (tarfile.TarError, ValueError, OverflowError, RecursionError) as error:
            raise HJEPAError(f"{path} is not a whole tar archive ({error}).") from error


def _walk(
    file: BinaryIO, path: Path, start: int, end: int, group: str, advance: Advance
) -> Iterator[Member]:
    file.seek(start)
    with tarfile.open(fileobj=file, mode="r:") as tar:
        for member in tar:
            if member.offset >= end:  # an inner tar without its end mark
                break
            name = _checked(member, path)
            offset, size = member.offset_data, member.size
            if size < 0 or (member.isfile() and (offset + size > end or member.issparse())):
                raise HJEPAError(f"{path} is cut or damaged: {name} reaches beyond its end.")
            if member.isfile():
                pure = PurePosixPath(name)
                kind = "" if pure.name.startswith(".") else pure.suffix.lower()
                if kind == ".tar":
                    yield from _walk(file, path, offset, offset + size, pure.stem, advance)
                elif kind in EXTENSIONS:
                    yield Member(group or pure.parent.name, pure.name, offset, size)
            tar.members = []  # type: ignore[attr-defined]  # 1.28 million would fill the memory
            advance(offset + size)
        _check_end(file, path, tar.offset, end, start == 0)


def _check_end(file: BinaryIO, path: Path, at: int, end: int, outermost: bool) -> None:
    """tarfile stops at what it cannot read as if the archive ended there; tell the two apart."""
    if at >= end and not outermost:
        return  # an inner tar without its end mark
    file.seek(at)
    rest = file.read(min(max(end - at, 0), PADDING + 1))
    if len(rest) < tarfile.BLOCKSIZE or len(rest) > PADDING or rest.strip(b"\0"):
        raise HJEPAError(f"{path} is cut or damaged at byte {at:,} of {end:,}.")


@dataclass(frozen=True)
class TarIndex:
    """The images of a tar: names of classes; class, file name (bytes), offset, size of each [N]."""

    groups: tuple[str, ...]
    group: np.ndarray
    names: np.ndarray
    offset: np.ndarray
    size: np.ndarray


def tar_index(path: Path, advance: Advance) -> TarIndex:
    """The index of a tar, kept beside it (where that folder can be written) for the next time."""
    kept = path.with_name(f"{path.name}.index.npz")
    status = path.stat()
    stamp = np.array([status.st_size, status.st_mtime_ns])
    if kept.is_file():
        try:
            with open(kept, "rb") as stored, np.load(stored, allow_pickle=False) as arrays:
                if np.array_equal(arrays["stamp"], stamp):
                    groups = tuple(str(name) for name in arrays["groups"])
                    rest = (arrays[key] for key in ("group", "names", "offset", "size"))
                    return TarIndex(groups, *rest)
        except NOT_OURS:
            pass  # not an index that this version wrote: made again below
    members = sorted(images_in_tar(path, advance))
    groups = tuple(sorted({member.group for member in members}))
    number = {name: i for i, name in enumerate(groups)}
    index = TarIndex(
        groups,
        np.array([number[m.group] for m in members], np.int32),
        np.array([os.fsencode(m.name) for m in members], np.bytes_),
        np.array([m.offset for m in members], np.int64),
        np.array([m.size for m in members], np.int64),
    )
    if os.access(path.parent, os.W_OK):
        with atomic_write(kept, unique=True) as file:
            arrays = {**vars(index), "groups": np.array(groups, np.str_), "stamp": stamp}
            np.savez(file, **arrays)
    return index
