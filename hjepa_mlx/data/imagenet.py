"""ImageNet-100 and ImageNet-1K, in every layout they are found in.

Hugging Face's parquet files, ImageNet's own tars, Kaggle's folders, and train/ and val/ with a
folder per class. An ImageNet-100 is also cut out of an ImageNet-1K that lies beside it, prepared
or not.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from hjepa_mlx.data import prepared
from hjepa_mlx.data.archives import images_in_tar
from hjepa_mlx.data.catalog import CATALOG, class_list
from hjepa_mlx.data.ground_truth import classes_of
from hjepa_mlx.data.listing import scan
from hjepa_mlx.data.original import Found, Item, Original, of_files, of_images
from hjepa_mlx.data.storage import Files, KnownFile, StorageError
from hjepa_mlx.errors import HJEPAError, required

KAGGLE_ROOT = Path("ILSVRC/Data/CLS-LOC")
KAGGLE_TRAIN = ["train.X1", "train.X2", "train.X3", "train.X4"]
CMC_FIRST = "bonnet, poke bonnet"  # label 0 of clane9/imagenet-100, in words
PARQUET_LARGEST = 1 << 25  # bytes of an image in them: some wait in memory for their turn
PARQUET_GROUP = 1 << 29  # bytes of a row group's images, which are unpacked together
BYTES, LINE = "image.bytes", "\n"
WORDNET_ID = "n" + 8 * "[0-9]"  # the name of a class's folder


def find(name: str, root: Path) -> Found | None:
    """The first layout found; a quick look only."""
    for place in (root / name, root):
        for layout in (_parquet, _tars, _folders):
            if found := layout(place):
                return Found(found.layout, partial(_in_order, name, found))
    if name != "imagenet100":
        return None
    larger = find("imagenet1k", root)
    if folder := prepared.find("imagenet1k", root):
        larger = Found("prepared", partial(_prepared, folder))
    return larger and Found(f"imagenet1k: {larger.layout}", partial(_cut_out, larger))


def _prepared(folder: Path, split: str) -> Original:
    images, labels, classes = prepared.read(folder, split)
    assert labels is not None
    return of_images(images, labels, classes)


def _cut_out(found: Found, split: str) -> Original:
    return replace(_in_order("imagenet100", found, split), files=())  # ImageNet-1K's own


def _in_order(name: str, found: Found, split: str) -> Original:
    """Classes in the order of their published list; the hundred of CMC out of more."""
    original = found.open(split)
    known, hundred = set(original.classes), name == "imagenet100"
    for order in map(class_list, ("cmc", "kaggle")):
        if known <= set(order) or (hundred and set(order) <= known):
            return _with_classes(original, [one for one in order if one in known])
    if hundred and len(known) > 100:
        raise HJEPAError(
            f"ImageNet-100 cannot be cut out of {len(known)} classes that are not named by WordNet "
            f"ids (the first is {original.classes[0]!r}). Use ImageNet's own archives."
        )
    return original


def _with_classes(original: Original, classes: list[str]) -> Original:
    """Only the images of `classes`; files that hold others too are needed further on."""
    number = {name: label for label, name in enumerate(classes)}
    renamed = [number.get(name, -1) for name in original.classes]

    def items() -> Iterator[Item]:
        for item in original.items():
            if renamed[item.label] >= 0:
                yield item._replace(label=renamed[item.label])

    images = original.images * len(classes) // len(renamed)  # about as many of each
    files = original.files if len(classes) == len(renamed) else ()
    return replace(original, classes=tuple(classes), images=images, items=items, files=files)


def _parquet(place: Path) -> Found | None:
    folders = (place / "data", place)
    folder = next((f for f in folders if next(f.glob("train-*.parquet"), None)), None)
    return Found("parquet files", partial(_parquet_split, folder)) if folder else None


def _parquet_split(folder: Path, split: str) -> Original:
    """Hugging Face's files: columns `label`, and `image` of structs (bytes, path)."""
    stem = "val*" if split == "test" else "train"
    paths = sorted(folder.glob(f"{stem}-*.parquet"))
    parts = [re.search(r"-of-(\d+)", path.name) for path in paths]
    wanted = max((int(part[1]) for part in parts if part), default=max(len(paths), 1))
    if len(paths) != wanted:
        raise HJEPAError(
            f"{folder} has {len(paths)} of {wanted} parquet files {stem}-*. Download the others."
        )
    images, classes = 0, class_list("cmc")
    for path in paths:
        with _opened(path) as file:
            images += file.metadata.num_rows
            about = json.loads((file.schema_arrow.metadata or {}).get(b"huggingface", b"{}"))
            label = about.get("info", {}).get("features", {}).get("label", {})
            words = tuple(map(str, list(label.get("names") or ())))
            if words and words[0] != CMC_FIRST:
                classes = words

    def items() -> Iterator[Item]:
        for path in paths:
            with _opened(path) as file:
                for row, (image, label) in enumerate(_rows(file)):
                    if label not in range(len(classes)):
                        raise HJEPAError(f"{path}: label {label}, for {len(classes)} classes.")
                    yield Item(partial(_bytes, image), label, f"{path}[{row}]")

    return of_files(paths, classes, images, items)


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    arrow, parquet = required("pyarrow", "hub"), required("pyarrow.parquet", "hub")
    try:
        if not path.is_file():
            raise OSError("it is no file")
        with parquet.ParquetFile(path) as file:
            _check_columns(file)
            yield file
    except (OSError, ValueError, LookupError, AttributeError, TypeError, RecursionError,
            MemoryError, arrow.ArrowException) as error:  # fmt: skip
        raise StorageError(
            f"{path} is not a whole parquet file with columns image and label "
            f"({str(error).partition(LINE)[0]}). Delete it and download again."
        ) from error


