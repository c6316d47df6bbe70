"""ImageNet-100 and ImageNet-1K, in every layout they are found in.

Hugging Face's parquet files, ImageNet's own tars, Kaggle's folders, and train/ and val/ with a
folder per class. An ImageNet-100 is also cut out of an ImageNet-1K that lies beside it, prepared
or not.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from hjepa_mlx.data import prepared
from hjepa_mlx.data.archives import images_in_tar
from hjepa_mlx.data.catalog import CATALOG, class_list
from hjepa_mlx.data.ground_truth import classes_of
from hjepa_mlx.data.original import Found, Item, Original, of_files, of_images
from hjepa_mlx.data.storage import Files, KnownFile, StorageError, image_paths
from hjepa_mlx.errors import HJEPAError

KAGGLE_ROOT = Path("ILSVRC/Data/CLS-LOC")
KAGGLE_PARTS = (["train.X1", "train.X2", "train.X3", "train.X4"], ["val.X"])
CMC_FIRST = "bonnet, poke bonnet"  # label 0 of clane9/imagenet-100, in words
PARQUET_BATCH = 64  # images


def find(name: str, root: Path) -> Found | None:
    """The first layout found; a quick look only."""
    for place in (root / name, root):
        for words, (recognise, opened) in LAYOUTS.items():
            if recognise(place):
                return Found(words, partial(_opened, name, partial(opened, place)))
    if name != "imagenet100":
        return None
    larger = find("imagenet1k", root)
    if folder := prepared.find("imagenet1k", root):
        larger = Found("prepared", partial(_prepared, folder))
    return larger and Found(f"imagenet1k: {larger.layout}", partial(_hundred, larger.open))


def _opened(name: str, opened: Callable[[str], Original], split: str) -> Original:
    return _in_order(name, opened(split))


def _hundred(opened: Callable[[str], Original], split: str) -> Original:
    return replace(_opened("imagenet100", opened, split), files=())  # ImageNet-1K's own


def _prepared(folder: Path, split: str) -> Original:
    images, labels, classes = prepared.read(folder, split)
    assert labels is not None
    return of_images(images, labels, classes)


def _in_order(name: str, original: Original) -> Original:
    """Classes in the order of their published list; the hundred of CMC out of more."""
    known, hundred = set(original.classes), name == "imagenet100"
    for order in map(class_list, ("cmc", "kaggle")):
        if known <= set(order) or (hundred and set(order) <= known):
            return _with_classes(original, tuple(name for name in order if name in known))
    if hundred and len(known) > 100:
        raise HJEPAError(
            f"ImageNet-100 cannot be cut out of these {len(known)} classes: they are not named by "
            f"WordNet ids (the first is {original.classes[0]!r}). Train on imagenet1k, or use "
            "ImageNet's own archives."
        )
    return original


def _with_classes(original: Original, classes: tuple[str, ...]) -> Original:
    number = {name: label for label, name in enumerate(classes)}
    renamed = [number.get(name, -1) for name in original.classes]

    def items() -> Iterator[Item]:
        for item in original.items():
            if renamed[item.label] >= 0:
                yield item._replace(label=renamed[item.label])

    images = original.images * len(classes) // len(original.classes)  # about as many of each
    return replace(original, classes=classes, images=images, items=items)


def _parquet_folder(place: Path) -> Path | None:
    folders = (place / "data", place)
    return next((f for f in folders if next(f.glob("train-*.parquet"), None)), None)


def _parquet(place: Path, split: str) -> Original:
    """Hugging Face's files: columns `label`, and `image` of structs (bytes, path)."""
    folder = _parquet_folder(place)
    assert folder is not None
    stem = "train" if split != "test" else "val*"
    paths = sorted(folder.glob(f"{stem}-*.parquet"))
    _check_parts(folder, stem, paths)
    images, names = 0, class_list("cmc")
    for path in paths:
        rows, words = _parquet_head(path)
        images += rows
        if words and words[0] != CMC_FIRST:
            names = words

    def items() -> Iterator[Item]:
        for path in paths:
            for row, (image, label) in enumerate(_parquet_rows(path)):
                if not 0 <= label < len(names):
                    raise HJEPAError(
                        f"{path}: an image has the label {label}, for {len(names)} classes. Only "
                        "labelled splits can be used."
                    )
                yield Item(partial(_bytes, image), label, f"{path}[{row}]")

    return Original(names, images, of_files(paths), items, tuple(paths))


def _check_parts(folder: Path, stem: str, paths: list[Path]) -> None:
    """Refuse a set of files `train-00003-of-00017…` that is not complete."""
    numbers = {path.name.split("-of-")[0].rsplit("-", 1)[1] for path in paths}
    totals = {path.name.split("-of-")[1][:5] for path in paths if "-of-" in path.name}
    if not paths or (totals and len(numbers) != int(max(totals))):
        raise HJEPAError(
            f"{folder} has {len(numbers)} of {max(totals, default='1').lstrip('0')} parquet files "
            f"{stem}-*. Go on with the download, or put the rest there."
        )


