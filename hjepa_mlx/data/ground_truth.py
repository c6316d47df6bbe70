"""The classes of ImageNet's validation images, whose files do not say them."""

from __future__ import annotations

import csv
import io
from pathlib import Path

from hjepa_mlx.data.archives import DAMAGED, opened_member
from hjepa_mlx.data.matlab import structs
from hjepa_mlx.data.storage import StorageError
from hjepa_mlx.errors import HJEPAError
from hjepa_mlx.files import read

DEVKIT = "ILSVRC2012_devkit_t12"
NUMBERS, META = "ILSVRC2012_validation_ground_truth.txt", "meta.mat"  # in its folder `data`
LARGEST = 1 << 25  # bytes of the kit, or a file in it
DAMAGE = (*DAMAGED, OSError, LookupError, TypeError, HJEPAError)
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
        rows = csv.DictReader(io.StringIO(read(table).decode(), newline=""))
        return {row["ImageId"]: row["PredictionString"].split()[0] for row in rows}
    except (OSError, ValueError, LookupError, AttributeError, csv.Error) as error:
        raise StorageError(f"{table} cannot be read ({error!r}).") from error


def _from_kit(kit: Path) -> dict[str, str]:
    name = META
    try:
        synsets = structs(_kit_file(kit, META), "synsets")
        keys = ("ILSVRC2012_ID", "WNID", "num_children")
        rows = list(zip(*(synsets[key] for key in keys), strict=True))
        ids = {int(number[0]): "".join(map(chr, wnid)) for number, wnid, n in rows if not n[0]}
        name = NUMBERS
        numbers = map(int, _kit_file(kit, NUMBERS).split())
        return {f"ILSVRC2012_val_{n:08d}": ids[number] for n, number in enumerate(numbers, 1)}
    except DAMAGE as error:
        raise StorageError(f"{kit}: {name} cannot be read ({error!r}).") from error


def _kit_file(kit: Path, name: str) -> bytes:
    if kit.is_dir():
        return read(kit / "data" / name, LARGEST)
    with opened_member(kit, f"{DEVKIT}/data/{name}", LARGEST, LARGEST) as file:
        return b"".join(iter(lambda: file.read(1 << 16), b""))
