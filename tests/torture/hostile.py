"""Hostile bytes: mutations of good files, and bombs of each format."""

import gzip
import io
import json
import math
import random
import re
import struct
import zlib
from collections.abc import Callable, Iterator
from typing import Any

from PIL import Image

EXTREME = (0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 1 << 40)
HEADERS = (
    b"\xff\xd8\xff\xe0\x00\x10JFIF\0", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"II*\0\x08\0\0\0", b"BM",
    b"RIFF\xff\xff\xff\x7fWEBPVP8X", b"8BPS\0\x01", b"P6 9999 9999 255\n", b"PAR1", b"\x1f\x8b\x08",
    b"\x93NUMPY\x01\0", b"PK\x03\x04", b"%!PS-Adobe-3.0 EPSF-3.0\n", b"\x00\x00\x00\x0cjP  \r\n",
    b"\0\0\0\x20ftypavif\0\0\0\0", b"\x80\x02}q\x00.", b"\0\0\x08\x03", b"{" * 32, b"<svg>",
    b"\0" * 16,
)  # fmt: skip


def flipped(rng: random.Random, data: bytearray) -> None:
    for _ in range(rng.choice((1, 1, 2, 8, 64))):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)


def cut(rng: random.Random, data: bytearray) -> None:
    del data[rng.randrange(len(data)) :]


def cut_out(rng: random.Random, data: bytearray) -> None:
    at = rng.randrange(len(data))
    del data[at : at + rng.choice((1, 4, 100, 5000))]


def headed(rng: random.Random, data: bytearray) -> None:
    head = rng.choice(HEADERS)
    data[: len(head) * rng.choice((0, 1))] = head


def lying(rng: random.Random, data: bytearray) -> None:
    """A length, somewhere near the beginning, that lies."""
    width, order = rng.choice((2, 4, 4, 8)), rng.choice(("big", "little"))
    at = rng.randrange(min(len(data), rng.choice((64, 1024, len(data)))))
    value = rng.choice(EXTREME) & ((1 << 8 * width) - 1)
    data[at : at + width] = value.to_bytes(width, order)


def digits(rng: random.Random, data: bytearray) -> None:
    """A number in text that becomes another, or none."""
    found = [match.span() for match in re.finditer(rb"-?\d+(\.\d+)?", bytes(data[:100_000]))]
    if found:
        begin, end = rng.choice(found)
        data[begin:end] = rng.choice(
            (b"-1", b"0", b"1e999", b"NaN", b"9" * 20, b"9" * 5000, b"1.5", b'"a"', b"null", b"[]")
        )


def repeated(rng: random.Random, data: bytearray) -> None:
    at = rng.randrange(len(data))
    data[at:at] = data[at : at + rng.choice((1, 16, 512))] * rng.choice((1, 3, 200))


def emptied(rng: random.Random, data: bytearray) -> None:
    at = rng.randrange(len(data))
    data[at : at + rng.choice((4, 64, 4096))] = bytes(rng.choice((4, 64)))


MUTATIONS = (flipped, flipped, cut, cut_out, headed, lying, lying, digits, repeated, emptied)


def mutated(rng: random.Random, content: bytes) -> bytes:
    """`content` after one to three mutations."""
    data = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 3))):
        if data:
            rng.choice(MUTATIONS)(rng, data)
    return bytes(data)


ODD: tuple[Any, ...] = (
    None, True, -1, 0, 1, 10**9, 10**18, 10**30, 1e308, math.nan, math.inf, "", "x" * 300, "../x",
    "/etc/passwd", "\0", "\ud800", "é\n\x1b[31m", [], {}, [[]], ["auto"] * 50, {"a": {"b": []}},
    [10**9] * 3, -1e-300, 0.5, "auto", "hf:a/b", [-1, 2], [0.0, 0.0],
)  # fmt: skip


def places(tree: Any) -> Iterator[tuple[Any, Any]]:
    """Every container in a tree of plain values, with a key of it."""
    for key in [*tree] if isinstance(tree, dict) else range(len(tree)):
        yield tree, key
        if isinstance(tree[key], dict | list):
            yield from places(tree[key])


