"""Pipelines: a source becomes batches of uint8 images [B, S, S, 3], decoded by mlx-data's threads.

Random numbers come from (seed, pass, image), never from a thread, so the same images come out
whatever the number of workers, and a run can be resumed in the middle of a pass.
"""

from __future__ import annotations

import atexit
import itertools
import threading
import weakref
from collections import deque
from collections.abc import Generator, Iterator
from contextlib import closing
from typing import Any, NamedTuple

import mlx.data as dx
import numpy as np

from hjepa_mlx import backend, world
from hjepa_mlx.config import Config
from hjepa_mlx.data.frame import CROP_NUMBERS, Frame, random_box
from hjepa_mlx.data.images import UNREADABLE, as_ppm
from hjepa_mlx.data.source import Source
from hjepa_mlx.data.storage import StorageError
from hjepa_mlx.rng import generator

CHUNK = 32_768  # images whose order mlx-data is told at once: this bounds memory
RAW_CHUNK = 512  # likewise where the chunk's pixels are read at once
END_WAIT = 5.0  # seconds to wait for mlx-data's threads


class Position(NamedTuple):
    """A place in the endless sequence of passes over a source: where the next batch begins."""

    number: int = 0  # of the pass
    offset: int = 0  # images of the pass already used


class Batch(NamedTuple):
    """Training images [B, S, S, 3] uint8, where the next batch begins, and their numbers [B]."""

    images: np.ndarray
    next: Position
    numbers: np.ndarray  # in the source


class Skipped(dict[str, str]):
    """Images that could not be read: name → reason."""

    def first(self) -> str:
        """The first one, in words."""
        return next((f"First: {name}: {why}." for name, why in self.items()), "")


