"""One image file: from bytes to something mlx-data's decoder turns into the right picture."""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

START, END, SCAN = b"\xff\xd8", 0xD9, 0xDA  # of a JPEG
LEAST_MARKER = 0xC0  # that has a length
FRAMES = (0xC0, 0xC1, 0xC2)  # its markers of baseline, extended and progressive frames
UNSURE = (0xE1, 0xEE)  # Exif and Adobe segments: rotation, other colour spaces
MAX_PIXELS = 100_000_000  # larger pictures are taken for decompression bombs
MAX_OTHER = 61_000_000  # of one that is decoded here, which takes three times the memory
DOUBLE = ("WEBP", "JPEG2000")  # whose decoders take as much again
STRIP = 1_000_000  # pixels converted at a time
MAX_SCANS = 100  # of a progressive JPEG, which is decoded once for each
FORMATS = (  # PIL knows more; for EPS it starts Ghostscript
    "JPEG", "PNG", "WEBP", "BMP", "DIB", "TIFF", "PPM", "GIF", "JPEG2000", "MPO", "PSD", "TGA",
    "AVIF", "HEIF",
)  # fmt: skip
warnings.filterwarnings("ignore", module="PIL")  # odd files are read or skipped all the same
UNREADABLE = (OSError, ValueError)  # one file, by the disk; one picture, by its content
DAMAGED = (  # PIL has been seen to raise these on damaged files
    OSError, SyntaxError, ValueError, ArithmeticError, LookupError, TypeError, AttributeError,
    MemoryError, RuntimeError, struct.error, zlib.error, Image.DecompressionBombError,
)  # fmt: skip
EXTENSIONS = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".gif"})


