"""Archives: members and images are read where they are; nothing is unpacked to disk."""

from __future__ import annotations

import gzip
import os
import tarfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import IO, Any, BinaryIO, NamedTuple

from hjepa_mlx.data.images import EXTENSIONS
from hjepa_mlx.errors import HJEPAError

PADDING = 1 << 20  # zeros that may follow the end of a tar; more of them are a gap
LONGEST = 1 << 20  # bytes of a header: tarfile reads as many as the archive says
DAMAGED = (tarfile.TarError, EOFError, ValueError, OverflowError, RecursionError, zlib.error)


class Member(NamedTuple):
    """A file in a tar: its class (the name of its folder or inner archive), name and place."""

    group: str
    name: str
    offset: int
    size: int


class _Careful:
    """A file of which no one gets more than LONGEST bytes at once."""

    def __init__(self, file: Any) -> None:
        self._file, self.seek, self.tell = file, file.seek, file.tell

    def read(self, size: int) -> bytes:
        """Up to `size` bytes; ValueError for too many."""
        if not 0 <= size <= LONGEST:
            raise ValueError(f"a header of {size:,} bytes")
        return self._file.read(size)


def _tar(file: Any) -> tarfile.TarFile:
    careful: Any = _Careful(file)
    return tarfile.open(fileobj=careful, mode="r:")


@contextmanager
def opened_member(archive: Path, wanted: str, largest: int, whole: int) -> Iterator[IO[bytes]]:
    """The member `wanted` of a .tar.gz, to be read from its beginning.

    HJEPAError when it is missing, larger than `largest` bytes or no plain file, or when the archive
    is unsafe or damaged, or has more than `whole` bytes before it.
    """
    try:
        with gzip.open(archive) as unpacked, _tar(unpacked) as tar:
            for member in tar:
                if _checked(member, archive).removeprefix("./") == wanted:
                    break
                if member.offset_data + member.size > whole:
                    raise HJEPAError(f"{archive} is not the published file: it is too large.")
            else:
                raise HJEPAError(f"{archive} is not the published file: it lacks {wanted}.")
            file = tar.extractfile(member)
            if file is None or not 0 <= member.size <= largest:
                raise HJEPAError(f"{archive} is not the published file: its {wanted} is another.")
            yield file
    except (*DAMAGED, OSError) as error:
        if isinstance(error, OSError) and error.errno:
            raise  # the disk's, not the archive's
        raise HJEPAError(
            f"{archive} is damaged ({error}). Delete it and download again."
        ) from error


def _checked(member: tarfile.TarInfo, archive: Path) -> str:
    """The member's name; HJEPAError for links, devices and unsafe paths."""
    path = PurePosixPath(member.name)
    if path.is_absolute() or ".." in path.parts:
        raise HJEPAError(f"{archive} is unsafe: it holds a file named {member.name!r}.")
    if not (member.isfile() or member.isdir()) or member.size < 0 or member.issparse():
        raise HJEPAError(f"{archive} is unsafe: {member.name!r} is a link, a device or has holes.")
    return member.name


def images_in_tar(path: Path, deep: bool = True) -> Iterator[Member]:
    """Every image in an uncompressed tar, in the archive's order; only headers are read.

    deep: also those in tars inside it, whose names are their classes; otherwise such a tar comes
    as one member. HJEPAError when the archive is cut, damaged or unsafe.
    """
    with open(path, "rb") as file:
        end = os.fstat(file.fileno()).st_size
        try:
            yield from _walk(file, path, 0, end, "", deep)
        except DAMAGED as error:
            raise HJEPAError(f"{path} is not a whole tar archive ({error}).") from error


def _walk(
    file: BinaryIO, path: Path, start: int, end: int, group: str, deep: bool
) -> Iterator[Member]:
    file.seek(start)
    with _tar(file) as tar:
        for member in tar:
            if member.offset >= end:  # an inner tar without its end mark
                break
            name = _checked(member, path)
            offset, size = member.offset_data, member.size
            if member.isfile() and offset + size > end:
                raise HJEPAError(f"{path} is cut or damaged: {name} reaches beyond its end.")
            tar.members = []  # type: ignore[attr-defined]  # 1.28 million would fill the memory
            if not member.isfile():
                continue
            pure = PurePosixPath(name)
            kind = "" if pure.name.startswith(".") else pure.suffix.lower()
            if kind == ".tar" and deep:
                yield from _walk(file, path, offset, offset + size, pure.stem, deep)
            elif kind == ".tar":
                yield Member(pure.stem, pure.name, offset, size)
            elif kind in EXTENSIONS:
                yield Member(group or pure.parent.name, pure.name, offset, size)
        _check_end(file, path, tar.offset, end, start == 0)


def _check_end(file: BinaryIO, path: Path, at: int, end: int, outermost: bool) -> None:
    """Tell an archive's end from a damaged header: tarfile stops silently at both."""
    if at >= end and not outermost:
        return  # an inner tar without its end mark
    file.seek(at)
    rest = file.read(min(max(end - at, 0), PADDING + 1))
    if len(rest) < tarfile.BLOCKSIZE or len(rest) > PADDING or rest.strip(b"\0"):
        raise HJEPAError(f"{path} is cut or damaged at byte {at:,} of {end:,}.")
