"""Made-up images of a data set's size and format, for measuring pipelines where it is not here."""

from __future__ import annotations

import io
from functools import cache

import numpy as np
from PIL import Image

from hjepa_mlx.data.catalog import Dataset
from hjepa_mlx.data.source import Source, make_source
from hjepa_mlx.data.storage import Pixels

IMAGES = 4096  # in the source; of these, so many are different:
DIFFERENT = 32
QUALITY = 92  # 99 KB a picture, a little less than ImageNet's mean of 110


class Repeated:
    """JPEG files in memory, over and over."""

    encoded = True

    def __init__(self, files: list[bytes], count: int) -> None:
        self.files, self.count = files, count

    def __len__(self) -> int:
        return self.count

    def read(self, index: int) -> bytes:
        """Image `index` as a file."""
        return self.files[index % len(self.files)]

    def name(self, index: int) -> str:
        """What to call image `index` in messages."""
        return f"made-up[{index}]"

    def fingerprint(self) -> str:
        """They are the same everywhere."""
        return "made-up"


def synthetic(dataset: Dataset) -> Source:
    """JPEG photographs of 500 × 375 for what is published as files, else raw pixels."""
    if dataset.resolution < 224:
        side = 32 if dataset.resolution == 28 else dataset.resolution
        pixels = np.random.default_rng(0).integers(0, 256, (IMAGES, side, side, 3), np.uint8)
        return make_source(dataset.name, Pixels(pixels, dataset.name))
    return make_source(dataset.name, Repeated(_photographs(), IMAGES))


@cache
def _photographs() -> list[bytes]:
    files = [io.BytesIO() for _ in range(DIFFERENT)]
    for number, file in enumerate(files):
        photograph(number).save(file, "JPEG", quality=QUALITY)
    return [file.getvalue() for file in files]


def photograph(number: int, height: int = 375, width: int = 500) -> Image.Image:
    """A picture whose spectrum falls with frequency as a photograph's does."""
    random = np.random.default_rng(number)
    y, x = np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None]
    falling = 1 / np.maximum(np.hypot(y, x), 1 / width) ** 1.15
    grey = np.fft.irfft2(
        falling * np.fft.rfft2(random.normal(size=(height, width))), (height, width)
    )
    tints = np.fft.irfft2(
        (falling**1.5)[..., None]
        * np.fft.rfft2(random.normal(size=(height, width, 3)), axes=(0, 1)),
        (height, width),
        axes=(0, 1),
    )
    picture = 120 + 45 * (grey / grey.std())[..., None] + 20 * tints / tints.std()
    return Image.fromarray(np.clip(picture, 0, 255).astype(np.uint8))
