"""Storage: where the bytes of images lie, and how one image is read from there, in any order.

Files are opened for each read. That takes a few microseconds, and names a file that was removed,
cut or changed. (A memory map would crash the process instead.)
"""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Sequence
from math import prod
from pathlib import Path
from stat import S_ISREG
from tokenize import TokenError
from typing import Protocol

import numpy as np

from hjepa_mlx.errors import HJEPAError

LARGEST = 1 << 28  # bytes of an image file
ONE_FILE = (errno.ENOENT, errno.EACCES, errno.EPERM, errno.ELOOP)  # may concern one file only


# numpy has been seen to raise these on damaged files
NOT_NPY = (ValueError, EOFError, TypeError, LookupError, SyntaxError, TokenError, OverflowError,
           MemoryError, RecursionError, AttributeError)  # fmt: skip


class StorageError(HJEPAError):
    """The data set itself is damaged or gone: more than one unreadable image."""


class Images(Protocol):
    """Images by number: pixels [H, W, C] uint8, or the bytes of an image file if `encoded`.

    Each storage refuses what would take more memory than images do.
    """

    encoded: bool

    def __len__(self) -> int: ...

    def read(self, index: int) -> np.ndarray | bytes:
        """Image `index`; OSError or ValueError when only it is unreadable, else StorageError."""
        ...

    def name(self, index: int) -> str:
        """A name for image `index` in messages."""
        ...

    def fingerprint(self) -> str:
        """A string that other content would change."""
        ...


class Pixels:
    """Images in memory, [N, H, W, C] uint8."""

    encoded = False

    def __init__(self, array: np.ndarray, name: str) -> None:
        self.array, self._name = array, name

    def __len__(self) -> int:
        return len(self.array)

    def read(self, index: int) -> np.ndarray:
        return self.array[index]

    def name(self, index: int) -> str:
        return f"{self._name}[{index}]"

    def fingerprint(self) -> str:
        return hashlib.sha256(self.array.tobytes()).hexdigest()


class Array:
    """Raw images of one size in a .npy file, [N, H, W, C] uint8, of known SHA-256."""

    encoded = False

    def __init__(self, path: Path, checksum: str) -> None:
        self.file, self._checksum = KnownFile(path), checksum
        try:
            with open(path, "rb") as file:
                np.lib.format.read_magic(file)
                shape, _, dtype = np.lib.format.read_array_header_1_0(file)
                self._start = file.tell()
        except (OSError, *NOT_NPY) as error:
            raise StorageError(f"{path} cannot be read ({error}).") from error
        if len(shape) != 4 or min(shape) < 1 or shape[3] not in (1, 3) or dtype != np.uint8:
            raise StorageError(f"{path} holds no images: {shape} numbers of type {dtype}.")
        self._count, self._shape = shape[0], shape[1:]
        self._bytes = prod(self._shape)
        if self.file.size != self._start + self._count * self._bytes:
            raise StorageError(
                f"{path} is cut: {self.file.size:,} bytes are too few for {self._count:,} images. "
                f"Delete {path.parent} and prepare again."
            )

    def __len__(self) -> int:
        return self._count

    def read(self, index: int) -> np.ndarray:
        raw = self.file.read(self._start + index * self._bytes, self._bytes)
        return np.frombuffer(bytearray(raw), np.uint8).reshape(self._shape)  # to be written to

    def name(self, index: int) -> str:
        return f"{self.file.path}[{index}]"

    def fingerprint(self) -> str:
        return self._checksum


class Files:
    """One image file each, in a folder."""

    encoded = True

    def __init__(self, folder: Path, paths: list[str]) -> None:
        self.folder, self.paths = folder, paths

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, index: int) -> bytes:
        try:
            handle = os.open(self.paths[index], os.O_RDONLY)
            try:
                size = os.fstat(handle).st_size
                if size > LARGEST:
                    raise ValueError(f"{size:,} bytes are too many for an image")
                return os.pread(handle, size, 0)  # half the time of Path.read_bytes
            finally:
                os.close(handle)
        except OSError as error:
            if error.errno in ONE_FILE and _holds_something(os.path.dirname(self.paths[index])):
                raise
            raise StorageError(f"{self.folder} cannot be read any more: {error}.") from error

    def name(self, index: int) -> str:
        return self.paths[index]

    def fingerprint(self) -> str:
        """Of the paths inside the folder and their sizes."""
        start = len(os.path.join(self.folder, ""))
        files = [(path[start:], _size(path)) for path in self.paths]
        return hashlib.sha256(repr(files).encode("utf-8", "surrogateescape")).hexdigest()