def training_batches(
    source: Source, config: Config, start: Position = Position(), skipped: Skipped | None = None
) -> Generator[Batch, None, None]:
    """Shuffled, randomly cropped and flipped batches without end, pass after pass.

    The last, incomplete batch of a pass is dropped. An image that cannot be read is noted in
    `skipped`, and one from the same row of a later batch is shown in its place. On several ranks
    each reads and gets its own rows. Raises StorageError when none of the images can be read.
    """
    skipped = Skipped() if skipped is None else skipped
    B, S, n = config.data.batch_size, config.data.image_size, len(source)
    if n < B:
        raise StorageError(f"{source.name}: {n} images are too few for data.batch_size={B}.")
    for number in itertools.count(start.number):
        offset = start.offset if number == start.number else 0
        order = source.pass_order(config.seed, number)
        draws = generator(config.seed, "crop", number)
        crops = draws.random((n, CROP_NUMBERS), dtype=np.float32)[order]
        batches = np.arange(offset, offset + (n - offset) // B * B).reshape(-1, B)
        batches = batches[:, world.rows(B)]
        with closing(_at(batches.ravel(), source, order, config, crops, skipped)) as found:
            for places in batches:
                images = np.empty((len(places), S, S, 3), np.uint8)
                numbers = np.empty(len(places), np.int64)
                for row, place in enumerate(places):
                    numbers[row], image = next(found)
                    _put(images[row], image, config.data.flip and crops[place, -1] < 0.5)
                offset += B
                following = Position(number, offset) if n - offset >= B else Position(number + 1)
                yield Batch(images, following, numbers)


def _at(
    places: np.ndarray,
    source: Source,
    order: np.ndarray,
    config: Config,
    crops: np.ndarray,
    skipped: Skipped,
) -> Generator[tuple[int, np.ndarray], None, None]:
    """(number, image [S, S, 3]) for each of some places in `order`."""
    done, bad = 0, set[int]()
    with closing(_samples(source, order[places], config, crops[places], skipped)) as samples:
        for at, image in itertools.chain(samples, [(len(places), None)]):
            for place in places[done:at].tolist():
                bad.add(int(order[place]))
                yield _instead(place, source, order, config, crops[[place]], skipped, bad)
            if image is not None:
                yield int(order[places[at]]), image
            done = at + 1


def _instead(
    place: int,
    source: Source,
    order: np.ndarray,
    config: Config,
    crop: np.ndarray,
    skipped: Skipped,
    bad: set[int],
) -> tuple[int, np.ndarray]:
    """(number, image) from the next readable place in the row, or else in the pass.

    bad: numbers of unreadable images, which this adds to.
    """
    B, n = config.data.batch_size, len(order)
    same_row = itertools.chain(range(place + B, n, B), range(place % B, place, B))
    for other in itertools.chain(same_row, range(place + 1, n), range(place)):
        number = int(order[other])
        if number not in bad:
            for _, image in _samples(source, order[[other]], config, crop, skipped):
                return number, image
            bad.add(number)
    raise StorageError(f"{source.name}: none of {n} images can be read. {skipped.first()}")


def evaluation_images(
    source: Source, config: Config, skipped: Skipped, frame: Frame | None = None
) -> Iterator[tuple[int, np.ndarray]]:
    """(index, image [H, W, 3] uint8) of every readable image in order.

    frame: their size and part; by default the central square at the size trained on.
    """
    return _samples(source, np.arange(len(source)), config, None, skipped, frame)


def _put(target: np.ndarray, image: np.ndarray, mirrored: bool) -> None:
    """Copy [S, S, 3], mirrored if so wished: by planes, five times faster than by pixels."""
    if not mirrored:
        target[...] = image
        return
    for channel in range(3):
        target[..., channel] = image[:, ::-1, channel]


def _samples(
    source: Source,
    order: np.ndarray,
    config: Config,
    crops: np.ndarray | None,
    skipped: Skipped,
    frame: Frame | None = None,
) -> Generator[tuple[int, np.ndarray], None, None]:
    """(place in `order`, image [H, W, 3]), in order, without the unreadable ones."""
    reader = _Reader(source, order, config, crops, skipped)
    reader.frame = frame or reader.frame
    size = CHUNK if source.encoded else RAW_CHUNK
    chunks = [range(begin, min(begin + size, len(order))) for begin in range(0, len(order), size)]
    try:
        for number, chunk in enumerate(chunks):
            if number == 0:
                reader.begin(chunk)
            if number + 1 < len(chunks):  # begun now, so that its first images are ready in time
                reader.begin(chunks[number + 1])
            yield from _of_chunk(reader, chunk)
    finally:
        reader.end()


def _of_chunk(reader: _Reader, chunk: range) -> Iterator[tuple[int, np.ndarray]]:
    for place in chunk:
        try:
            sample = next(reader.streams[0])
        except RuntimeError as error:  # the decoder's; the stream goes on with the next image
            name = reader.source.name_of(int(reader.order[place]))
            reader.skipped[name] = str(error)
            continue
        if reader.lost is not None:
            raise reader.lost
        if sample["readable"]:
            yield place, sample["image"]
    reader.end(1)


class _Reader:
    """Reads and crops the image at each place of `order`, in mlx-data's threads."""

    def __init__(
        self,
        source: Source,
        order: np.ndarray,
        config: Config,
        crops: np.ndarray | None,
        skipped: Skipped,
    ) -> None:
        self.source, self.order, self.crops, self.skipped = source, order, crops, skipped
        self.frame = Frame(config.data.image_size, config.data.image_size)
        self.scale = config.data.crop_scale
        self.ahead = 2 * config.data.batch_size
        workers = config.data.workers
        self.threads = min(8, backend.cpu_count()) if workers == "auto" else int(workers)
        self.lost: StorageError | None = None
        self.streams: deque[Any] = deque()  # of the chunk being read, and of the next one
        self._nothing = np.zeros((1, 1, 3), np.uint8)
        if source.encoded:
            self._nothing = as_ppm(self._nothing)

    def begin(self, places: range) -> None:
        """Start threads that make samples of `image` [H, W, 3] and `readable`, in order."""
        samples: list[dict[str, Any]] = [{"place": place} for place in places]
        if self.source.encoded:
            buffer = (
                dx.buffer_from_vector(samples)
                .sample_transform(self._read)
                .load_image("image", from_memory=True)
                .sample_transform(self._crop)
            )
        else:  # a thread would wait for Python's lock longer than this takes
            buffer = dx.buffer_from_vector([self._crop(self._read(s)) for s in samples])
        resized = buffer.image_resize("image", self.frame.width, self.frame.height)
        # with more ahead than there are samples, mlx-data would make them again and again
        ahead = min(self.ahead, len(places))
        few = len(places) == 1  # threads would take longer than the image
        stream = resized.to_stream() if few else resized.ordered_prefetch(ahead, self.threads)
        self.streams.append(stream)
        _live.add(self)

    def end(self, count: int | None = None) -> None:
        """Let go of the first `count` streams, or of all: they hold this object, and it them.

        Waits, as two readers at once would decode twice as many pictures; but not for ever: once in
        some ten thousand streams, mlx-data 0.1.0 does for a thread that missed that it should end.
        """
        streams = self.streams
        ended = [streams.popleft() for _ in range(len(streams) if count is None else count)]
        if not ended:
            return
        thread = threading.Thread(target=ended.clear, name="end-streams", daemon=True)
        _ending.add(thread)
        thread.start()
        thread.join(END_WAIT)

    def _read(self, sample: dict[str, Any]) -> dict[str, Any]:
        place = int(sample["place"])
        index = int(self.order[place])
        try:
            return {"place": place, "image": self.source.read(index), "readable": 1}
        except StorageError as error:
            self.lost = error
        except UNREADABLE as error:
            self.skipped[self.source.name_of(index)] = str(error) or type(error).__name__
        return {"place": place, "image": self._nothing, "readable": 0}

    def _crop(self, sample: dict[str, Any]) -> dict[str, Any]:
        image = sample["image"]
        height, width = image.shape[:2]
        if self.crops is None:
            top, left, h, w = self.frame.box(height, width)
        else:
            numbers = self.crops[int(sample["place"])]
            top, left, h, w = random_box(numbers, height, width, self.scale)
        cut = np.ascontiguousarray(image[top : top + h, left : left + w])
        return {"image": cut, "readable": sample["readable"]}


_live: weakref.WeakSet[_Reader] = weakref.WeakSet()
_ending: weakref.WeakSet[threading.Thread] = weakref.WeakSet()


@atexit.register
def _end_threads() -> None:
    """mlx-data's threads must end before Python does, or the process is aborted."""
    for reader in list(_live):
        reader.streams.clear()  # some Pythons start no thread any more
    for thread in list(_ending):
        thread.join(END_WAIT)
