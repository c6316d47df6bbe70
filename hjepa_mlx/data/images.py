"""One image file: from bytes to something mlx-data's decoder turns into the right picture."""

from __future__ import annotations

import io
import warnings

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

MAX_PIXELS = 100_000_000  # larger pictures are taken for decompression bombs
warnings.filterwarnings("ignore", module="PIL")  # what it finds odd is read or skipped all the same
EXTENSIONS = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".gif"})


def decodable(data: bytes) -> np.ndarray:
    """Check an image file and return it [bytes] uint8 in a form mlx-data decodes correctly.

    An upright RGB JPEG passes as it is, after the cheap check that its end is there. All else
    (greyscale, CMYK, alpha, 16 bit, EXIF rotation, other formats), which mlx-data would decode
    wrongly or not at all, is decoded here and passed on as a PPM.
    Raises OSError, SyntaxError or ValueError for what is not a whole image.
    """
    with _open(data) as image:
        if image.width * image.height > MAX_PIXELS:
            raise ValueError(f"{image.width}x{image.height} pixels are too many")
        upright = image.getexif().get(ExifTags.Base.Orientation, 1) == 1
        whole = b"\xff\xd9" in data[-64:]
        if image.format == "JPEG" and image.mode == "RGB" and upright and whole:
            return np.frombuffer(bytearray(data), np.uint8)
        return _as_ppm(_as_rgb(ImageOps.exif_transpose(image)))


def _open(data: bytes) -> Image.Image:
    try:
        return Image.open(io.BytesIO(data))
    except UnidentifiedImageError:
        raise ValueError("not an image") from None
    except Image.DecompressionBombError as error:
        raise ValueError(str(error)) from None


def _as_rgb(image: Image.Image) -> Image.Image:
    """8-bit RGB; 16-bit greys keep their high byte and transparency becomes white."""
    if image.mode.startswith("I"):
        levels = np.asarray(image)
        image = Image.fromarray(np.clip(levels >> 8, 0, 255).astype(np.uint8))
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        image = Image.new("RGBA", rgba.size, "white")
        image.alpha_composite(rgba)
    return image.convert("RGB")


def _as_ppm(image: Image.Image) -> np.ndarray:
    header = f"P6 {image.width} {image.height} 255\n".encode()
    return np.frombuffer(bytearray(header + image.tobytes()), np.uint8)
