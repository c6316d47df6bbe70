"""The data sets that recipes are compared on, made from published packages.

apt-get install dataset-fashion-mnist mate-backgrounds lomiri-wallpapers-16.04 openclipart-png
npm pack --pack-destination data/recipes emoji-datasource-google@16.0.0 \
    emoji-datasource-twitter@16.0.0 emoji-datasource-facebook@16.0.0
python benchmarks/recipes/data.py data/recipes

fashion: the first 20,000 training images of Fashion-MNIST. photographs: 64×64 crops of wallpapers;
which photograph a crop is from is its class. pictures: 64×64 emoji, clip art and crops of
wallpapers without labels; an emoji's class is its subcategory, and a quarter of those code points
is held out, all vendors' pictures of it. Each comes twice, as folders `test` and `validation`: the
second has no image that the first is judged on, and choices are made on it.
"""

from __future__ import annotations

import argparse
import gzip
import io
import json
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps

from hjepa_mlx.data.images import decodable
from hjepa_mlx.data.importers import DEBIAN_FASHION, read_idx
from hjepa_mlx.data.original import Original, of_images
from hjepa_mlx.data.prepare import originals_of, prepare
from hjepa_mlx.data.storage import Pixels
from hjepa_mlx.files import sha256
from hjepa_mlx.rng import generator

TRAINED, VALIDATED = 20_000, 10_000  # images of Fashion-MNIST
WALLPAPERS = Path("/usr/share/backgrounds")
SHORTER = 512  # pixels of a photograph's shorter side when it is cut
CUT, SIDE = 96, 64  # pixels of a crop's side in it, and in what is written
LEARNT, JUDGED = 120, 60  # crops of a photograph
# Which part of a photograph's width is learnt from and judged on
HALVES = {"test": ((0, 1 / 2), (1 / 2, 1)), "validation": ((0, 1 / 4), (1 / 4, 1 / 2))}

EMOJI = {  # SHA-256 of each vendor's package
    "google": "fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438",
    "twitter": "f64a530c63bca463bd8317fdc4615ce63a53a0c65018e4ce2d848aaba7a28877",
    "facebook": "017038cf5a4e7fcf03dd9133cbed43d4c281c4b3ce7b927c7160261b92b8821e",
}
CLIP_ART = Path("/usr/share/openclipart/png")
LEAST = 10  # code points of a class
CLIP_ARTS, CROPS = 6_000, 110  # pieces of clip art; crops of a photograph
FIGURES = 1_000  # emoji on crops, for each split
SEEN, UNSEEN = (0, 3 / 4), (3 / 4, 1)  # parts of a photograph's width, of `pictures`


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


def wallpapers() -> Iterator[tuple[str, Image.Image]]:
    """Each photograph's name, and itself with a shorter side of SHORTER pixels."""
    paths = sorted([*WALLPAPERS.glob("*_by_*.jpg"), *WALLPAPERS.glob("mate/nature/*.jpg")])
    if not paths:
        raise SystemExit(f"No photographs in {WALLPAPERS}: install the packages named above.")
    for path in paths:
        with Image.open(path) as file:
            whole = file.convert("RGB")
        scale = SHORTER / min(whole.size)
        size = round(whole.width * scale), round(whole.height * scale)
        yield path.stem, whole.resize(size, Image.Resampling.LANCZOS)


def crops(
    photograph: Image.Image, part: tuple[float, float], count: int, rng: np.random.Generator
) -> Iterator[Image.Image]:
    """`count` random crops of a part of the photograph's width."""
    width, height = photograph.size
    first, last = round(part[0] * width), round(part[1] * width) - CUT
    for _ in range(count):
        x, y = int(rng.integers(first, last + 1)), int(rng.integers(height - CUT + 1))
        crop = photograph.crop((x, y, x + CUT, y + CUT))
        yield crop.resize((SIDE, SIDE), Image.Resampling.LANCZOS)


def photographs(root: Path) -> int:
    """Write the crops as PNG, a folder for each photograph; returns how many of those."""
    whole = dict(wallpapers())
    for of, photograph in whole.items():
        for name, parts in HALVES.items():
            for split, part, many in zip(("train", "test"), parts, (LEARNT, JUDGED), strict=True):
                folder = root / "photographs" / name / split / of
                folder.mkdir(parents=True, exist_ok=True)
                rng = generator(0, f"{name} {split} {of}")
                for number, crop in enumerate(crops(photograph, part, many, rng)):
                    crop.save(folder / f"{number:03}.png")
    return len(whole)


class Emoji(NamedTuple):
    """One vendor's picture [SIDE, SIDE] RGBA of a code point, and its subcategory."""

    code: str
    kind: str
    picture: Image.Image


