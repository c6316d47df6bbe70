"""Each data set as its publisher gives it away: names of files, archives, classes, on `layouts`.

Every function writes into `folder` and returns what it put there: pixels and labels, or the class,
file name and JPEG of each image. The same seed gives the same bytes.
"""

import tarfile
from pathlib import Path

import layouts
from layouts import CMC, KAGGLE, Made, Photos

from hjepa_mlx.data.raw import CIFAR_CLASSES, STL_CLASSES


def cifar10(folder: Path, per_batch: int = 20, packed: bool = False) -> Made:
    """cifar-10-batches-bin/; with `packed` only cifar-10-binary.tar.gz, as it is downloaded."""
    made = layouts.cifar10(folder, per_batch)
    inner = folder / "cifar-10-batches-bin"
    (inner / "batches.meta.txt").write_text("\n".join(CIFAR_CLASSES) + "\n\n")
    if packed:
        _pack(inner, folder / "cifar-10-binary.tar.gz")
    return made


def stl10(
    folder: Path, train: int = 20, test: int = 10, unlabeled: int = 40, packed: bool = False
) -> Made:
    """stl10_binary/; with `packed` only stl10_binary.tar.gz, as it is downloaded."""
    made = layouts.stl10(folder, train, test, unlabeled)
    inner = folder / "stl10_binary"
    (inner / "class_names.txt").write_text("\n".join(STL_CLASSES) + "\n")
    if packed:
        _pack(inner, folder / "stl10_binary.tar.gz")
    return made


def imagenet_folders(
    folder: Path, classes: tuple[str, ...] = CMC, train: int = 2, val: int = 1, seed: int = 0
) -> Photos:
    """train/ and val/ with a folder a class."""
    made = layouts.photos(classes, train, val, seed)
    layouts.folders(folder, made)
    return made


def imagenet_tars(
    folder: Path,
    classes: tuple[str, ...] = CMC,
    train: int = 2,
    val: int = 1,
    seed: int = 0,
    extracted_kit: bool = False,
) -> Photos:
    """ImageNet's own two tars and the development kit, on wish as the folder it unpacks to."""
    made = layouts.photos(classes, train, val, seed)
    layouts.tars(folder, made)
    if extracted_kit:
        packed = folder / f"{layouts.KIT}.tar.gz"
        with tarfile.open(packed) as tar:
            tar.extractall(folder, filter="data")
        packed.unlink()
    return made


def imagenet_kaggle_competition(
    folder: Path, classes: tuple[str, ...] = CMC, train: int = 2, val: int = 1, seed: int = 0
) -> Photos:
    """ILSVRC/Data/CLS-LOC with flat validation images, and LOC_val_solution.csv."""
    made = layouts.photos(classes, train, val, seed)
    layouts.kaggle_contest(folder, made)
    return made


def imagenet100_parquet(
    folder: Path, train: int = 2, val: int = 1, files: int = 4, group: int = 16, seed: int = 0
) -> Photos:
    """clane9/imagenet-100: parquet files with labels in CMC's order."""
    made = layouts.photos(CMC, train, val, seed)
    layouts.parquet(folder, made, files, group)
    return made


def imagenet100_kaggle(folder: Path, train: int = 2, val: int = 1, seed: int = 0) -> Photos:
    """ambityga/imagenet100: train.X1 … train.X4, val.X, Labels.json."""
    made = layouts.photos(KAGGLE, train, val, seed)
    layouts.kaggle_hundred(folder, made)
    return made


def _pack(inner: Path, path: Path) -> None:
    layouts.archive(inner, path)
    for file in inner.iterdir():
        file.unlink()
    inner.rmdir()
