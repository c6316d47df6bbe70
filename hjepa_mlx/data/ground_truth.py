"""The classes of ImageNet's validation images, whose files do not say them."""

from __future__ import annotations

import csv
import io
import os
import tarfile
from pathlib import Path

from hjepa_mlx.data.storage import StorageError
from hjepa_mlx.errors import HJEPAError

DEVKIT = "ILSVRC2012_devkit_t12"
KAGGLE_TABLE = "LOC_val_solution.csv"


def classes_of(place: Path, names: list[str]) -> list[str]:
    """WordNet id of each file `names`, from Kaggle's table or ImageNet's kit in `place`.

    HJEPAError when neither is there, StorageError when it is damaged.
    """
    truth = _ground_truth(place)
    stems = [os.path.splitext(name)[0] for name in names]
    unknown = next((stem for stem in stems if stem not in truth), None)
    if unknown is not None:
        raise HJEPAError(f"{place}: the ground truth does not name the image {unknown}.")
    return [truth[stem] for stem in stems]


def _ground_truth(place: Path) -> dict[str, str]:
    table = place / KAGGLE_TABLE
    if table.exists():
        try:
            with open(table, newline="") as file:
                rows = csv.DictReader(file)
                return {row["ImageId"]: row["PredictionString"].split()[0] for row in rows}
        except (OSError, ValueError, LookupError, AttributeError, csv.Error) as error:
            raise StorageError(f"{table} cannot be read ({error!r}).") from error
    kits = (place / DEVKIT, place / f"{DEVKIT}.tar.gz")
    kit = next((path for path in kits if path.exists()), None)
    if kit is None:
        raise HJEPAError(
            f"{place} does not say which class a validation image has: put {DEVKIT}.tar.gz (from "
            f"image-net.org) or Kaggle's {KAGGLE_TABLE} there."
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