def pictures(root: Path) -> dict[str, int]:
    """Write both pairs of splits in the prepared form, and the figures; returns what was used."""
    emoji = list(emoji_of(root))
    kinds = {one.code: one.kind for one in emoji}
    sizes = Counter(kinds.values())
    classes = tuple(sorted(k for k, n in sizes.items() if n >= LEAST and k != "country-flag"))
    codes = sorted(code for code, kind in kinds.items() if kind in classes)
    order = [codes[i] for i in generator(0, "held out emoji").permutation(len(codes))]
    order.sort(key=kinds.__getitem__)  # so that an eighth of each class is in each split
    held_out = {"validation": {*order[::8]}, "test": {*order[4::8]}}
    hidden = {one.picture.tobytes() for one in emoji if one.code in {*order[::4]}}
    seen = [one for one in emoji if one.picture.tobytes() not in hidden]  # nor a picture's twin
    labelled = [one for one in seen if one.kind in classes]
    cut = {
        part: [c for of, whole in wallpapers() for c in crops(whole, part, CROPS, _rng(part, of))]
        for part in (SEEN, UNSEEN)
    }
    every = [
        *map(_on_white, (one.picture for one in seen)),
        *islice(clip_art(), CLIP_ARTS),
        *cut[SEEN],
    ]
    for name, codes_of in held_out.items():
        judged = [one for one in emoji if one.code in codes_of]
        folder = root / "pictures" / name
        splits = {
            "pretrain": of_images(_stored(every), np.zeros(0, np.int64), ()),
            "train": _labelled(labelled, classes),
            "test": _labelled(judged, classes),
        }
        prepare("pictures", splits, folder)
        for split, of, on in (("train", labelled, cut[SEEN]), ("test", judged, cut[UNSEEN])):
            rng = generator(0, f"{name} {split} figures")
            np.save(folder / f"{split}-figures.npy", figures(of, on, rng))
    once, again = (root / "pictures" / name / "pretrain-images.npy" for name in held_out)
    again.unlink()
    again.hardlink_to(once)
    found = {name: split.images for name, split in splits.items()}
    return {**found, "classes": len(classes), "emoji": len(emoji), "seen emoji": len(seen)}


def emoji_of(root: Path) -> Iterator[Emoji]:
    """All emoji of the packages in `root`, which are read in memory only."""
    for vendor, checksum in EMOJI.items():
        path = root / f"emoji-datasource-{vendor}-16.0.0.tgz"
        if not path.is_file() or sha256(path) != checksum:
            raise SystemExit(f"{path} is missing or damaged: get it with the npm command above.")
        files = {}
        with tarfile.open(path) as tar:
            for member in tar:
                name = member.name.removeprefix(f"package/img/{vendor}/{SIDE}/")
                wanted = "/" not in name or name == "package/emoji.json"
                if wanted and (file := tar.extractfile(member)):
                    files[name] = file.read()
        for row in json.loads(files["package/emoji.json"]):
            if row["image"] in files:
                picture = Image.open(io.BytesIO(files[row["image"]])).convert("RGBA")
                yield Emoji(row["unified"], row["subcategory"], picture)


def clip_art() -> Iterator[Image.Image]:
    """The clip art in a fixed random order, whole pictures on white, each once."""
    paths = sorted(CLIP_ART.rglob("*.png"))
    if not paths:
        raise SystemExit(f"No clip art in {CLIP_ART}: install the packages named above.")
    known = set()  # many differ by name only
    for number in generator(0, "clip art").permutation(len(paths)):
        try:
            whole = Image.open(io.BytesIO(decodable(paths[number].read_bytes()).tobytes()))
        except ValueError:  # too large
            continue
        small = ImageOps.pad(whole, (SIDE, SIDE), Image.Resampling.LANCZOS, color="white")
        if small.tobytes() not in known:
            known.add(small.tobytes())
            yield small


def figures(emoji: list[Emoji], grounds: list[Image.Image], rng: np.random.Generator) -> np.ndarray:
    """Emoji of any size and place on crops, and how much of each pixel they cover, as alpha.

    [FIGURES, SIDE, SIDE, 4] uint8.
    """
    found = []
    for _ in range(FIGURES):
        one, ground = emoji[rng.integers(len(emoji))], grounds[rng.integers(len(grounds))]
        side = int(rng.integers(SIDE // 2, SIDE + 1))
        place = rng.integers(SIDE - side + 1, size=2).tolist()
        figure = Image.new("RGBA", (SIDE, SIDE))
        figure.paste(one.picture.resize((side, side), Image.Resampling.LANCZOS), place)
        both = Image.alpha_composite(ground.convert("RGBA"), figure)
        both.putalpha(figure.getchannel("A"))
        found.append(np.asarray(both))
    return np.stack(found)


def _on_white(picture: Image.Image) -> Image.Image:
    white = Image.new("RGBA", picture.size, "white")
    return Image.alpha_composite(white, picture).convert("RGB")


def _rng(part: tuple[float, float], of: str) -> np.random.Generator:
    return generator(0, f"pictures {part} {of}")


def _stored(images: Iterable[Image.Image]) -> Pixels:
    return Pixels(np.stack([np.asarray(image) for image in images]), "pictures")


def _labelled(emoji: list[Emoji], classes: tuple[str, ...]) -> Original:
    labels = np.array([classes.index(one.kind) for one in emoji])
    return of_images(_stored(_on_white(one.picture) for one in emoji), labels, classes)


def main() -> None:
    """Make those asked for under the folder given."""
    makers = {"fashion": fashion, "photographs": photographs, "pictures": pictures}
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("root", type=Path)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(makers)}: all")
    asked = parser.parse_args()
    for name in asked.names or makers:
        print(f"{asked.root / name}: {makers[name](asked.root)}")


if __name__ == "__main__":
    main()
