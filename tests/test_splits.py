"""No image is both trained on and tested on, whatever layout a data set was prepared from."""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import layouts
import pytest
from evaluating import pictures
from layouts import CMC, KAGGLE

import hjepa_mlx as hj
from hjepa_mlx.data.source import Split
from hjepa_mlx.sections import Data


def split_folders(root: Path) -> None:
    pictures(root / "train", 12)
    pictures(root / "val", 3)


SPLITS: dict[str, tuple[str, str, Callable[[Path], Any]]] = {
    "a folder without splits": ("folder", "", lambda root: pictures(root, 30)),
    "a folder with splits": ("folder", "", split_folders),
    "cifar10": ("cifar10", "cifar10", layouts.cifar10),
    "stl10": ("stl10", "stl10", layouts.stl10),
    "imagenet in folders": (
        "imagenet100", "imagenet100", lambda root: layouts.folders(root, layouts.photos(CMC)),
    ),
    "imagenet in parts": (
        "imagenet100", "imagenet100",
        lambda root: layouts.kaggle_hundred(root, layouts.photos(KAGGLE)),
    ),
    "imagenet's contest": (
        "imagenet100", "imagenet1k", lambda root: layouts.kaggle_contest(root, layouts.photos(CMC)),
    ),
    "imagenet in tars": (
        "imagenet1k", "imagenet1k", lambda root: layouts.tars(root, layouts.photos(CMC[:9])),
    ),
    "imagenet in parquet": (
        "imagenet100", "imagenet100", lambda root: layouts.parquet(root, layouts.photos(CMC)),
    ),
}  # fmt: skip


@pytest.mark.parametrize("layout", SPLITS)
def test_no_test_image_is_trained_on(layout: str, tmp_path: Path) -> None:
    name, inner, make = SPLITS[layout]
    make(tmp_path / inner)
    if name != "folder":
        layouts.prepared(tmp_path, name)
    seen = {}
    for split in get_args(Split):
        source = hj.open_source(Data(name=name, dir=str(tmp_path)), split)
        names = [source.name_of(i) for i in range(len(source))]
        contents = [hashlib.sha256(source.read(i).tobytes()).digest() for i in range(len(source))]
        assert len(set(names)) == len(names) > 0
        seen[split] = {*names, *contents}
    assert seen["test"].isdisjoint(seen["train"] | seen["pretrain"])


def test_no_demo_image_is_in_both_splits() -> None:
    train, test = (hj.open_source(Data(name="demo"), split) for split in ("train", "test"))
    known = {train.read(i).tobytes() for i in range(len(train))}
    assert not any(test.read(i).tobytes() in known for i in range(len(test)))
