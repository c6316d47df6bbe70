"""Hostile files, handed to the commands that read them."""

import os
import random
import shutil
from pathlib import Path

import archives
import documents
from hostile import IMAGE_BOMBS, mutated, saved
from materials import OF_PICTURES, TRAIN, handed, place_in

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
                 b" .jpg", b"-rf.jpg", b"[bold].jpg", b"%s{0}.jpg",
                 "é\u202e.jpg".encode()):  # fmt: skip
        shutil.copy(one, os.fsencode(folder) + b"/" + name)
        with open(os.fsencode(folder) + b"/bad" + name[:240] + b".png", "wb") as file:
            file.write(b"no picture")
    os.mkfifo(folder / "pipe.jpg")
    with open(folder / "holes.jpg", "wb") as file:
        file.truncate(50_000_000_000)
    links = {"zero.jpg": "/dev/zero", "loop.jpg": "loop.jpg", "nothing.jpg": "nowhere",
    "up": "../..",
             "out.jpg": str(outside), "tty.jpg": "/dev/tty",
             "root": "/proc/self/root/etc"}  # fmt: skip
    for name, target in links.items():
        os.symlink(target, folder / name)


def odd_names(rng: random.Random, folder: Path) -> str:
    place = place_in(folder)
    _odd_names(place / "pictures" / "a", folder / "outside.txt")
    return "28 odd names: " + handed(rng, place, OF_PICTURES)


def labels(rng: random.Random, folder: Path) -> str:
    """A CSV file of labels."""
    place = place_in(folder)
    good = "path,label\n" + "".join(f"{'ab'[n % 2]}/{n:02}.jpg,{'xy'[n % 2]}\n" for n in range(24))
    text = rng.choice(
        (good, good, good, good.replace(",", ";"), good * 20_000, '"' * 10**6, "a," * 10**6,
         good.replace("x", "\0"),
         "a/00.jpg," + "x" * 10**6, "\n".join(f"a/{n:02}.jpg,{n}" for n in range(10**6)),
         "../" * 10**5 + ",x",
         good.replace("x", "new\x85line").replace("y", "\x1b[31m"), "a/00.jpg,\ud800\nb/01.jpg,y",
         "/dev/zero,x")
    )  # fmt: skip
    data = text.encode("utf-8", "surrogatepass")
    (place / "l.csv").write_bytes(mutated(rng, data) if rng.random() < 0.4 else data)
    if rng.random() < 0.1:
        with open(place / "l.csv", "wb") as file:
            file.truncate(30_000_000_000)
    commands = (f"{TRAIN} --set data.labels=l.csv", "datasets check pictures --labels l.csv",
                "finetune run --set data.labels=l.csv --out out/c --set finetune.epochs=1",
                )  # fmt: skip
    return handed(rng, place, commands)


def lists(rng: random.Random, folder: Path) -> str:
    """A list of paths."""
    place = place_in(folder)
    good = "".join(f"pictures/{'ab'[n % 2]}/{n:02}.jpg\n" for n in range(24))
    text = rng.choice(
        (good, good, "/dev/zero\n" + good, "/\0\n" + good, good + "x" * 300 + ".jpg",
         good + "~root/x.jpg\n", good * 10_000,
         "\n" * 10**6 + good, "/proc/self/mem\n", "l.txt\n" * 1000 + good, "\ud800.jpg\n" + good,
         "a" * 10**6,
         "\n".join(f"no/{n}.jpg" for n in range(10**6)) + "\n" + good, "../" * 10**5,
         "pictures\n" * 1000)
    )  # fmt: skip
    data = text.encode("utf-8", "surrogatepass")
    path = place / "l.txt"
    path.write_bytes(mutated(rng, data) if rng.random() < 0.4 else data)
    if rng.random() < 0.1:
        with open(path, "wb") as file:
            file.truncate(30_000_000_000)
    if rng.random() < 0.05:
        path.unlink()
        os.symlink("/dev/zero", path)
    commands = (f"{TRAIN} --data-dir l.txt", "embed run l.txt --out out/f.npz",
                "datasets check l.txt",
                "predict classifier l.txt --out out/p.csv",
                "eval run --data-dir l.txt")  # fmt: skip
    return handed(rng, place, commands)


TRIALS = {
    "picture": picture,
    "picture bomb": picture_bomb,
    "odd names": odd_names,
    "labels": labels,
    "lists": lists,
    **archives.FILES,
    **documents.FILES,
}
