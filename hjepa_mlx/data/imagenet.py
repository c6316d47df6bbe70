"""ImageNet-100 and ImageNet-1K, in every layout they are found in.

Prepared shards, Hugging Face's parquet files, ImageNet's own tars (nested ones too), Kaggle's
folders, and train/ and val/ with a folder per class. An ImageNet-100 is also cut out of an
ImageNet-1K that lies beside it.
"""

from __future__ import annotations

import csv
import io
import json
import os
import re
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from hjepa_mlx.data import shards
from hjepa_mlx.data.archives import tar_index
from hjepa_mlx.data.catalog import class_list
from hjepa_mlx.data.parquet import Parquet
from hjepa_mlx.data.source import Source, Split, make_source
from hjepa_mlx.data.storage import Files, Members, StorageError, image_paths
from hjepa_mlx.errors import HJEPAError
from hjepa_mlx.progress import bar

KAGGLE_ROOT = Path("ILSVRC/Data/CLS-LOC")
KAGGLE_PARTS = (["train.X1", "train.X2", "train.X3", "train.X4"], ["val.X"])
DEVKIT = "ILSVRC2012_devkit_t12"
CMC_FIRST = "bonnet, poke bonnet"  # label 0 of clane9/imagenet-100, in words


def find(name: str, places: list[Path], split: Split) -> Source | None:
    """The split in the first layout found, or None."""
    found = layout(name, places)
    if found is None:
        return None
    words, place = found
    source = LAYOUTS[words][1](place, split)
    return _in_order(replace(source, name=name), name == "imagenet100")


def layout(name: str, places: list[Path]) -> tuple[str, Path] | None:
    """Which layout is found, in words, and in which folder; a quick look only."""
    if name == "imagenet100":
        places = [*places, places[-1] / "imagenet1k"]
    for place in places:
        for words, (recognise, _) in LAYOUTS.items():
            if recognise(place):
                return words, place
    return None


def _in_order(source: Source, hundred: bool) -> Source:
    """Classes in the order of their published list; the hundred of CMC out of more."""
    known = set(source.classes)
    for order in map(class_list, ("cmc", "kaggle")):
        if known <= set(order) or (hundred and order[0] in known and set(order) <= known):
            return _with_classes(source, tuple(name for name in order if name in known))
    if hundred and len(known) > 100:
        raise HJEPAError(
            f"Of these {len(known)} classes no hundred can be chosen: they are not named by "
            f"WordNet ids (the first is {source.classes[0]!r}). Train on imagenet1k, or use "
            "ImageNet's own archives."
        )
    return source


def _with_classes(source: Source, classes: tuple[str, ...]) -> Source:
    if classes == source.classes:
        return source
    number = {name: i for i, name in enumerate(classes)}
    renamed = np.array([number.get(name, -1) for name in source.classes], np.int64)
    labels = renamed[source.labels]
    kept = np.flatnonzero(labels >= 0)
    return replace(source.take(kept), labels=labels[kept], classes=classes)


def _shard_folder(place: Path) -> Path | None:
    return next((f for f in (place / shards.FOLDER, place) if shards.complete(f)), None)


def _shards(place: Path, split: Split) -> Source:
    folder = _shard_folder(place)
    assert folder is not None
    return make_source("", *shards.read(folder, split))


def _parquet_folder(place: Path) -> Path | None:
    folders = (place / "data", place)
    return next((f for f in folders if next(f.glob("train-*.parquet"), None)), None)


def _parquet(place: Path, split: Split) -> Source:
    folder = _parquet_folder(place)
    assert folder is not None
    stem = "train" if split != "test" else "val*"
    paths = sorted(folder.glob(f"{stem}-*.parquet"))
    _check_parts(folder, stem, paths)
    images = Parquet(paths)
    labels = images.labels()
    names = images.label_names() or ()
    if names[:1] == (CMC_FIRST,) or (not names and labels.max(initial=0) < 100):
        names = class_list("cmc")
    if labels.min(initial=0) < 0 or labels.max(initial=0) >= len(names):
        raise HJEPAError(
            f"{folder}: labels reach from {labels.min()} to {labels.max()}, for {len(names)} "
            "classes. Only labelled splits can be used."
        )
    return make_source("", images, labels, names)


