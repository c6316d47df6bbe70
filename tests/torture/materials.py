"""What hostile files are made of: good ones of every kind; and how commands get them."""

import json
import random
import shutil
from pathlib import Path

import layouts
from commands import TINY, pictures
from hostile import idx, mutated, mutated_tree, nested
from rules import everything, hand_over, run
from run import once

everything()
TRAIN = "train tiny.yaml --run-dir out/run --set optim.epochs=1"
PREDICT = "predict classifier pictures --out out/p.csv"
SLOW = ("eval run --data-dir pictures", "viz run --data-dir pictures --out out/viz")
OF_PICTURES = (
    f"{TRAIN} --data-dir pictures",
    "embed run pictures --out out/f.npz",
    "embed run pictures --out out/f.csv",
    PREDICT,
    "finetune run --data-dir pictures --out out/c --set finetune.epochs=1",
    "datasets check pictures",
    "datasets verify pictures",
    "datasets prepare folder --data-dir pictures --out out/prepared",
)
OF_RUNS = (
    "eval run", "embed run pictures --out out/f.npz", "export run --to safetensors --out out/e",
    "viz run --out out/viz", "train run --resume", "train run --epochs 3", "compare run other",
    "finetune run --out out/c --set finetune.epochs=1", "train tiny.yaml --init run --dry-run",
)  # fmt: skip


def _make(folder: Path) -> None:
    """A run, a classifier, an export and small data sets in every layout, all of them good."""
    place = folder / "place"
    pictures(place / "pictures", 24)
    (place / "tiny.yaml").write_text(TINY)
    for command in (
        "train tiny.yaml --run-dir run",
        "finetune run --out classifier --set finetune.epochs=1",
        "export run --to safetensors --out export",
        "eval run",
    ):
        ended = run(command, place)
        assert ended.status == 0, ended
    shutil.copytree(place / "run", place / "other")
    data = folder / "data"
    layouts.cifar10(data / "cifar10", 8)
    layouts.stl10(data / "stl10", 10, 10, 10)
    photos = layouts.photos(layouts.CMC[:3], 4, 3)
    layouts.tars(data / "tars", photos)
    layouts.parquet(data / "parquet", photos, files=1)
    names = ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1")
    (data / "fashion-mnist").mkdir()
    for name in names:
        axes = (20, 28, 28) if "images" in name else (20,)
        content = bytes(i % 10 for i in range(20 * 28 * 28 if "images" in name else 20))
        (data / f"fashion-mnist/{name}-ubyte.gz").write_bytes(idx(axes, content))
    for name in ("cifar10", "imagenet100"):
        source = "tars" if name == "imagenet100" else name
        shutil.copytree(data / source, place / f"data/{name}")
        ended = run(f"datasets prepare {name} --data-dir data", place)
        assert ended.status == 0, ended
        (data / "prepared").mkdir(exist_ok=True)
        shutil.move(place / f"data/{name}/prepared", data / f"prepared/{name}")
    shutil.rmtree(place / "data")


def good() -> Path:
    return once("files", _make)


def place_in(folder: Path, *data: str) -> Path:
    """A place in `folder` with all that is good, and `data`: NAME, or NAME:SOURCE of a data set."""
    place = folder / "place"
    shutil.copytree(good() / "place", place)
    (place / "out").mkdir()
    for one in data:
        name, _, source = one.partition(":")
        shutil.copytree(good() / "data" / (source or name), place / "data" / name)
    (folder / "outside.txt").write_text("Nobody may touch this.")
    return place


def handed(
    rng: random.Random, place: Path, commands: tuple[str, ...], may_write: tuple[str, ...] = ()
) -> str:
    """One of the commands, in a process as users start it once in a while."""
    command = rng.choice(SLOW if commands is OF_PICTURES and rng.random() < 0.05 else commands)
    return hand_over([command], place, ("out", "run", *may_write), rng.random() < 0.03)


def change(rng: random.Random, path: Path) -> None:
    path.write_bytes(mutated(rng, path.read_bytes()))


def change_json(rng: random.Random, path: Path) -> None:
    """By tree, by bytes, or something else altogether."""
    kind = rng.randrange(10)
    if kind < 7:
        path.write_text(json.dumps(mutated_tree(rng, json.loads(path.read_bytes()))))
    elif kind < 9:
        change(rng, path)
    else:
        path.write_bytes(rng.choice((b"", b"[]", b"null", nested(100_000), nested(10**6), b"\xff")))
