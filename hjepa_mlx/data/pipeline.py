"""Pipelines: a source becomes batches of uint8 images [B, S, S, 3], decoded by mlx-data's threads.

Random numbers come from (seed, pass, image), never from a thread, so the same images come out
whatever the number of workers, and a run can be resumed in the middle of a pass.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import mlx.data as dx
import numpy as np

from hjepa_mlx import backend
from hjepa_mlx.config import Config
from hjepa_mlx.data.sources import Source
from hjepa_mlx.errors import HJEPAError
from hjepa_mlx.rng import generator

CROP_TRIES = 10  # as in torchvision's RandomResizedCrop
CROP_NUMBERS = 2 * CROP_TRIES + 3  # area and aspect of each try; row, column, flip
CROP_ASPECT = (3 / 4, 4 / 3)  # likewise

Box = tuple[int, int, int, int]  # top, left, height, width


class Position(NamedTuple):
    """A place in the endless sequence of passes over a source: where the next batch begins."""

    number: int = 0  # of the pass
    offset: int = 0  # images of the pass already used


class Batch(NamedTuple):
    """Training images [B, S, S, 3] uint8, and where the batch after them begins."""

    images: np.ndarray
    next: Position


@dataclass
class Skipped:
    """Images that could not be read: name → reason."""

    reasons: dict[str, str] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.reasons)

    def first(self) -> str:
        """The first one, in words."""
        return next((f"First: {name}: {why}." for name, why in self.reasons.items()), "")


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


def central_box(height: int, width: int) -> Box:
    """The largest central square: what evaluation looks at."""
    side = min(height, width)
    return (height - side) // 2, (width - side) // 2, side, side


def training_batches(
    source: Source, config: Config, start: Position, skipped: Skipped
) -> Generator[Batch, None, None]:
    """Shuffled, randomly cropped and flipped batches without end, pass after pass.

    Images that cannot be read are noted in `skipped`; the last, incomplete batch of a pass is
    dropped. Raises HJEPAError when a whole pass gives no batch.
    """
    B = config.data.batch_size
    for number in _from(start.number):
        order = generator(config.seed, "shuffle", number).permutation(len(source))
        numbers = generator(config.seed, "crop", number).random(
            (len(source), CROP_NUMBERS), dtype=np.float32
        )
        offset = start.offset if number == start.number else 0
        images, batches, readable = [], 0, 0
        for place, image in _samples(source, order[offset:], config, numbers, skipped):
            images.append(image)
            readable += 1
            if len(images) == B:
                used = offset + place + 1
                ended = len(source) - used < B
                following = Position(number + 1) if ended else Position(number, used)
                yield Batch(np.stack(images), following)
                images, batches = [], batches + 1
                if ended:
                    break
        if not batches and not offset:
            raise HJEPAError(
                f"{source.name}: only {readable} of {len(source)} images can be read, fewer than "
                f"data.batch_size={B}. {skipped.first()}"
            )


def evaluation_images(
    source: Source, config: Config, skipped: Skipped
) -> Iterator[tuple[int, np.ndarray]]:
    """(index, image [S, S, 3] uint8) of every readable image in order: its central square."""
    order = np.arange(len(source))
    return iter(_samples(source, order, config, None, skipped))


def _from(number: int) -> Iterator[int]:
    while True:
        yield number
        number += 1


def _samples(
    source: Source, order: np.ndarray, config: Config, numbers: np.ndarray | None, skipped: Skipped
) -> Iterator[tuple[int, np.ndarray]]:
    """(place in `order`, image [S, S, 3]), in order, leaving out what cannot be read."""
    size, workers = config.data.image_size, config.data.workers
    threads = min(8, backend.cpu_count()) if workers == "auto" else int(workers)
    unreadable = np.frombuffer(bytearray(b"P6 1 1 255\n\0\0\0"), np.uint8)
    if not source.encoded:
        unreadable = np.zeros((1, 1, 3), np.uint8)

    def read(sample: dict[str, Any]) -> dict[str, Any]:
        index = int(sample["index"])
        try:
            return {"index": index, "image": source.read(index), "readable": 1}
        except (OSError, SyntaxError, ValueError, ArithmeticError, MemoryError) as error:
            skipped.reasons[source.label_of(index)] = str(error) or type(error).__name__
            return {"index": index, "image": unreadable, "readable": 0}

    def crop(sample: dict[str, Any]) -> dict[str, Any]:
        image = sample["image"]
        height, width = image.shape[:2]
        flip = False
        if numbers is None:
            top, left, h, w = central_box(height, width)
        else:
            row = numbers[int(sample["index"])]
            top, left, h, w = random_box(row, height, width, config.data.crop_scale)
            flip = config.data.flip and row[-1] < 0.5
        image = image[top : top + h, left : left + w]
        image = image[:, ::-1] if flip else image
        return {"image": np.ascontiguousarray(image), "readable": sample["readable"]}

    buffer = dx.buffer_from_vector([{"index": int(i)} for i in order]).sample_transform(read)
    if source.encoded:
        buffer = buffer.load_image("image", from_memory=True)
    stream = (
        buffer.sample_transform(crop)
        .image_resize("image", size, size)
        .ordered_prefetch(2 * config.data.batch_size, threads)
    )

    for place, index in enumerate(order):
        try:
            sample = next(stream)
        except RuntimeError as error:  # the decoder's; the stream goes on with the next image
            skipped.reasons[source.label_of(int(index))] = str(error)
            continue
        if sample["readable"]:
            yield place, sample["image"]
