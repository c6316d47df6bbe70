"""Image files: each decodes to the right picture, or is refused."""

import io
import zlib
from contextlib import suppress
from itertools import product

import mlx.data as dx
import numpy as np
import pytest
from layouts import difference, smooth
from PIL import Image, ImageOps

from hjepa_mlx.data import images
from hjepa_mlx.data.images import decodable


@pytest.fixture(autouse=True)
def in_several_strips(monkeypatch):
    monkeypatch.setattr(images, "STRIP", 200)


def encoded(image: Image.Image, form: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def decode(data: bytes) -> np.ndarray:
    """The picture that mlx-data makes of what `decodable` hands it."""
    buffer = dx.buffer_from_vector([{"image": decodable(data)}])
    return buffer.load_image("image", from_memory=True)[0]["image"]


def pil(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def on_white(colour: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """Pictures [H, W, 3] in front of white, with opacity [H, W, 1] of 255."""
    share = alpha / 255
    return np.rint(colour * share + 255 * (1 - share))


RGB = Image.fromarray(smooth(40, 56))


def test_an_upright_rgb_jpeg_passes_unchanged_and_decodes_as_pil_decodes_it():
    for options in ({}, {"progressive": True}, {"subsampling": 0, "quality": 95}):
        data = encoded(RGB, "JPEG", **options)
        assert decodable(data).tobytes() == data
        assert difference(decode(data), pil(data)).max() <= 2


STORED = {  # how an upright picture is stored under each EXIF orientation
    1: lambda x: x,
    2: lambda x: x[:, ::-1],
    3: lambda x: x[::-1, ::-1],
    4: lambda x: x[::-1],
    5: lambda x: x.swapaxes(0, 1),
    6: lambda x: np.rot90(x),
    7: lambda x: x[::-1, ::-1].swapaxes(0, 1),
    8: lambda x: np.rot90(x, -1),
}


@pytest.mark.parametrize("orientation", STORED)
def test_every_exif_orientation_comes_out_upright(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = Image.fromarray(np.ascontiguousarray(STORED[orientation](np.asarray(RGB))))
    assert np.array_equal(decode(encoded(stored, "PNG", exif=exif)), np.asarray(RGB))
    jpeg = encoded(stored, "JPEG", exif=exif)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(jpeg)))
    assert difference(decode(jpeg), np.asarray(upright)).max() <= 2


@pytest.mark.parametrize(
    ("form", "mode"),
    [
        *product(["PNG", "BMP", "TIFF", "WEBP", "GIF"], ["RGB", "L", "P", "1"]),
        *product(["JPEG"], ["L", "CMYK"]),
    ],
)
def test_other_formats_and_modes_decode_as_pil_decodes_them(form, mode):
    data = encoded(RGB.convert(mode), form)
    assert np.array_equal(decode(data), pil(data))


@pytest.mark.parametrize(
    ("form", "mode"), [("PNG", "RGBA"), ("TIFF", "RGBA"), ("WEBP", "RGBA"), ("PNG", "LA")]
)
def test_transparency_becomes_white(form, mode):
    lossless = {"lossless": True, "exact": True} if form == "WEBP" else {}
    pixels = smooth(40, 56, len(mode))
    decoded = decode(encoded(Image.fromarray(pixels, mode), form, **lossless))
    colour = pixels[..., :-1] if mode == "RGBA" else pixels[..., :1].repeat(3, 2)
    assert difference(decoded, on_white(colour, pixels[..., -1:])).max() <= 1


def test_the_transparent_colour_of_a_palette_becomes_white():
    palette = RGB.quantize(16)
    expected = np.asarray(palette.convert("RGB")).copy()
    expected[np.asarray(palette) == 5] = 255
    for form in ("PNG", "GIF"):
        assert np.array_equal(decode(encoded(palette, form, transparency=5)), expected)


@pytest.mark.parametrize("form", ["PNG", "TIFF"])
def test_16_bit_greys_keep_their_high_byte(form):
    levels = np.random.default_rng(0).integers(0, 1 << 16, (24, 28), np.uint16)
    decoded = decode(encoded(Image.fromarray(levels), form))
    assert np.array_equal(decoded, (levels >> 8)[..., None].repeat(3, 2))


@pytest.mark.parametrize("kind", [np.int32, np.float32])
def test_32_bit_greys_are_refused_instead_of_black(kind):
    levels = np.random.default_rng(0).random((24, 28)).astype(kind)
    with pytest.raises(ValueError, match="32 bits"):
        decode(encoded(Image.fromarray(levels), "TIFF"))


def test_a_jpeg_with_a_part_that_reaches_beyond_its_end_never_gets_to_the_decoder():
    """For its rest mlx-data waits for ever."""
    for options in ({}, {"progressive": True}, {"restart_marker_blocks": 2}):
        data = encoded(RGB, "JPEG", **options)
        assert decodable(data)[:2].tobytes() == b"\xff\xd8"
        table, scan = data.rfind(b"\xff\xc4"), data.rfind(b"\xff\xda") + 20
        for lies in (
            data[: table + 2] + b"\xff\xf0" + data[table + 4 :],
            data[:-2] + b"\xff\x01\0\6\xff\xe0\xff\xff\xff\xd9",
            data[:2] + b"\xff\x01\0\6\xff\xe3\xff\xff" + data[2:],
            data[:scan] + b"\xff\x05\0\6\xff\xe0\xff\xff" + data[scan:],
        ):
            with suppress(ValueError):
                assert decodable(lies)[:2].tobytes() == b"P6"


def png_of(side: int) -> bytes:
    """A PNG that claims `side` × `side` pixels."""
    data = bytearray(encoded(RGB, "PNG"))
    data[16:24] = side.to_bytes(4, "big") * 2
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    return bytes(data)


BROKEN = {
    "empty": b"",
    "text": b"Not a picture.",
    "JPEG in half": encoded(RGB, "JPEG")[:700],
    "JPEG without its end": encoded(RGB, "JPEG")[:-80],
    "PNG in half": encoded(RGB, "PNG")[:700],
    "WebP in half": encoded(RGB, "WEBP")[:200],
    "GIF in half": encoded(RGB, "GIF")[:900],
    "BMP in half": encoded(RGB, "BMP")[:700],
    "TIFF in half": encoded(RGB, "TIFF")[:700],
    "PNG of 108 megapixels": png_of(10_400),
    "PNG of 3600 megapixels": png_of(60_000),
}


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("data", BROKEN.values(), ids=BROKEN)
def test_what_is_no_whole_image_is_refused(data):
    with pytest.raises((OSError, SyntaxError, ValueError)):
        decodable(data)


def test_an_empty_file_is_said_to_be_no_image():
    with pytest.raises(ValueError, match="not an image"):
        decodable(b"")


@pytest.mark.filterwarnings("ignore")
def test_whatever_pil_raises_is_one_kind_of_error():
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded(Image.fromarray(smooth(20, 30)), "JPEG", exif=exif)
    start = data.index(b"Exif\0\0") + 6
    rng = np.random.default_rng(0)
    refused = 0
    for _ in range(3000):
        damaged = bytearray(data)
        for place in rng.integers(start, start + 40, 4):
            damaged[place] = rng.integers(0, 256)
        try:
            decodable(bytes(damaged))
        except ValueError:
            refused += 1
    assert refused


# The pipeline
