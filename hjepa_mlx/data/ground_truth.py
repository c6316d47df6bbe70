"""The classes of ImageNet's validation images, whose files do not say them."""

from __future__ import annotations

import csv
import io
import tarfile
from pathlib import Path

from hjepa_mlx.data.archives import DAMAGED
from hjepa_mlx.data.storage import StorageError
from hjepa_mlx.errors import HJEPAError

DEVKIT = "ILSVRC2012_devkit_t12"
NUMBERS, META = "ILSVRC2012_validation_ground_truth.txt", "meta.mat"  # in its folder `data`
KAGGLE_TABLE = "LOC_val_solution.csv"


def classes_of(place: Path, names: list[str]) -> list[str]:
    """WordNet id of each file `names`, from Kaggle's table or ImageNet's kit in `place`.

    HJEPAError when neither is there, StorageError when it is damaged.
    """
    table, kits = place / KAGGLE_TABLE, (place / DEVKIT, place / f"{DEVKIT}.tar.gz")
    kit = next((path for path in kits if path.exists()), None)
    if table.exists():
        truth = _from_table(table)
    elif kit:
        truth = _from_kit(kit)
    else:
        raise HJEPAError(
            f"{place} does not say which class a validation image has: put {DEVKIT}.tar.gz (from "
            f"image-net.org) or Kaggle's {KAGGLE_TABLE} there."
        )
    stems = [name.rpartition(".")[0] for name in names]
    for stem in stems:
        if stem not in truth:
            raise HJEPAError(f"{place}: the ground truth does not name the image {stem}.")
    return [truth[stem] for stem in stems]


def _from_table(table: Path) -> dict[str, str]:
    try:
        with open(table, newline="") as file:
            rows = csv.DictReader(file)
            return {row["ImageId"]: row["PredictionString"].split()[0] for row in rows}
    except (OSError, ValueError, LookupError, AttributeError, csv.Error) as error:
        raise StorageError(f"{table} cannot be read ({error!r}).") from error


def _from_kit(kit: Path) -> dict[str, str]:
    from scipy.io import loadmat
    from scipy.io.matlab import MatReadError

    damage = (*DAMAGED, OSError, LookupError, TypeError, NameError, MatReadError)
    name = META
    try:
        synsets = loadmat(io.BytesIO(_kit_file(kit, META)), squeeze_me=True)["synsets"]
        leaves = synsets[synsets["num_children"].astype(int) == 0]
        pairs = zip(leaves["ILSVRC2012_ID"], leaves["WNID"], strict=True)
        ids = {int(number): str(wordnet) for number, wordnet in pairs}
        name = NUMBERS
        numbers = map(int, _kit_file(kit, NUMBERS).split())
        return {f"ILSVRC2012_val_{n:08d}": ids[number] for n, number in enumerate(numbers, 1)}
    except damage as error:
        raise StorageError(f"{kit}: {name} cannot be read ({error!r}).") from error


def _kit_file(kit: Path, name: str) -> bytes:
    if kit.is_dir():
        return (kit / "data" / name).read_bytes()
    with tarfile.open(kit) as tar:
        file = tar.extractfile(f"{DEVKIT}/data/{name}")
        return file.read(1 << 26) if file else b""