def _check_parts(folder: Path, stem: str, paths: list[Path]) -> None:
    """Refuse a set of files `train-00003-of-00017…` that is not complete."""
    numbers = {path.name.split("-of-")[0].rsplit("-", 1)[1] for path in paths}
    totals = {path.name.split("-of-")[1][:5] for path in paths if "-of-" in path.name}
    if not paths or (totals and len(numbers) != int(max(totals))):
        raise HJEPAError(
            f"{folder} has {len(numbers)} of {max(totals, default='1').lstrip('0')} parquet files "
            f"{stem}-*. Go on with the download, or put the rest there."
        )


def _train_tar(place: Path) -> Path | None:
    return _first(place, "ILSVRC2012_img_train.tar", "train.tar")


def _tars(place: Path, split: Split) -> Source:
    train = _train_tar(place)
    path = train if split != "test" else _first(place, "ILSVRC2012_img_val.tar", "val.tar")
    if path is None:
        raise HJEPAError(f"{train} is there, but ILSVRC2012_img_val.tar is not beside it.")
    done = 0

    def advance(position: int) -> None:
        nonlocal done
        move(max(0, position - done))
        done = max(done, position)

    with bar(f"Reading the index of {path.name}", path.stat().st_size) as move:
        index = tar_index(path, advance)
    groups, group = index.groups, index.group
    if len(groups) < 2:  # the validation images, all in one folder
        wanted = [os.fsdecode(name) for name in index.names]
        groups, group = _by_ground_truth(place, wanted)
    zeros = np.zeros(len(index.offset), np.uint8)
    return make_source("", Members([path], zeros, index.offset, index.size), group, groups)


def _kaggle_parts(place: Path) -> list[Path]:
    return sorted(place.glob("train.X[0-9]"))  # one is enough: the others are then asked for


def _kaggle_folders(place: Path, split: Split) -> Source:
    """ambityga/imagenet100: train.X1 … train.X4, val.X, Labels.json."""
    parts = [place / name for name in KAGGLE_PARTS[split == "test"]]
    order: tuple[str, ...] = ()
    if (place / "Labels.json").is_file():
        try:
            order = tuple(dict(json.loads((place / "Labels.json").read_text())))
        except (OSError, ValueError, TypeError) as error:
            raise StorageError(f"{place / 'Labels.json'} cannot be read ({error}).") from error
    for part in parts:
        if not part.is_dir():
            raise HJEPAError(f"{place}: {part.name} is missing.")
    paths = [path for part in parts for path in image_paths(part)]
    return _by_folder(place, paths, order)


def _folder_root(place: Path) -> Path | None:
    return next((r for r in (place, place / KAGGLE_ROOT) if _has_classes(r / "train")), None)


def _has_classes(folder: Path) -> bool:
    """Whether folders named by WordNet ids lie in it."""
    try:
        with os.scandir(folder) as entries:
            return any(re.fullmatch(r"n\d{8}", entry.name) for entry in entries)
    except OSError:
        return False


def _folders(place: Path, split: Split) -> Source:
    root = _folder_root(place)
    assert root is not None
    if split != "test":
        return _by_folder(place, image_paths(root / "train"))
    val = _first(root, "val", "validation")
    if val is None:
        raise HJEPAError(f"{root / 'train'} is there, but val/ is not beside it.")
    paths = image_paths(val)
    if paths and all(os.path.dirname(path) == str(val) for path in paths):
        classes, labels = _by_ground_truth(place, [os.path.basename(path) for path in paths])
        return make_source("", Files(place, paths), labels, classes)
    return _by_folder(place, paths)


def _by_folder(place: Path, paths: list[str], order: tuple[str, ...] = ()) -> Source:
    """Each image's class is the folder it lies in."""
    if not paths:
        raise HJEPAError(f"{place}: there are no images in its class folders.")
    folders = [os.path.basename(os.path.dirname(path)) for path in paths]
    classes = tuple(sorted(set(folders)))
    if set(order) == set(classes):
        classes = order
    number = {name: i for i, name in enumerate(classes)}
    labels = np.array([number[folder] for folder in folders])
    return make_source("", Files(place, paths), labels, classes)


