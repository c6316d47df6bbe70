"""The size and the part of images that training and evaluation look at."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from hjepa_mlx.config import Config
from hjepa_mlx.errors import UsageError, check_choice

CROP_TRIES = 10  # as in torchvision's RandomResizedCrop
CROP_NUMBERS = 2 * CROP_TRIES + 3  # area and aspect of each try; row, column, flip
CROP_ASPECT = (3 / 4, 4 / 3)  # likewise

Box = tuple[int, int, int, int]  # top, left, height, width


class Frame(NamedTuple):
    """The size that images have for evaluation; whole: the whole image is resized to it.

    Otherwise its largest central part of the same shape is.
    """

    height: int
    width: int
    whole: bool = False

    @classmethod
    def of(
        cls, config: Config, size: tuple[int, int] | int | None = None, fit: str = "crop"
    ) -> Frame:
        """The frame for `size`, or height and width, in pixels (default: as trained), and `fit`.

        Raises UsageError for a size that does not divide into patches, and an unknown `fit`.
        """
        size = size or config.data.image_size
        height, width = (size, size) if isinstance(size, int) else size
        p = config.model.patch_size
        if min(height, width) < p or height % p or width % p:
            asked = f"{height}×{width}"
            raise UsageError(f"The image size {asked} is not a multiple of the patch size {p}.")
        check_choice("fit", fit, ("crop", "whole"))
        return cls(height, width, fit == "whole")

    def box(self, height: int, width: int) -> Box:
        """The part of an image of `height` × `width` that is resized to the frame."""
        if self.whole:
            return 0, 0, height, width
        h = max(1, min(height, width * self.height // self.width))
        w = max(1, min(width, height * self.width // self.height))
        return (height - h) // 2, (width - w) // 2, h, w


def random_box(numbers: np.ndarray, height: int, width: int, scale: list[float]) -> Box:
    """A random resized crop from CROP_NUMBERS uniform numbers.

    Area is uniform in `scale`, aspect (width/height) log-uniform in CROP_ASPECT; the first try
    that fits is taken. Where none does, the largest central crop within CROP_ASPECT.
    """
    low, high = np.log(CROP_ASPECT)
    for u, v in numbers[: 2 * CROP_TRIES].reshape(CROP_TRIES, 2):
        area = height * width * (scale[0] + u * (scale[1] - scale[0]))
        aspect = np.exp(low + v * (high - low))
        w, h = round(float(np.sqrt(area * aspect))), round(float(np.sqrt(area / aspect)))
        if 0 < w <= width and 0 < h <= height:
            row, column = numbers[2 * CROP_TRIES], numbers[2 * CROP_TRIES + 1]
            return int(row * (height - h + 1)), int(column * (width - w + 1)), h, w
    w = min(width, max(1, round(height * CROP_ASPECT[1])))
    h = min(height, max(1, round(width / CROP_ASPECT[0])))
    return (height - h) // 2, (width - w) // 2, h, w
