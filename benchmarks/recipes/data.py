"""The data sets that recipes are compared on, made from Debian's packages.

apt-get install dataset-fashion-mnist mate-backgrounds lomiri-wallpapers-16.04
python benchmarks/recipes/data.py data/recipes

fashion: the first 20,000 training images of Fashion-MNIST. photographs: 64×64 crops of wallpapers;
which photograph a crop is from is its class. Each comes twice, as folders `test` and `validation`:
the second is made of training images only, and choices are made on it.
"""

from __future__ import annotations

import argparse
import gzip
from pathlib import Path

import numpy as np
from PIL import Image

from hjepa_mlx.data.importers import DEBIAN_FASHION, read_idx
from hjepa_mlx.data.prepare import originals_of, prepare
from hjepa_mlx.rng import generator

TRAINED, VALIDATED = 20_000, 10_000  # images of Fashion-MNIST
WALLPAPERS = Path("/usr/share/backgrounds")
SHORTER = 512  # pixels of a photograph's shorter side when it is cut
CUT, SIDE = 96, 64  # pixels of a crop's side in it, and in what is written
LEARNT, JUDGED = 120, 60  # crops of a photograph
# Which part of a photograph's width is learnt from and judged on
HALVES = {"test": ((0, 1 / 2), (1 / 2, 1)), "validation": ((0, 1 / 4), (1 / 4, 1 / 2))}


def fashion(root: Path) -> None:
    """Write both pairs of splits in the data set's own format, and prepare them."""
    arrays = {
        (split, kind): read_idx(DEBIAN_FASHION / f"{split}-{kind}-idx{axes}-ubyte.gz", axes)
        for split in ("train", "t10k")
        for kind, axes in (("images", 3), ("labels", 1))
    }
    for kind, axes in (("images", 3), ("labels", 1)):
        train = arrays["train", kind]
        judged = {"test": arrays["t10k", kind], "validation": train[TRAINED:][:VALIDATED]}
        for name, of in judged.items():
            folder = root / "fashion" / name
            folder.mkdir(parents=True, exist_ok=True)
            for split, array in (("train", train[:TRAINED]), ("t10k", of)):
                write_idx(folder / f"{split}-{kind}-idx{axes}-ubyte.gz", array)
    for name in ("test", "validation"):
        folder = root / "fashion" / name
        prepare("fashion-mnist", originals_of("fashion-mnist", folder), folder / "prepared")


def write_idx(path: Path, array: np.ndarray) -> None:
    """Write bytes as a gzipped IDX file."""
    header = bytes((0, 0, 8, array.ndim)) + np.array(array.shape, ">u4").tobytes()
    with gzip.open(path, "wb", 1) as file:
        file.write(header + array.tobytes())


def photographs(root: Path) -> int:
    """Write the crops as PNG, a folder for each photograph; returns how many of those."""
    paths = sorted([*WALLPAPERS.glob("*_by_*.jpg"), *WALLPAPERS.glob("mate/nature/*.jpg")])
    if not paths:
        raise SystemExit(f"No photographs in {WALLPAPERS}: install the packages named above.")
    for path in paths:
        with Image.open(path) as file:
            whole = file.convert("RGB")
        scale = SHORTER / min(whole.size)
        width, height = round(whole.width * scale), round(whole.height * scale)
        photograph = whole.resize((width, height), Image.Resampling.LANCZOS)
        for name, parts in HALVES.items():
            for split, part, count in zip(("train", "test"), parts, (LEARNT, JUDGED), strict=True):
                folder = root / "photographs" / name / split / path.stem
                folder.mkdir(parents=True, exist_ok=True)
                rng = generator(0, f"{name} {split} {path.stem}")
                first, last = round(part[0] * width), round(part[1] * width) - CUT
                for number in range(count):
                    x, y = rng.integers(first, last + 1), rng.integers(height - CUT + 1)
                    crop = photograph.crop((x, y, x + CUT, y + CUT))
                    crop = crop.resize((SIDE, SIDE), Image.Resampling.LANCZOS)
                    crop.save(folder / f"{number:03}.png")
    return len(paths)


def main() -> None:
    """Make both under the folder given."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("root", type=Path)
    root = parser.parse_args().root
    fashion(root)
    print(f"{root}: Fashion-MNIST and crops of {photographs(root)} photographs")


if __name__ == "__main__":
    main()
