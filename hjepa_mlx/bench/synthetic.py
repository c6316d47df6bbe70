"""Made-up images of a data set's size and format, for when the data set is not on this machine."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

from hjepa_mlx.data.catalog import Dataset
from hjepa_mlx.data.source import Source, make_source
from hjepa_mlx.data.storage import Pixels

IMAGES = 4096  # in the source
DIFFERENT = 32  # photographs among them
QUALITY = 92  # 99 KB a picture, a little less than ImageNet's mean of 110


def synthetic(dataset: Dataset) -> Source:
    """JPEG photographs of 500 × 375 for data sets published as files, else raw pixels."""
    if dataset.resolution < 224:
        side = 32 if dataset.resolution == 28 else dataset.resolution
        pixels = np.random.default_rng(0).integers(0, 256, (IMAGES, side, side, 3), np.uint8)
        return make_source(dataset.name, Pixels(pixels, "made-up"))
    files = [io.BytesIO() for _ in range(DIFFERENT)]
    for number, file in enumerate(files):
        photograph(number).save(file, "JPEG", quality=QUALITY)
    encoded = np.array([file.getvalue() for file in files], object)
    images = Pixels(np.resize(encoded, IMAGES), "made-up")
    images.encoded = True
    return make_source(dataset.name, images)


def photograph(number: int) -> Image.Image:
    """A picture whose spectrum falls with frequency as a photograph's does."""
    random, shape = np.random.default_rng(number), (375, 500)
    y, x = np.fft.fftfreq(shape[0])[:, None, None], np.fft.rfftfreq(shape[1])[:, None]
    falling = np.maximum(np.hypot(y, x), 1 / shape[1]) ** -1.2
    noise = random.normal(size=(*shape, 1)) + 0.3 * random.normal(size=(*shape, 3))
    picture = np.fft.irfft2(falling * np.fft.rfft2(noise, axes=(0, 1)), shape, axes=(0, 1))
    shades = 120 + 48 * picture / picture.std()
    return Image.fromarray(np.clip(shades, 0, 255).astype(np.uint8))