def decodable(data: bytes, bits: int | None = None) -> np.ndarray:
    """Check an image file and return it [bytes] uint8 in a form mlx-data decodes correctly.

    An upright RGB JPEG passes as it is, after the cheap check that its parts are there. All else
    (greyscale, CMYK, alpha, 16 bit, EXIF rotation, other formats), which mlx-data would decode
    wrongly or not at all, is decoded here and passed on as a PPM. bits: see `_as_rgb`.
    Raises ValueError when it is not a whole image.
    """
    if _is_plain_jpeg(data):
        return np.frombuffer(bytearray(data), np.uint8)
    with opened(data) as image:
        if _passes(image, data):
            return np.frombuffer(bytearray(data), np.uint8)
        upright = _upright(image)
        width, height = upright.size
        if width * height <= STRIP:  # a copy less
            return as_ppm(np.asarray(_as_rgb(upright, bits)))
        ppm, pixels = _empty_ppm(height, width)
        rows = max(1, STRIP // width)  # strip by strip: this bounds memory
        for top in range(0, height, rows):
            strip = upright.crop((0, top, width, min(height, top + rows)))
            pixels[top : top + rows] = np.asarray(_as_rgb(strip, bits))
        return ppm


class Look(NamedTuple):
    """What an image file holds. hash: equal for images that look alike, 0 for plain ones."""

    format: str
    mode: str
    short: int
    long: int
    hash: int


def look_at(data: bytes) -> Look:
    """Decode the whole image; ValueError when that fails or its end is missing.

    The hash has a bit for each of 8×8 places: whether it is brighter than the one to its right.
    """
    decodable(data)
    with opened(data) as image:
        image.load()
        grey = np.asarray(image.convert("L").resize((9, 8), Image.Resampling.BOX), int)
        bits = grey[:, :-1] > grey[:, 1:]
        number = int.from_bytes(np.packbits(bits).tobytes(), "big")
        short, long = sorted(image.size)
        return Look(str(image.format), image.mode, short, long, number)


def _is_plain_jpeg(data: bytes) -> bool:
    """Whether a look at the parts alone shows that the decoder gives the right picture.

    Three components of 8 bits, neither Exif nor Adobe's segment, all parts in their places. PIL,
    which takes longer to open the file, decides where this does not.
    """
    parts = _parts(data)
    frame = next((place for marker, place in parts if marker in FRAMES), len(data))
    head = data[frame + 4 : frame + 10]
    if len(head) < 6 or any(marker in UNSURE for marker, _ in parts):
        return False
    bits, height, width, components = struct.unpack(">BHHB", head)
    few = 0 < height * width <= MAX_PIXELS and sum(m == SCAN for m, _ in parts) <= MAX_SCANS
    return bits == 8 and components == 3 and few


def _parts(data: bytes) -> list[tuple[int, int]]:
    """(marker, place) of a JPEG's parts up to its end; none if one reaches beyond the file.

    mlx-data 0.1.0 waits for ever for the rest of such a part. Odd markers are refused too, as
    libjpeg goes on at other places after them.
    """
    x = np.frombuffer(data, np.uint8)
    places = np.flatnonzero(x[:-1] == 0xFF)
    kinds = x[places + 1]  # 0 and 0xD0 to 0xD7 belong to a scan, 0xFF fills
    marked = (kinds > 0) & (kinds < 0xFF) & ((kinds < 0xD0) | (kinds > 0xD7))
    found, end = [], len(START)
    for place in places[marked].tolist() if data[:2] == START else ():
        marker = data[place + 1]
        if place < end:  # within a part
            continue
        found.append((marker, place))
        if marker == END:
            return found
        end = place + 2 + int.from_bytes(data[place + 2 : place + 4], "big")
        if marker < LEAST_MARKER or marker == START[1] or end > len(data):
            return []
    return []


def shrunk(data: bytes, side: int, quality: int, bits: int | None = None) -> bytes:
    """The image file as an upright RGB JPEG whose shorter side is at most `side` pixels.

    A file that is that already stays byte for byte as it is; nothing is enlarged.
    Raises ValueError when it is not a whole image.
    """
    with opened(data) as image:
        small = min(image.size) <= side
        if small and _passes(image, data):
            image.load()
            return data
        image.draft("RGB", (2 * side, 2 * side))  # a large JPEG is decoded at a fraction
        upright = _as_rgb(_upright(image), bits)
        if not small:
            scale = side / min(upright.size)
            size = [max(side, round(length * scale)) for length in upright.size]
            upright = upright.resize(size, Image.Resampling.BICUBIC)
        out = io.BytesIO()
        upright.save(out, "JPEG", quality=quality)
        return out.getvalue()


def _passes(image: Image.Image, data: bytes) -> bool:
    """Whether mlx-data's decoder gives the right picture: a whole, upright RGB JPEG."""
    upright = image.getexif().get(ExifTags.Base.Orientation, 1) == 1
    return image.format == "JPEG" and image.mode == "RGB" and upright and bool(_parts(data))


@contextmanager
def opened(source: bytes | Path) -> Iterator[Image.Image]:
    """The image; whatever PIL raises about its content, here or while it is used: ValueError.

    source: the file, of which no more is read than is used, or its bytes.
    """
    data, file = (b"", source) if isinstance(source, Path) else (source, io.BytesIO(source))
    if data[4:8] == b"ftyp":
        _read_heic()
    try:
        with Image.open(file, formats=_formats()) as image:
            large = image.width * image.height > MAX_PIXELS
            if large or (data[:2] == START and data.count(bytes((0xFF, SCAN))) > MAX_SCANS):
                raise ValueError(f"{image.width}x{image.height} pixels, or its scans, are too many")
            yield image
    except UnidentifiedImageError:
        raise ValueError("not an image") from None
    except DAMAGED as error:
        raise ValueError(str(error) or type(error).__name__) from None


@cache
def _read_heic() -> None:
    """Teach Pillow HEIC, if the extra `heic` is installed."""
    if find_spec("pillow_heif"):
        import pillow_heif

        pillow_heif.register_heif_opener()


def _formats() -> tuple[str, ...]:
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def _upright(image: Image.Image) -> Image.Image:
    """Turned as its Exif says; ValueError first if that takes too much memory, or it has floats."""
    if image.mode == "F" or (image.mode == "I" and image.format != "PNG"):
        raise ValueError("its pixels have 32 bits; convert it to 8 or 16")
    if image.width * image.height > MAX_OTHER >> (image.format in DOUBLE):
        raise ValueError(f"{image.width}x{image.height} pixels are too many; save it as RGB JPEG")
    ImageOps.exif_transpose(image, in_place=True)
    return image


def _as_rgb(image: Image.Image, bits: int | None) -> Image.Image:
    """8-bit RGB; 16-bit greys keep the highest 8 of `bits` bits, transparency becomes white."""
    if image.mode.startswith("I"):
        levels = np.asarray(image)
        image = Image.fromarray(np.clip(levels >> ((bits or 16) - 8), 0, 255).astype(np.uint8))
    if image.has_transparency_data:
        rgba = image if image.mode == "RGBA" else image.convert("RGBA")
        image = Image.new("RGBA", rgba.size, "white")
        image.alpha_composite(rgba)
    return image if image.mode == "RGB" else image.convert("RGB")


def as_ppm(pixels: np.ndarray) -> np.ndarray:
    """Pixels [H, W, 3] uint8 as a PPM file, [bytes] uint8, which decodes to just these pixels."""
    ppm, place = _empty_ppm(*pixels.shape[:2])
    place[...] = pixels
    return ppm


def _empty_ppm(height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """A PPM file, [bytes] uint8, and its pixels [H, W, 3], which are still to be set."""
    header = np.frombuffer(f"P6 {width} {height} 255\n".encode(), np.uint8)
    ppm = np.empty(len(header) + 3 * height * width, np.uint8)
    ppm[: len(header)] = header
    return ppm, ppm[len(header) :].reshape(height, width, 3)
