"""The prepared form: the one form, beside folders of images, that trains.

dataset.json        format, name, classes in order, options; images and checksums of each split
train-00000.tar     photographs: CLASS/NUMBER.jpg, up to SHARD of them
train-00000.npy     offset, size and label of each
train-images.npy    or small images: raw pixels [N, H, W, C] uint8
train-labels.npy    and their labels [N]; unlabelled splits have none

Splits are train, test and, where it is not the same as train, pretrain.
"""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any

import numpy as np

from hjepa_mlx.data.storage import NOT_NPY, Array, Images, Members, StorageError
from hjepa_mlx.files import read as read_small
from hjepa_mlx.files import read_json

FOLDER = "prepared"
FOLDERS = (FOLDER, "shards", "")  # below a data set's folder; earlier versions wrote to `shards`
MANIFEST = "dataset.json"
FORMAT = 2  # 1 had shards only
SHARD = 2048  # images: 50–100 MB
ROW = np.dtype([("offset", "<i8"), ("size", "<i8"), ("label", "<i4")])


def complete(folder: Path, name: str | None = None) -> bool:
    """Whether `folder` holds a prepared data set (called `name`); `splits` are written last.

    Other tools' `dataset.json` (StyleGAN's labels, say) has no splits; a damaged one counts.
    """
    path = folder / MANIFEST
    try:
        if not path.is_file():
            return False
        made = read_json(path)
        ours = isinstance(made, dict) and "splits" in made
        return ours and name in (None, made.get("name"))
    except (OSError, ValueError):
        return True


def find(name: str, root: Path) -> Path | None:
    """The folder of the prepared data set `name`, in `root/name` or in `root` itself."""
    folders = (place / inner for place in (root / name, root) for inner in FOLDERS)
    return next((folder for folder in folders if complete(folder, name)), None)


def manifest(folder: Path) -> dict[str, Any]:
    """The record that `prepare` wrote; StorageError when it is not readable."""
    try:
        made = read_json(folder / MANIFEST)
        if made["format"] not in (1, FORMAT):
            raise ValueError(f"its format is {made['format']}, made by a newer version")
        for split in made["splits"].values():
            split["files"] = split.pop("shards") if "shards" in split else split["files"]
            for file in split["files"]:
                _ = file["images"] + len(file["sha256"])
                if os.path.basename(file["file"]) != file["file"]:
                    raise ValueError(f"{file['file']!r} is not in its folder")
        if not all(isinstance(name, str) for name in made["classes"]):
            raise ValueError("a name is no text")
        if made.get("bits", 16) not in range(8, 17):
            raise ValueError("its bits are not 8 to 16")
        return made
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise StorageError(f"{folder / MANIFEST} cannot be read ({error!r:.300}).") from error


def read(folder: Path, split: str) -> tuple[Images, np.ndarray | None, tuple[str, ...]]:
    """Images, labels and classes of a split; StorageError when a file is missing or cut."""
    made = manifest(folder)
    if split == "pretrain" and split not in made["splits"]:
        split = "train"
    files = made["splits"].get(split, {}).get("files", [])
    if not files:
        raise StorageError(f"{folder} has no {split} images.")
    paths = [folder / file["file"] for file in files]
    checksums = [file["sha256"] for file in files]
    classes = tuple(made["classes"])
    if paths[0].suffix == ".npy":
        array = Array(paths[0], checksums[0])
        labels = _load(paths[1], len(array), classes) if paths[1:] else None
        return array, labels, classes if paths[1:] else ()
    tables = [
        _load(path.with_suffix(".npy"), file["images"], classes, ROW)
        for path, file in zip(paths, files, strict=True)
    ]
    rows = np.concatenate(tables)
    tar = np.repeat(np.arange(len(tables), dtype=np.uint32), [len(table) for table in tables])
    images = Members(paths, tar, rows["offset"], rows["size"], checksums)
    return images, rows["label"].astype(np.int64) if classes else None, classes


def _load(
    path: Path, length: int, classes: tuple[str, ...], dtype: np.dtype | type = np.int64
) -> np.ndarray:
    """Labels, or rows with labels, below the number of classes; -1 for none."""
    try:
        table = np.lib.format.read_array(io.BytesIO(read_small(path)), allow_pickle=False)
    except (OSError, *NOT_NPY):
        table = np.zeros(0)
    right = table.dtype == dtype and table.shape == (length,)
    labels = table["label"] if right and dtype == ROW else table
    if not right or not (labels < max(1, len(classes))).all() or not (labels >= -1).all():
        raise StorageError(
            f"{path} is missing or damaged. Delete {path.parent} and prepare the data set again."
        )
    return table
