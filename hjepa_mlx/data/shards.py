"""Prepared shards: small JPEGs in tars with an index, which is what trains fastest.

dataset.json       what this is: classes in order, counts, how it was made, checksums
train-00000.tar    CLASS/NUMBER.jpg, up to SHARD images
train-00000.npy    offset, size and label of each of them
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from hjepa_mlx.data.storage import Members, StorageError

FOLDER = "shards"
MANIFEST = "dataset.json"
FORMAT = 1
SHARD = 2048  # images: 50–100 MB
ROW = np.dtype([("offset", "<i8"), ("size", "<i8"), ("label", "<i4")])


def complete(folder: Path) -> bool:
    """Whether `folder` holds a prepared data set; its manifest is written last.

    Other tools' `dataset.json` (StyleGAN's labels, say) has no splits; a damaged one counts.
    """
    path = folder / MANIFEST
    try:
        return path.is_file() and "splits" in json.loads(path.read_bytes())
    except (OSError, ValueError, TypeError):
        return True


def manifest(folder: Path) -> dict[str, Any]:
    """What `prepare` recorded; StorageError when it is not readable."""
    try:
        read = json.loads((folder / MANIFEST).read_text())
        if read["format"] != FORMAT:
            raise ValueError(f"its format is {read['format']}, made by a newer version")
        for split in read["splits"].values():
            [(shard["file"], shard["images"], shard["sha256"]) for shard in split["shards"]]
        return read
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise StorageError(f"{folder / MANIFEST} cannot be read ({error}).") from error


def read(folder: Path, split: str) -> tuple[Members, np.ndarray | None, tuple[str, ...]]:
    """Images, labels and classes of a split; StorageError when a shard is missing or cut."""
    made = manifest(folder)
    split = "test" if split == "test" else "train"
    if split not in made["splits"]:
        raise StorageError(f"{folder} has no {split} images; it has {', '.join(made['splits'])}.")
    shards = made["splits"][split]["shards"]
    paths = [folder / shard["file"] for shard in shards]
    tables = []
    for path, shard in zip(paths, shards, strict=True):
        table = read_index(path)
        if table is None or len(table) != shard["images"]:
            raise StorageError(
                f"{path.with_suffix('.npy')} is missing or damaged. Delete {folder} and prepare "
                "again."
            )
        tables.append(table)
    rows = np.concatenate([np.zeros(0, ROW), *tables])
    file = np.repeat(np.arange(len(paths), dtype=np.uint32), [len(table) for table in tables])
    classes = tuple(made["classes"])
    labels = rows["label"].astype(np.int64) if classes else None
    return Members(paths, file, rows["offset"], rows["size"]), labels, classes


def read_index(path: Path) -> np.ndarray | None:
    """Rows of a shard's index, or None when it is not there or not whole."""
    try:
        table = np.load(path.with_suffix(".npy"), allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    return table if table.dtype == ROW and table.ndim == 1 else None