def _check_columns(file: Any) -> None:
    """Refuse, with ValueError, other columns, and images that are too large together."""
    bytes_type = file.schema_arrow.field("image").type.field("bytes").type
    if str(bytes_type) not in ("binary", "large_binary"):
        raise ValueError(f"image.bytes is {bytes_type}")
    if str(label := file.schema_arrow.field("label").type).lstrip("u")[:3] != "int":
        raise ValueError(f"label is {label}")
    about = file.metadata
    for group in map(about.row_group, range(about.num_row_groups)):
        for column in map(group.column, range(group.num_columns)):
            if column.total_uncompressed_size > PARQUET_GROUP:
                raise ValueError(f"a group's {column.path_in_schema} is too large")


def _rows(file: Any) -> Iterator[tuple[bytes | None, Any]]:
    # one by one: a large value can come many times, and is kept once in the file
    for batch in file.iter_batches(1, columns=[BYTES, "label"]):
        for image, label in zip(batch["image"].field("bytes"), batch["label"], strict=True):
            data = image.as_buffer()
            small = data is not None and data.size <= PARQUET_LARGEST
            yield data.to_pybytes() if small else None, label.as_py()


def _bytes(image: bytes | None) -> bytes:
    if image is None:
        raise OSError("the row has no image bytes, or too many")
    return image


def _tars(place: Path) -> Found | None:
    train = _first(place, "ILSVRC2012_img_train.tar", "train.tar")
    return Found("tar archives", partial(_tar_split, place, train)) if train else None


def _tar_split(place: Path, train: Path, split: str) -> Original:
    path = train if split != "test" else _first(place, "ILSVRC2012_img_val.tar", "val.tar")
    if path is None:
        raise HJEPAError(f"{train} is there, but ILSVRC2012_img_val.tar is not beside it.")
    tar = KnownFile(path)
    members = list(images_in_tar(path, deep=False))  # a thousand inner tars, or images
    names = {}
    if len({member.group for member in members}) < 2:  # the validation images
        stems = [member.name for member in members]
        names = dict(zip(stems, classes_of(place, stems), strict=True))
    classes, _ = _labelled([names.get(member.name, member.group) for member in members])
    number = {name: label for label, name in enumerate(classes)}

    def items() -> Iterator[Item]:
        for member in images_in_tar(path):
            label = number[names.get(member.name, member.group)]
            read = partial(tar.read, member.offset, member.size)
            yield Item(read, label, f"{path}:{member.name}")

    inner = any(member.name.lower().endswith(".tar") for member in members)
    images = CATALOG["imagenet1k"].splits[split] if inner else len(members)
    return of_files([path], classes, images, items)


def _folders(place: Path) -> Found | None:
    """A folder a class; in ambityga/imagenet100 they are spread over several."""
    if next(place.glob("train.X[0-9]"), None):  # one is enough: the others are then asked for
        train, val = [place / name for name in KAGGLE_TRAIN], place / "val.X"
        return Found("Kaggle's folders", partial(_folder_split, place, train, val))
    for root in (place, place / KAGGLE_ROOT):
        if next((root / "train").glob(WORDNET_ID), None):
            val = _first(root, "val", "validation") or root / "val"
            return Found("folders", partial(_folder_split, place, [root / "train"], val))
    return None


def _folder_split(place: Path, train: list[Path], val: Path, split: str) -> Original:
    """Each image's class is the folder it lies in, or the one that the ground truth says."""
    folders = [val] if split == "test" else train
    for folder in folders:
        if not folder.is_dir():
            raise HJEPAError(f"The folder {folder} is missing. Put it there and run again.")
    paths = [path for folder in folders for path in scan([folder], old=True).paths]
    if not paths:
        raise HJEPAError(f"{place}: there are no images in its class folders.")
    names = [os.path.basename(os.path.dirname(path)) for path in paths]
    if {*names} <= {folder.name for folder in folders}:
        names = classes_of(place, [os.path.basename(path) for path in paths])
    classes, labels = _labelled(names, class_list("kaggle"))
    return of_images(Files(place, paths), labels, classes, files=folders)


def _labelled(names: list[str], order: tuple[str, ...] = ()) -> tuple[tuple[str, ...], np.ndarray]:
    """The different names, in this order or sorted, and the number of each name, [N]."""
    classes = order if set(order) == set(names) else tuple(sorted(set(names)))
    number = {name: label for label, name in enumerate(classes)}
    return classes, np.array([number[name] for name in names])


def _first(place: Path, *names: str) -> Path | None:
    return next((place / name for name in names if (place / name).exists()), None)