def mutated_tree(rng: random.Random, tree: Any) -> Any:
    """A tree of plain values, some of which are odd, swapped, doubled, renamed or gone."""
    tree = json.loads(json.dumps(tree))
    for _ in range(rng.choice((1, 1, 2, 4))):
        container, key = rng.choice([*places(tree)] or [([0], 0)])
        other, place = rng.choice([*places(tree)] or [([0], 0)])
        kind = rng.randrange(6)
        if kind == 0:
            container[key], other[place] = other[place], container[key]
        elif kind == 1:
            del container[key]
        elif kind == 2 and isinstance(container, dict):
            container[rng.choice(("", "x" * 100, "\0", "../a", "__class__"))] = container.pop(key)
        elif kind == 3:
            deep: Any = container[key]
            for _ in range(rng.choice((1, 50, 300))):
                deep = [deep] if rng.random() < 0.5 else {"a": deep}
            container[key] = deep
        else:
            container[key] = rng.choice(ODD)
        try:
            json.dumps(tree)
        except (ValueError, RecursionError):  # a swap that made a circle
            return {}
    return tree


def nested(depth: int, of: str = "[]") -> bytes:
    return (of[0] * depth + of[1] * depth).encode()


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, depth=8, colour=2, rows: int = -1, more: bytes = b"") -> bytes:
    """A PNG of these sides whose `rows` (by default all) hold zeros."""
    channels = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colour]
    line = 1 + (width * channels * depth + 7) // 8
    packer = zlib.compressobj(1)
    data = b"".join(packer.compress(bytes(line)) for _ in range(height if rows < 0 else rows))
    palette = _chunk(b"PLTE", bytes(768)) + _chunk(b"tRNS", bytes(256)) if colour == 3 else b""
    head = _chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    body = _chunk(b"IDAT", data + packer.flush())
    return b"\x89PNG\r\n\x1a\n" + head + more + palette + body + _chunk(b"IEND", b"")


def jpeg(width: int, height: int, scans: int = 1, progressive: bool = False) -> bytes:
    """A JPEG that says it has these sides; a progressive one with as many scans as wanted."""
    file = io.BytesIO()
    Image.new("RGB", (64, 64)).save(file, "JPEG", progressive=progressive)
    data = bytearray(file.getvalue())
    at = next(i for i in range(len(data)) if data[i : i + 2] in (b"\xff\xc0", b"\xff\xc2"))
    data[at + 5 : at + 9] = struct.pack(">HH", height, width)
    last = data.rfind(b"\xff\xda")
    return bytes(data[:last] + data[last:-2] * scans + b"\xff\xd9")


def gif(width: int, height: int, frames: int = 1) -> bytes:
    frame = b"," + struct.pack("<HHHHB", 0, 0, width, height, 0) + b"\x08\x02\x00\x01\x00"
    head = b"GIF89a" + struct.pack("<HHBBB", width, height, 0xF7, 0, 0) + bytes(768)
    return head + frame * frames + b";"


