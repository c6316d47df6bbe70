"""Hostile files, handed to the commands that read them."""

import os
import random
import shutil
from pathlib import Path

import archives
import documents
from hostile import IMAGE_BOMBS, mutated, saved
from materials import OF_PICTURES, handed, place_in

FORMATS = {"jpg": "JPEG", "png": "PNG", "webp": "WEBP", "gif": "GIF", "tif": "TIFF", "bmp": "BMP",
           "ppm": "PPM", "jp2": "JPEG2000", "tga": "TGA"}  # fmt: skip


def picture(rng: random.Random, folder: Path) -> str:
    """Mutated pictures among good ones."""
    place = place_in(folder)
    for number in range(20):
        suffix = rng.choice([*FORMATS])
        mode = rng.choice(("RGB", "RGB", "L", "RGBA", "P", "I;16", "CMYK", "1"))
        try:
            data = saved(FORMATS[suffix], 40, 30, mode)
        except (OSError, KeyError, ValueError):  # not every format holds every mode
            data = saved(FORMATS[suffix], 40, 30)
        path = place / "pictures" / rng.choice("ab") / f"{number}.{rng.choice((suffix, 'jpg'))}"
        path.write_bytes(mutated(rng, data))
    return "20 mutated: " + handed(rng, place, OF_PICTURES)


def picture_bomb(rng: random.Random, folder: Path) -> str:
    """Two bombs among good pictures, each twice, so that two threads meet the same."""
    place, names = place_in(folder), rng.sample([*IMAGE_BOMBS], 2)
    for name in names:
        data = IMAGE_BOMBS[name]()
        for part in "ab":
            suffix = rng.choice((name.split()[0], "jpg", "png"))
            suffix = {"jpeg2000": "jp2", "eps": "jpg", "cmyk": "jpg"}.get(suffix, suffix)
            (place / f"pictures/{part}/{name.replace(' ', '-')}.{suffix}").write_bytes(data)
    return f"{', '.join(names)}: {handed(rng, place, OF_PICTURES)}"


def _odd_names(folder: Path, outside: Path) -> None:
    """Files that have odd names, or are none."""
    one = folder / "00.jpg"
    for name in (b"x" * 251 + b".jpg", b"new\nline.jpg", b"\x1b[31mred\x07.jpg", b"\xff\xfe.jpg",
                 b" .jpg", b"-rf.jpg", b"[bold].jpg", b"%s{0}.jpg", "é\u202e.jpg".encode()):  # fmt: skip
        shutil.copy(one, os.fsencode(folder) + b"/" + name)
        with open(os.fsencode(folder) + b"/bad" + name[:240] + b".png", "wb") as file:
            file.write(b"no picture")
    os.mkfifo(folder / "pipe.jpg")
    with open(folder / "holes.jpg", "wb") as file:
        file.truncate(50_000_000_000)
    links = {"zero.jpg": "/dev/zero", "loop.jpg": "loop.jpg", "nothing.jpg": "nowhere", "up": "../..",
             "out.jpg": str(outside), "tty.jpg": "/dev/tty", "root": "/proc/self/root/etc"}  # fmt: skip
    for name, target in links.items():
        os.symlink(target, folder / name)


def odd_names(rng: random.Random, folder: Path) -> str:
    place = place_in(folder)
    _odd_names(place / "pictures" / "a", folder / "outside.txt")
    return "28 odd names: " + handed(rng, place, OF_PICTURES)


TRIALS = {
    "picture": picture,
    "picture bomb": picture_bomb,
    "odd names": odd_names,
    **archives.FILES,
    **documents.FILES,
}
