"""A source: the images of one split of a data set, by number, with their labels."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from hjepa_mlx.data.images import as_ppm, decodable
from hjepa_mlx.data.storage import Images
from hjepa_mlx.errors import UsageError
from hjepa_mlx.rng import generator

# what is pretrained on; the labelled images that evaluation learns from; those it is judged on
Split = Literal["pretrain", "train", "test"]


@dataclass(frozen=True)
class Source:
    """Images of one split: those numbered `rows` [N] of a storage.

    `labels` [N] int64 index `classes`; both are empty when the data set has no classes. `parts`
    are the numbers of images of each data set, in order, when there are several; `shares` how many
    of each a pass shows, when that is not all of them.
    """

    name: str
    images: Images
    rows: np.ndarray
    labels: np.ndarray
    classes: tuple[str, ...]
    parts: tuple[int, ...] = ()
    shares: tuple[int, ...] = ()

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def encoded(self) -> bool:
        """Whether `read` gives the bytes of an image file instead of pixels."""
        return self.images.encoded

    @property
    def fingerprint(self) -> str:
        """A string that other images would change."""
        names = [os.path.basename(self.name_of(i)) for i in range(len(self))]
        text = repr((names, self.labels.tolist())).encode("utf-8", "surrogateescape")
        return hashlib.sha256(text).hexdigest()

    def read(self, index: int) -> np.ndarray:
        """Image `index`; OSError or ValueError when it cannot be read.

        StorageError when the data set as a whole cannot be.
        """
        image = self.images.read(int(self.rows[index]))
        if isinstance(image, bytes):
            return decodable(image)
        if image.shape[2] == 1:
            image = np.repeat(image, 3, 2)
        return as_ppm(image) if self.encoded else np.ascontiguousarray(image)

    def name_of(self, index: int) -> str:
        """What to call image `index` in messages."""
        return self.images.name(int(self.rows[index]))

    def take(self, indices: np.ndarray) -> Source:
        """The source with only these images."""
        labels = self.labels[indices] if self.classes else self.labels
        return replace(self, rows=self.rows[indices], labels=labels, parts=(), shares=())

    def some(self, count: int | None, purpose: str) -> Source:
        """`count` random images, always the same for one purpose; all where there are no more."""
        if count is None or count >= len(self):
            return self
        return self.take(np.sort(generator(0, purpose).permutation(len(self))[:count]))

    def pass_order(self, seed: int, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Two [N] arrays: the image at each place of pass `number`, and its row of random numbers.

        Every image stands there once; with `shares`, as often as its data set's share asks for.
        """
        chosen = np.arange(len(self))
        if self.shares:
            starts = np.cumsum([0, *self.parts])
            draws = generator(seed, "mix", number)
            chosen = np.concatenate(
                [
                    start + np.resize(draws.permutation(count), share)
                    for start, count, share in zip(starts, self.parts, self.shares, strict=False)
                ]
            )
        places = generator(seed, "shuffle", number).permutation(len(chosen))
        return chosen[places], places


def make_source(
    name: str,
    images: Images,
    labels: np.ndarray | None = None,
    classes: tuple[str, ...] = (),
) -> Source:
    """All images of a storage."""
    labels = np.zeros(0, np.int64) if labels is None else labels.astype(np.int64)
    return Source(name, images, np.arange(len(images)), labels, classes)


def check_same_classes(train: Source, test: Source) -> None:
    """Refuse splits whose labels do not mean the same."""
    if train.classes != test.classes:
        one, other = set(train.classes), set(test.classes)
        only = [f"{name} for training" for name in sorted(one - other)]
        only += [f"{name} for testing" for name in sorted(other - one)]
        advice = "" if one and other else " (classes are subfolders that hold every image)"
        raise UsageError(
            f"{train.name}: training and test images have different classes: {len(one)} and "
            f"{len(other)}{advice}; only {', '.join(only[:3])}{', …' if len(only) > 3 else ''}."
        )