def tiff(width: int, height: int, bits: int = 8, samples: int = 3, loop: bool = False) -> bytes:
    """A TIFF with one deflated strip; its next directory is itself, if so wished."""
    strip = zlib.compress(bytes(min(width * height * samples * bits // 8, 1 << 29)), 1)
    at = 8 + 2 + 10 * 12 + 4
    tags = [(256, 4, width), (257, 4, height), (258, 3, bits), (259, 3, 8)]
    tags += [(262, 3, 2 if samples == 3 else 1), (273, 4, at), (277, 3, samples), (278, 4, height)]
    tags += [(279, 4, len(strip)), (284, 3, 1)]
    rows = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in tags)
    return b"II*\0\x08\0\0\0" + struct.pack("<H", 10) + rows + struct.pack("<I", 8 * loop) + strip


def webp(width: int, height: int) -> bytes:
    """An animated WebP with a huge canvas and a tiny frame."""
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, "WEBP", lossless=True)
    frame = file.getvalue()[12:]
    sides = struct.pack("<I", width - 1)[:3] + struct.pack("<I", height - 1)[:3]

    def part(kind: bytes, data: bytes) -> bytes:
        return kind + struct.pack("<I", len(data)) + data + b"\0" * (len(data) % 2)

    small = struct.pack("<I", 7)[:3] * 2
    shown = part(b"ANMF", bytes(6) + small + b"\x64\0\0\0" + frame)
    body = b"WEBP" + part(b"VP8X", b"\x02\0\0\0" + sides) + part(b"ANIM", bytes(6)) + shown * 2
    return b"RIFF" + struct.pack("<I", len(body)) + body


def saved(kind: str, width: int, height: int, mode: str = "RGB", **options: Any) -> bytes:
    """An honest, huge, empty picture."""
    file = io.BytesIO()
    Image.new(mode, (width, height)).save(file, kind, **options)
    return file.getvalue()


def compressed_text(kind: bytes) -> bytes:
    return _chunk(kind, b"a\0\0" + zlib.compress(bytes(200_000_000), 1))


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(owned) (w) file closefile\n%%EOF\n"
IMAGE_BOMBS: dict[str, Callable[[], bytes]] = {
    "png 9999x9999": lambda: png(9_999, 9_999),
    "png 9999x9999 with alpha": lambda: png(9_999, 9_999, colour=6),
    "png 9999x9999 palette": lambda: png(9_999, 9_999, colour=3),
    "png 9999x9999 of 16 bits": lambda: png(9_999, 9_999, depth=16, colour=6),
    "png 9999x9999 grey of 16 bits": lambda: png(9_999, 9_999, depth=16, colour=0),
    "png 60000x60000": lambda: png(60_000, 60_000, rows=10),
    "png 2^31": lambda: png((1 << 31) - 1, (1 << 31) - 1, rows=0, colour=0),
    "png 90000000x1": lambda: png(90_000_000, 1),
    "png 1x90000000": lambda: png(1, 9_000_000, colour=0),
    "png text": lambda: png(8, 8, more=compressed_text(b"zTXt")),
    "png profile": lambda: png(8, 8, more=compressed_text(b"iCCP")),
    "jpeg 9999x9999": lambda: jpeg(9_999, 9_999),
    "jpeg 65535x65535": lambda: jpeg(65_535, 65_535),
    "jpeg 9999x9999, whole": lambda: saved("JPEG", 9_999, 9_999),
    "jpeg of 2000 scans": lambda: jpeg(9_999, 9_999, 2_000, progressive=True),
    "cmyk jpeg 9999x9999": lambda: saved("JPEG", 9_999, 9_999, "CMYK"),
    "gif 65535x65535": lambda: gif(65_535, 65_535),
    "gif 9999x9999": lambda: gif(9_999, 9_999),
    "gif of 100000 frames": lambda: gif(500, 500, 100_000),
    "tiff 9999x9999": lambda: tiff(9_999, 9_999),
    "tiff 9999x9999 of 16 bits": lambda: tiff(9_999, 9_999, 16, 1),
    "tiff 200000x200000": lambda: tiff(200_000, 200_000),
    "tiff in a circle": lambda: tiff(99, 99, loop=True),
    "webp 16384x16384": lambda: webp(16_384, 16_384),
    "webp 9999x9999": lambda: webp(9_999, 9_999),
    "bmp": lambda: b"BM" + struct.pack("<IIIIiiHHIIIIII", 99, 0, 54, 40, 9_999, -9_999, 1, 24,
                                       0, 0, 0, 0, 0, 0),
    "ppm": lambda: b"P6 9999 9999 255\n",
    "ppm of digits": lambda: b"P3 9999 9999 " + b"9" * 1_000_000,
    "jpeg2000 5500x5500": lambda: saved("JPEG2000", 5_500, 5_500, irreversible=False),
    "webp 5500x5500": lambda: webp(5_500, 5_500),
    "png 7800x7800 with alpha": lambda: png(7_800, 7_800, colour=6),
    "cmyk jpeg 7800x7800": lambda: saved("JPEG", 7_800, 7_800, "CMYK"),
    "jpeg2000 9999x9999": lambda: saved("JPEG2000", 9_999, 9_999, irreversible=False),
    "psd": lambda: b"8BPS\0\x01" + bytes(6) + struct.pack(">HIIHH", 3, 9_999, 9_999, 8,
    3) + bytes(99),
    "tga": lambda: struct.pack("<BBBHHBHHHHBB", 0, 0, 10, 0, 0, 0, 0, 0, 9_999, 9_999, 24,
    0) + b"\xff\0\0\0",
    "eps": lambda: EPS,
}  # fmt: skip


def compressed_zeros(size: int) -> bytes:
    """A gzip of so many zero bytes, made piece by piece: members may follow each other."""
    return gzip.compress(bytes(1 << 24), 9) * max(1, size >> 24)


def npy(shape: str, descr: str = "|u1", body: bytes = b"") -> bytes:
    """A .npy file whose header says what is wished."""
    head = f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}, }}".encode()
    head += b" " * (-(len(head) + 11) % 64) + b"\n"
    return b"\x93NUMPY\x01\0" + struct.pack("<H", len(head)) + head + body


def safetensors(header: Any, body: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + body


def idx(axes: tuple[int, ...], body: bytes) -> bytes:
    head = bytes((0, 0, 8, len(axes))) + struct.pack(f">{len(axes)}I", *axes)
    return gzip.compress(head + body, 1)