def _parquet_head(path: Path) -> tuple[int, tuple[str, ...]]:
    """Number of rows, and names of the labels where the file says them as Hugging Face does."""
    try:
        metadata = _pyarrow().read_metadata(path)
        schema = metadata.schema.to_arrow_schema()
        schema.field("image").type.field("bytes")
        schema.field("label")
        about = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
    except (OSError, ValueError, LookupError) as error:
        raise StorageError(
            f"{path} is not a whole parquet file with columns image and label "
            f"({str(error).splitlines()[0]}). Delete it and download again."
        ) from error
    features = about.get("info", {}).get("features", {})
    return metadata.num_rows, tuple(map(str, features.get("label", {}).get("names") or ()))


def _parquet_rows(path: Path) -> Iterator[tuple[Any, int]]:
    try:
        with _pyarrow().ParquetFile(path) as file:
            for batch in file.iter_batches(PARQUET_BATCH, columns=["image.bytes", "label"]):
                yield from zip(batch["image"], batch["label"].to_pylist(), strict=True)
    except (OSError, ValueError) as error:
        raise StorageError(f"{path} cannot be read: {str(error).splitlines()[0]}") from error


def _bytes(image: Any) -> bytes:
    data = image["bytes"].as_py()
    if data is None:
        raise OSError("the row has no image bytes")
    return data


def _pyarrow() -> Any:
    try:
        import pyarrow.parquet
    except ImportError:
        raise HJEPAError("Parquet files need pyarrow: pip install 'hjepa-mlx[hub]'") from None
    return pyarrow.parquet


def _train_tar(place: Path) -> Path | None:
    return _first(place, "ILSVRC2012_img_train.tar", "train.tar")


def _tars(place: Path, split: str) -> Original:
    train = _train_tar(place)
    path = train if split != "test" else _first(place, "ILSVRC2012_img_val.tar", "val.tar")
    if path is None:
        raise HJEPAError(f"{train} is there, but ILSVRC2012_img_val.tar is not beside it.")
    tar = KnownFile(path)
    members = list(images_in_tar(path, deep=False))  # a thousand inner tars, or images
    names = {}
    if len({member.group for member in members}) < 2:  # the validation images
        stems = [member.name for member in members]
        names = dict(zip(stems, classes_of(place, stems), strict=True))
    classes = tuple(sorted({names.get(member.name, member.group) for member in members}))
    number = {name: label for label, name in enumerate(classes)}

    def items() -> Iterator[Item]:
        for member in images_in_tar(path):
            label = number[names.get(member.name, member.group)]
            read = partial(tar.read, member.offset, member.size)
            yield Item(read, label, f"{path}:{member.name}")

    inner = any(member.name.lower().endswith(".tar") for member in members)
    images = CATALOG["imagenet1k"].splits[split] if inner else len(members)
    return Original(classes, images, of_files([path]), items, (path,))


def _kaggle_parts(place: Path) -> list[Path]:
    return sorted(place.glob("train.X[0-9]"))  # one is enough: the others are then asked for


def _kaggle_folders(place: Path, split: str) -> Original:
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
    return _of_folders(place, parts, order)


def _folder_root(place: Path) -> Path | None:
    return next((r for r in (place, place / KAGGLE_ROOT) if _has_classes(r / "train")), None)


def _has_classes(folder: Path) -> bool:
    """Whether folders named by WordNet ids lie in it."""
    try:
        with os.scandir(folder) as entries:
            return any(re.fullmatch(r"n\d{8}", entry.name) for entry in entries)
    except OSError:
        return False


def _folders(place: Path, split: str) -> Original:
    root = _folder_root(place)
    assert root is not None
    if split != "test":
        return _of_folders(place, [root / "train"])
    val = _first(root, "val", "validation")
    if val is None:
        raise HJEPAError(f"{root / 'train'} is there, but val/ is not beside it.")
    return _of_folders(place, [val])


def _of_folders(place: Path, folders: list[Path], order: tuple[str, ...] = ()) -> Original:
    """Each image's class is the folder it lies in, or the one that the ground truth says."""
    paths = [path for folder in folders for path in image_paths(folder)]
    if not paths:
        raise HJEPAError(f"{place}: there are no images in its class folders.")
    names = [os.path.basename(os.path.dirname(path)) for path in paths]
    if {*names} <= {folder.name for folder in folders}:
        names = classes_of(place, [os.path.basename(path) for path in paths])
    classes = tuple(sorted(set(names)))
    if set(order) == set(classes):
        classes = order
    number = {name: i for i, name in enumerate(classes)}
    labels = np.array([number[name] for name in names])
    return of_images(Files(place, paths), labels, classes, files=folders)


def _first(place: Path, *names: str) -> Path | None:
    return next((place / name for name in names if (place / name).exists()), None)


# in words: how to recognise it in a folder, how to open a split of it
LAYOUTS: dict[str, tuple[Callable[[Path], Any], Callable[[Path, str], Original]]] = {
    "parquet files": (_parquet_folder, _parquet),
    "tar archives": (_train_tar, _tars),
    "Kaggle's folders": (_kaggle_parts, _kaggle_folders),
    "folders": (_folder_root, _folders),
}
