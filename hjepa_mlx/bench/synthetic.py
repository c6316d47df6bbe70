"""Made-up images of a data set's size and format, for when the data set is not on this machine."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

from hjepa_mlx.data.catalog import Dataset
from hjepa_mlx.data.source import Source, make_source

IMAGES = 4096  # in the source
DIFFERENT = 32  # photographs among them
QUALITY = 92  # 99 KB a picture, a little less than ImageNet's mean of 110


class Repeated:
    """Images in memory, over and over: pixels [N, H, W, 3] uint8, or the bytes of JPEG files."""

    def __init__(self, images: np.ndarray | list[bytes]) -> None:
        self.images, self.encoded = images, isinstance(images, list)

    def __len__(self) -> int:
        return IMAGES

    def read(self, index: int) -> np.ndarray | bytes:
        """Pixels or file of image `index`."""
        return self.images[index % len(self.images)]

    def name(self, index: int) -> str:
        """The name of image `index` in messages."""
        return f"made-up[{index}]"

    def fingerprint(self) -> str:
        """The same for all: no run depends on made-up images."""
        return "made-up"


def synthetic(dataset: Dataset) -> Source:
    """JPEG photographs of 500 × 375 for data sets published as files, else raw pixels."""
    if dataset.resolution < 224:
        side = 32 if dataset.resolution == 28 else dataset.resolution
        pixels = np.random.default_rng(0).integers(0, 256, (IMAGES, side, side, 3), np.uint8)
        return make_source(dataset.name, Repeated(pixels))
    files = [io.BytesIO() for _ in range(DIFFERENT)]
    for number, file in enumerate(files):
        photograph(number).save(file, "JPEG", quality=QUALITY)
    return make_source(dataset.name, Repeated([file.getvalue() for file in files]))


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
