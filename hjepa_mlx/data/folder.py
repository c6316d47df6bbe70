"""Any folder of images: what `data.name=folder` trains on."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from hjepa_mlx.data import shards
from hjepa_mlx.data.images import EXTENSIONS
from hjepa_mlx.data.source import Source, Split, make_source
from hjepa_mlx.data.storage import Files, image_paths
from hjepa_mlx.errors import UsageError
from hjepa_mlx.rng import generator

TRAIN_FOLDERS = "train", "training"
TEST_FOLDERS = "val", "test", "valid", "validation", "testing"
HELD_OUT = 10  # a folder without a test split keeps every tenth image for evaluation


def open_folder(root: Path, split: Split) -> Source:
    """Any tree of images. Subfolders of the split (or of the tree) are the classes.

    With `train` and `val` (or `test` and the like, in any case) inside, those are the splits;
    otherwise every tenth image of a fixed shuffle is held out for evaluation.
    """
    if not root.is_dir():
        raise UsageError(f"The image folder {root} does not exist.")
    if shards.complete(root):
        return make_source("folder", *shards.read(root, "test" if split == "test" else "train"))
    folders = [path for path in root.iterdir() if not path.name.startswith(".") and path.is_dir()]
    inside = {
        path.name.lower(): path for path in sorted(folders)
    }  # where both are, train wins over Train
    train, held_out = (
        next((inside[name] for name in names if name in inside), None)
        for names in (TRAIN_FOLDERS, TEST_FOLDERS)
    )
    if train and held_out:
        return tree(held_out if split == "test" else train)
    everything = tree(train if train and folders == [train] else root)
    shuffled = generator(0, "held out").permutation(len(everything))
    tenth = np.arange(len(shuffled)) % HELD_OUT == HELD_OUT - 1
    return everything.take(np.sort(shuffled[tenth if split == "test" else ~tenth]))


def tree(root: Path) -> Source:
    """All images under `root`; its subfolders are the classes if every image lies in one."""
    paths = image_paths(root)
    if not paths:
        raise UsageError(
            f"There are no images in {root} (looked for {', '.join(sorted(EXTENSIONS))})."
        )
    start = len(os.path.join(root, ""))
    tops = [path[start:].partition(os.sep) for path in paths]
    classes = tuple(sorted({top for top, _, _ in tops}))
    if len(classes) < 2 or not all(inside for _, inside, _ in tops):
        return make_source("folder", Files(root, paths))
    number = {name: i for i, name in enumerate(classes)}
    labels = np.array([number[top] for top, _, _ in tops])
    return make_source("folder", Files(root, paths), labels, classes)
