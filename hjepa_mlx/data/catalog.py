"""The catalog: facts about each data set, for everything that shows or checks them.

The rows are in catalog.yaml. `Promise` holds what the project's founding comparison of data sets
expects of 100 epochs of ViT-S on an M1 Max: estimates, none of them measured here.
"""

from __future__ import annotations

from pathlib import Path

import yaml
from pydantic import BaseModel, ConfigDict

from hjepa_mlx.errors import check_choice

HERE = Path(__file__).parent
Range = tuple[int, int]


class _Row(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Promise(_Row):
    """Expected of 100 epochs on an M1 Max; accuracies and rank (of the dimension) in per cent."""

    hours: Range
    linear_probe: Range
    knn: Range
    rank: int


class Published(_Row):
    """The nearest figures that somebody has published, in per cent, and what they are of."""

    linear_probe: float
    knn: float
    of: str


class Remote(_Row):
    """A file to download: its URL, published MD5 and size (for progress and disk space)."""

    url: str
    md5: str
    size: int

    @property
    def name(self) -> str:
        """The file's name."""
        return self.url.rsplit("/", 1)[1]


class Binary(_Row):
    """A binary version, [N] records of three planes: its folder, and how it is laid out.

    images: the files of each split. labels: the files whose bytes are the labels from 1; without
    any, a label from 0 comes first in each record. axes: of a record's [3, ...] as [H, W, 3].
    """

    folder: str
    images: dict[str, list[str]]
    labels: dict[str, str] = {}
    axes: tuple[int, int, int]


class Dataset(_Row):
    """One data set.

    splits: number of images of `pretrain`, `train` (labelled, evaluation learns from it), `test`.
    files: those that `download` fetches from the web. hub: repository on Hugging Face.
    archives: files to get by hand, and their MD5.
    """

    name: str
    title: str
    splits: dict[str, int]
    resolution: int
    classes: int
    download_gb: float
    terms: str
    goal: str
    promise: Promise | None = None
    published: Published | None = None
    files: tuple[Remote, ...] = ()
    hub: str | None = None
    archives: dict[str, str] = {}
    parts: tuple[str, ...] = ()
    class_names: tuple[str, ...] = ()
    binary: Binary | None = None

    @property
    def images(self) -> int:
        """Images of one epoch of pretraining."""
        return self.splits["pretrain"]

    @property
    def stored_splits(self) -> tuple[str, ...]:
        """The splits that are prepared: pretrain only where it has other images than train."""
        same = self.splits["pretrain"] == self.splits["train"]
        return ("train", "test") if same else ("pretrain", "train", "test")


_ROWS = yaml.safe_load((HERE / "catalog.yaml").read_text())
CATALOG = {name: Dataset(name=name, **row) for name, row in _ROWS.items()}
CMC, KAGGLE, IMAGENET = "CMC's ImageNet-100", "Kaggle's ImageNet-100", "ImageNet-1K"
KAGGLE_IMAGES = 130_000  # for training; 5,000 for evaluation, as in CMC's


def look_up(name: str) -> Dataset:
    """The catalog's row; UsageError with the nearest name when there is none."""
    check_choice("data set", name, CATALOG)
    return CATALOG[name]


def class_list(name: str) -> tuple[str, ...]:
    """WordNet ids of an ImageNet-100: 'cmc' or 'kaggle', in the order of its labels.

    cmc: imagenet100.txt of Tian et al. (ECCV 2020); kaggle: Labels.json of ambityga/imagenet100.
    """
    return tuple((HERE / "classes" / f"imagenet100-{name}.txt").read_text().split())


def class_list_name(classes: tuple[str, ...]) -> str:
    """Which ImageNet list these WordNet ids are, in words."""
    for name, words in (("cmc", CMC), ("kaggle", KAGGLE)):
        if set(classes) == set(class_list(name)):
            return words
    return IMAGENET if len(classes) == 1000 else f"an unknown list of {len(classes)} classes"
