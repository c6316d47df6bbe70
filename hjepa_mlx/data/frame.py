"""The size and the part of images that evaluation looks at."""

from __future__ import annotations

from typing import NamedTuple

from hjepa_mlx.config import Config
from hjepa_mlx.errors import UsageError

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
        if fit not in ("crop", "whole"):
            raise UsageError(f"There is no fit '{fit}'; there are crop and whole.")
        return cls(height, width, fit == "whole")

    def box(self, height: int, width: int) -> Box:
        """The part of an image of `height` × `width` that is resized to the frame."""
        if self.whole:
            return 0, 0, height, width
        h = max(1, min(height, width * self.height // self.width))
        w = max(1, min(width, height * self.width // self.height))
        return (height - h) // 2, (width - w) // 2, h, w
