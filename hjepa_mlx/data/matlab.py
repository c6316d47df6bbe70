"""MATLAB's files (level 5), as far as ImageNet's kit needs them, without trust in what they say.

scipy's reader ends the process at some damaged ones.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator

import numpy as np

NUMBERS = {1: "i1", 2: "u1", 3: "<i2", 4: "<u2", 5: "<i4", 6: "<u4", 7: "<f4", 9: "<f8",
           12: "<i8", 13: "<u8", 16: "u1", 17: "<u2"}  # fmt: skip
COMPRESSED = 15  # the type of a part that holds others
LARGEST = 1 << 25  # bytes of a part, unpacked


def structs(file: bytes, wanted: str) -> dict[str, list[np.ndarray]]:
    """The fields of an array of structs, and each one's numbers, or characters, in every struct.

    Raises ValueError and other errors of damaged content.
    """
    if file[126:128] != b"IM":
        raise ValueError("it is no MATLAB file of level 5")
    for _, data in _parts(file[128:]):
        _, _, (_, name), *inside = _parts(data)
        if name.decode() == wanted:
            break
    else:
        raise ValueError(f"it has no {wanted}")
    width = int.from_bytes(inside[0][1], "little")
    names = inside[1][1]
    fields = [names[i : i + width].rstrip(b"\0").decode() for i in range(0, len(names), width)]
    values = [_numbers(data) for _, data in inside[2:]]
    return {field: values[number :: len(fields)] for number, field in enumerate(fields)}


def _numbers(data: bytes) -> np.ndarray:
    _, _, _, *rest = _parts(data)
    kind, content = rest[0] if rest else (2, b"")
    return np.frombuffer(content, NUMBERS.get(kind, "u1"))  # what is inside cells is not needed


def _parts(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Type and content of each part."""
    at = 0
    while at + 8 <= len(data):
        kind, size = struct.unpack_from("<II", data, at)
        begin, end = at + 8, at + 8 + size + (-size % 8 if kind != COMPRESSED else 0)
        if small := kind >> 16:  # bytes, which are where the size usually is
            kind, begin, size, end = kind & 0xFFFF, at + 4, min(small, 4), at + 8
        content, at = data[begin : begin + size], end
        if len(content) < size:
            raise ValueError("a part is cut")
        if kind != COMPRESSED:
            yield kind, content
            continue
        unpacked = zlib.decompressobj().decompress(content, LARGEST + 1)
        if len(unpacked) > LARGEST:
            raise ValueError("a part is too large")
        yield from _parts(unpacked)