class Members:
    """Image files inside tars of known SHA-256, found by tar, offset and size, [N] each."""

    encoded = True

    def __init__(
        self,
        paths: Sequence[Path],
        file: np.ndarray,
        offset: np.ndarray,
        size: np.ndarray,
        checksums: Sequence[str],
    ) -> None:
        self.files, self._checksums = [KnownFile(path) for path in paths], checksums
        self.file, self.offset, self.size = file, offset, size
        for number, known in enumerate(self.files):
            begin, length = self.offset[self.file == number], self.size[self.file == number]
            if (length > known.size - begin).any():
                raise StorageError(
                    f"{known.path} is cut: it has {known.size:,} bytes, its index reaches further."
                )
            if min(begin.min(initial=512), length.min(initial=0) + 512) < 512:  # a header is before
                raise StorageError(f"The index of {known.path} is damaged.")

    def __len__(self) -> int:
        return len(self.file)

    def read(self, index: int) -> bytes:
        file = self.files[self.file[index]]
        return file.read(int(self.offset[index]), int(self.size[index]))

    def name(self, index: int) -> str:
        known, offset = self.files[self.file[index]], int(self.offset[index])
        header = known.read(offset - 512, 512)  # every tar member has one just before it
        return f"{known.path}:{header[:100].rstrip(bytes(1)).decode('utf-8', 'backslashreplace')}"

    def fingerprint(self) -> str:
        return "".join(self._checksums)


class Joined:
    """Several storages one after the other."""

    def __init__(self, parts: Sequence[Images]) -> None:
        self.parts = list(parts)
        self.encoded = any(part.encoded for part in parts)
        self.starts = np.concatenate([[0], np.cumsum([len(part) for part in parts])])

    def __len__(self) -> int:
        return int(self.starts[-1])

    def read(self, index: int) -> np.ndarray | bytes:
        part, number = self._find(index)
        return part.read(number)

    def name(self, index: int) -> str:
        part, number = self._find(index)
        return part.name(number)

    def fingerprint(self) -> str:
        return "".join(part.fingerprint() for part in self.parts)

    def _find(self, index: int) -> tuple[Images, int]:
        number = int(np.searchsorted(self.starts, index, "right")) - 1
        return self.parts[number], index - int(self.starts[number])


class KnownFile:
    """A file that must stay as it was when it was first looked at."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            status = os.stat(path)
        except OSError as error:
            raise StorageError(f"{path} cannot be read: {error.strerror}.") from error
        if not S_ISREG(status.st_mode):
            raise StorageError(f"{path} is not a file.")
        self.size, self._changed = status.st_size, status.st_mtime_ns

    def read(self, offset: int, size: int) -> bytes:
        """`size` bytes at `offset`; StorageError when the file is gone, cut or changed.

        ValueError when they are too many for an image.
        """
        if size > LARGEST:
            raise ValueError(f"{size:,} bytes are too many for an image")
        try:
            handle = os.open(self.path, os.O_RDONLY)
            try:
                status = os.fstat(handle)
                data = os.pread(handle, size, offset)
            finally:
                os.close(handle)
        except OSError as error:
            raise StorageError(f"{self.path} cannot be read: {error.strerror}.") from error
        if (status.st_size, status.st_mtime_ns) != (self.size, self._changed):
            raise StorageError(
                f"{self.path} has changed since it was opened ({self.size:,} bytes then, "
                f"{status.st_size:,} now). Put it back, or start anew with the new data."
            )
        if len(data) < size:
            raise StorageError(f"{self.path} ends before byte {offset + size:,}.")
        return data


def _holds_something(folder: str) -> bool:
    try:
        with os.scandir(folder) as entries:
            return next(entries, None) is not None
    except OSError:
        return False


def _size(path: str) -> int:
    try:
        return os.path.getsize(path)
    except OSError:  # a link to nothing: skipped when it is read
        return -1