def _first(place: Path, *names: str) -> Path | None:
    return next((place / name for name in names if (place / name).exists()), None)


def _by_ground_truth(place: Path, names: list[str]) -> tuple[tuple[str, ...], np.ndarray]:
    """Classes and labels of the validation images, whose files do not say them."""
    truth = _ground_truth(place)
    stems = [os.path.splitext(name)[0] for name in names]
    unknown = next((stem for stem in stems if stem not in truth), None)
    if unknown is not None:
        raise HJEPAError(f"{place}: the ground truth does not name the image {unknown}.")
    classes = tuple(sorted(set(truth.values())))
    number = {name: i for i, name in enumerate(classes)}
    return classes, np.array([number[truth[stem]] for stem in stems])


def _ground_truth(place: Path) -> dict[str, str]:
    """WordNet id of each validation image, from Kaggle's table or ImageNet's development kit."""
    table = _first(place, "LOC_val_solution.csv")
    if table is not None:
        try:
            with open(table, newline="") as file:
                rows = csv.DictReader(file)
                return {row["ImageId"]: row["PredictionString"].split()[0] for row in rows}
        except (OSError, ValueError, LookupError, AttributeError, csv.Error) as error:
            raise StorageError(f"{table} cannot be read ({error!r}).") from error
    kit = _first(place, DEVKIT, f"{DEVKIT}.tar.gz")
    if kit is None:
        raise HJEPAError(
            f"{place} does not say which class a validation image has: put {DEVKIT}.tar.gz (from "
            "image-net.org) or Kaggle's LOC_val_solution.csv there."
        )
    numbers = _kit_file(kit, "ILSVRC2012_validation_ground_truth.txt").split()
    ids = _synsets(_kit_file(kit, "meta.mat"))
    try:
        return {
            f"ILSVRC2012_val_{image:08d}": ids[int(number)]
            for image, number in enumerate(numbers, 1)
        }
    except (ValueError, KeyError) as error:
        raise StorageError(
            f"{kit}: ILSVRC2012_validation_ground_truth.txt names no class ({error!r})."
        ) from error


def _kit_file(kit: Path, name: str) -> bytes:
    inside = f"{DEVKIT}/data/{name}"
    try:
        if kit.is_dir():
            return (kit / "data" / name).read_bytes()
        with tarfile.open(kit) as tar:
            file = tar.extractfile(inside)
            return file.read(1 << 26) if file else b""
    except (OSError, KeyError, EOFError, tarfile.TarError) as error:
        raise StorageError(f"{kit} has no readable {inside} ({error}).") from error


def _synsets(meta: bytes) -> dict[int, str]:
    """ILSVRC2012_ID → WordNet id of the classes in the development kit's meta.mat."""
    from scipy.io import loadmat
    from scipy.io.matlab import MatReadError

    try:
        synsets = loadmat(io.BytesIO(meta), squeeze_me=True)["synsets"]
        leaves = synsets[synsets["num_children"].astype(int) == 0]
        pairs = zip(leaves["ILSVRC2012_ID"], leaves["WNID"], strict=True)
        return {int(number): str(name) for number, name in pairs}
    except (OSError, ValueError, LookupError, TypeError, NameError, MatReadError) as error:
        raise StorageError(f"ImageNet's meta.mat cannot be read ({error}).") from error


# in words: how to recognise it in a folder, how to open a split of it; the fastest first
LAYOUTS: dict[str, tuple[Callable[[Path], Any], Callable[[Path, Split], Source]]] = {
    "prepared shards": (_shard_folder, _shards),
    "parquet files": (_parquet_folder, _parquet),
    "tar archives": (_train_tar, _tars),
    "Kaggle's folders": (_kaggle_parts, _kaggle_folders),
    "folders": (_folder_root, _folders),
}
