"""`shrunk`: any image file becomes an upright RGB JPEG of the wished size."""

import io

import numpy as np
import pytest
from PIL import Image
from test_images import decode, difference, encoded, smooth

from hjepa_mlx.data.images import shrunk


@pytest.mark.parametrize(
    ("height", "width", "side"),
    [(300, 400, 256), (400, 300, 256), (257, 257, 256), (256, 1000, 256), (1500, 2000, 128)],
)
def test_the_short_side_is_reduced_to_the_wish_and_never_enlarged(height, width, side):
    data = encoded(Image.fromarray(smooth(height, width)), "JPEG", quality=95)
    small = Image.open(io.BytesIO(shrunk(data, side, 90)))
    assert min(small.size) == side
    assert abs(small.width / small.height - width / height) < 0.01
    pil = Image.open(io.BytesIO(data)).resize(small.size, Image.Resampling.BICUBIC)
    assert np.abs(np.asarray(small).astype(int) - np.asarray(pil)).mean() < 2


def test_a_small_upright_jpeg_stays_byte_for_byte():
    data = encoded(Image.fromarray(smooth(100, 200)), "JPEG", quality=60)
    assert shrunk(data, 256, 90) == shrunk(data, 100, 90) == data
    assert shrunk(data, 99, 90) != data


def odd_pictures() -> dict[str, bytes]:
    """Files that mlx-data cannot decode."""
    image = Image.fromarray(smooth(90, 120))
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held upright: the picture is turned right by 90 degrees
    deep = Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) << 8)
    clear = Image.fromarray(np.dstack([np.asarray(image), np.zeros((90, 120), np.uint8)]))
    return {
        "rotated": encoded(image, "JPEG", exif=exif),
        "grey": encoded(image.convert("L"), "JPEG"),
        "cmyk": encoded(image.convert("CMYK"), "JPEG"),
        "webp": encoded(image, "WEBP", lossless=True),
        "16 bit": encoded(deep, "PNG"),
        "transparent": encoded(clear, "PNG"),
        "palette": encoded(image.quantize(256), "PNG"),
    }


@pytest.mark.parametrize("side", [256, 45])
@pytest.mark.parametrize("kind", odd_pictures())
def test_odd_pictures_become_upright_rgb_jpegs(kind, side):
    data = odd_pictures()[kind]
    made = Image.open(io.BytesIO(shrunk(data, side, 95)))
    assert (made.format, made.mode, made.getexif().get(0x0112)) == ("JPEG", "RGB", None)
    picture = Image.fromarray(decode(data))  # test_images.py compares it with PIL's
    if side == 45:
        picture = picture.resize([length // 2 for length in picture.size], Image.Resampling.BICUBIC)
    assert difference(np.asarray(made), np.asarray(picture)).mean() < 4
