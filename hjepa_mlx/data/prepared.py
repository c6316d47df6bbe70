"""The prepared form: the one form, beside folders of images, that trains.

dataset.json        format, name, classes in order, options; images and checksums of each split
train-00000.tar     photographs: CLASS/NUMBER.jpg, up to SHARD of them
train-00000.npy     offset, size and label of each
train-images.npy    or small images: raw pixels [N, H, W, C] uint8
train-labels.npy    and their labels [N]; unlabelled splits have none

Splits are train, test and, where it is not the same as train, pretrain.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from hjepa_mlx.data.storage import Array, Images, Members, StorageError

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
        made = json.loads(path.read_bytes())
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
        made = json.loads((folder / MANIFEST).read_text())
        if made["format"] not in (1, FORMAT):
            raise ValueError(f"its format is {made['format']}, made by a newer version")
        for split in made["splits"].values():
            split["files"] = split.pop("shards") if "shards" in split else split["files"]
            [(file["file"], file["images"], file["sha256"]) for file in split["files"]]
        return made
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise StorageError(f"{folder / MANIFEST} cannot be read ({error}).") from error


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
        labels = _load(paths[1], files[0]["images"]) if paths[1:] else None
        return Array(paths[0], checksums[0]), labels, classes if paths[1:] else ()
    tables = [
        _load(path.with_suffix(".npy"), file["images"], ROW)
        for path, file in zip(paths, files, strict=True)
    ]
    rows = np.concatenate(tables)
    tar = np.repeat(np.arange(len(tables), dtype=np.uint32), [len(table) for table in tables])
    images = Members(paths, tar, rows["offset"], rows["size"], checksums)
    return images, rows["label"].astype(np.int64) if classes else None, classes


def _load(path: Path, length: int, dtype: np.dtype | type = np.int64) -> np.ndarray:
    try:
        table = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError):
        table = np.zeros(0)
    if table.dtype != dtype or table.shape != (length,):
        raise StorageError(
            f"{path} is missing or damaged. Delete {path.parent} and prepare the data set again."
        )
    return table
