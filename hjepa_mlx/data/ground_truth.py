"""The classes of ImageNet's validation images, whose files do not say them."""

from __future__ import annotations

import csv
import io
import struct
import zlib
from pathlib import Path

from hjepa_mlx.data.archives import DAMAGED, opened_member
from hjepa_mlx.data.storage import StorageError
from hjepa_mlx.errors import HJEPAError
from hjepa_mlx.files import read

DEVKIT = "ILSVRC2012_devkit_t12"
NUMBERS, META = "ILSVRC2012_validation_ground_truth.txt", "meta.mat"  # in its folder `data`
LARGEST = 1 << 25  # bytes of a file in it, or of the kit, unpacked
COMPRESSED = 15  # the type of such a part of a MATLAB file
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
    from scipy.io import loadmat
    from scipy.io.matlab import MatReadError

    damage = (*DAMAGED, OSError, LookupError, TypeError, NameError, MatReadError, MemoryError,
              AttributeError, HJEPAError)  # fmt: skip
    name = META
    try:
        synsets = loadmat(io.BytesIO(_unpacked(_kit_file(kit, META))), squeeze_me=True)["synsets"]
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
        return read(kit / "data" / name, LARGEST)
    with opened_member(kit, f"{DEVKIT}/data/{name}", LARGEST, LARGEST) as file:
        return b"".join(iter(lambda: file.read(1 << 16), b""))


def _unpacked(mat: bytes) -> bytes:
    """A MATLAB file whose parts, unpacked, are not larger than LARGEST; else ValueError."""
    at, order = 128, "<II" if mat[126:128] == b"IM" else ">II"
    while at + 8 <= len(mat):
        kind, size = struct.unpack(order, mat[at : at + 8])
        part = mat[at + 8 : at + 8 + size] if kind == COMPRESSED else b""
        if len(zlib.decompressobj().decompress(part, LARGEST + 1)) > LARGEST:
            raise ValueError("it is too large")
        at += 8 + size
    return mat
