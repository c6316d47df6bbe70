"""Bad input, end to end: real commands end with a status and one line that says what to do."""

import gzip
import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import hjepa_mlx

DEMO = Path(hjepa_mlx.__file__).parent / "data" / "demo"
HJEPA = [sys.executable, "-m", "hjepa_mlx"]
STEPS = 8  # of the run that the tests share: two passes over 36 images, a checkpoint after each
OLD, NEW = "run/checkpoints/step-00000004", "run/checkpoints/step-00000008"

TINY = """
compile: false
data: {name: folder, dir: pictures, image_size: 32, batch_size: 8}
model: {size: custom, dim: 64, depth: 3, heads: 1, patch_size: 4, predictor_dim: 64, predictor_depth: 1}
optim: {epochs: 2, warmup_epochs: 0}
run: {milestone_epochs: 1, log_every: 1}
"""
FILES = {
    "tiny.yaml": TINY,
    "broken.yaml": "data: [1",
    "list.yaml": "- data",
    "empty.yaml": "",
    "binary.yaml": b"\x80\x81\xff",
    "date.yaml": "name: 2024-13-45",
    "no-pictures/readme.txt": "There are none.",
}

# What is asked, and what the answer has to say. All of it is refused before anything is made.
REFUSED = {
    "unknown config": ("train fashion-mnits", "No config named 'fashion-mnits'"),
    "config file that does not exist": ("train nowhere.yaml", "nowhere.yaml does not exist"),
    "config that is no YAML": ("train broken.yaml", "broken.yaml is not valid YAML"),
    "config that is a list": ("train list.yaml", "must hold 'key: value' lines"),
    "config that is binary": ("train binary.yaml", "binary.yaml is not valid YAML"),
    "config with an impossible date": ("train date.yaml", "date.yaml"),
    "config that is empty": ("train empty.yaml", "give --data-dir"),
    "unknown key": ("train tiny.yaml --set optim.epoch=3", "Did you mean 'optim.epochs'?"),
    "key without its section": ("train tiny.yaml --set lr=3", "Did you mean 'optim.lr'?"),
    "override without =": ("train tiny.yaml --set optim.epochs", "key=value"),
    "override that is no YAML": ("train tiny.yaml --set seed=[1", "not valid YAML"),
    "override below a value": ("train tiny.yaml --set seed.x=1", "'seed' is a value"),
    "word for a number": ("train tiny.yaml --set optim.epochs=many", "a valid integer"),
    "fraction for an integer": ("train tiny.yaml --set seed=1.5", "'seed': it should be"),
    "negative batch": ("train tiny.yaml --set data.batch_size=-4", "greater than or equal to 2"),
    "share above one": ("train tiny.yaml --set data.crop_scale=[0.3,1.5]", "less than or equal"),
    "range upside down": ("train tiny.yaml --set data.crop_scale=[0.9,0.3]", "[low, high]"),
    "unknown precision": ("train tiny.yaml --set precision=int8", "'float32'"),
    "warm-up to the end": ("train tiny.yaml --set optim.warmup_epochs=2", "less than optim.epochs"),
    "heads": ("train tiny.yaml --set model.heads=5", "not a multiple of model.heads=5"),
    "image no multiple of patch": ("train tiny.yaml --set model.patch_size=5", "patch_size=5"),
    "grid too small": ("train tiny.yaml --set model.patch_size=16", "Use model.patch_size=4"),
    "too many context tokens": ("train tiny.yaml --set masks.context_tokens=60", "context_tokens"),
    "level weights": ("train tiny.yaml --set loss.level_weights=[1,1]", "one item a level"),
    "more levels than blocks": ("train tiny.yaml --set model.levels=4", "depth is 3"),
    "level pooled twice": ("train tiny.yaml --set model.level_pool=[1,8,16]", "level 1 again"),
    "level twice": (
        "train tiny.yaml --set model.level_pool=[1,1,2] --set model.level_blocks=[1,1,3]",
        "model.level_blocks",
    ),
    "unknown data set": ("train tiny.yaml --set data.name=fashon-mnist", "mean 'fashion-mnist'?"),
    "folder data set without folder": (
        "train tiny.yaml --set data.dir=null",
        "give --data-dir FOLDER",
    ),
    "data folder that does not exist": ("train tiny.yaml --data-dir nowhere", "nowhere does not"),
    "folder without images": ("train tiny.yaml --data-dir no-pictures", "no images in no-pictures"),
    "one-image folder": ("train tiny.yaml --data-dir one", "needs at least 8 training images"),
    "batch larger than the data": ("train tiny.yaml --set data.batch_size=99", "there are 36"),
    "run folder that holds a run": ("train tiny.yaml --run-dir run", "--resume"),
    "run folder that is a file": ("train tiny.yaml --run-dir tiny.yaml", "tiny.yaml"),
    "run folder below a file": ("train tiny.yaml --run-dir tiny.yaml/run", "tiny.yaml/run"),
    "resume without a run": ("train tiny.yaml --resume", "no run of 'tiny'"),
    "resume what is no run": ("train tiny.yaml --resume --run-dir pictures", "is not a run"),
    "resume with another config": (
        "train tiny.yaml --resume --run-dir run --set optim.lr=1",
        "optim.lr was 0.001, now 1.0",
    ),
    "evaluate what is no run": ("eval pictures", "pictures is not a run"),
    "evaluate what does not exist": ("eval nowhere", "nowhere is not a run"),
    "evaluate on an unknown data set": ("eval run --data fashon-mnist", "'fashon-mnist'"),
    "evaluate on a folder not given": ("eval run --data folder", "give --data-dir FOLDER"),
    "evaluate on too few images": ("eval run --data-dir few", "20 training images"),
    "evaluate on images none of which can be read": ("eval run --data-dir unreadable", "unreadable"),
    "result into no folder": ("eval run --json nowhere/scores.json", "nowhere/scores.json"),
    "truncated data set": ("train demo --set data.name=fashion-mnist --data-dir cut", "cut/train-"),
    "data set of another kind": (
        "train demo --set data.name=fashion-mnist --data-dir other",
        "other/train-images-idx3-ubyte.gz is not a whole IDX file",
    ),
}


def hjepa(folder: Path, command: str, **options) -> subprocess.CompletedProcess:
    """Run `hjepa-mlx COMMAND` in `folder`."""
    return subprocess.run(
        HJEPA + shlex.split(command),
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=100,
        **options,
    )


def assert_one_line(ended: subprocess.CompletedProcess, *parts: str) -> None:
    """The command ended with status 1 or 2 and one foreseen line that says all of `parts`."""
    assert ended.returncode in (1, 2), ended
    assert "Traceback" not in ended.stdout + ended.stderr
    ours = [line for line in ended.stderr.splitlines() if line.startswith("hjepa-mlx: ")]
    assert ours == ended.stderr.splitlines()[-1:], ended.stderr
    assert "unexpected" not in ours[0]
    for part in parts:
        assert part in ours[0]


def files(folder: Path) -> set[Path]:
    return set(folder.rglob("*"))


def picture(width: int = 28) -> Image.Image:
    return Image.fromarray(np.random.default_rng(width).integers(0, 256, (24, width, 3), np.uint8))


def pictures(folder: Path, count: int) -> None:
    for number in range(count):
        path = folder / "ab"[number % 2] / f"{number:02}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(20 + number).save(path)


@pytest.fixture(scope="session")
def prepared(tmp_path_factory):
    """A folder with configs, images, damaged data sets, and a run of two checkpoints."""
    folder = tmp_path_factory.mktemp("prepared")
    for name, count in {"pictures": 40, "few": 12, "one": 1}.items():
        pictures(folder / name, count)
    for name, content in FILES.items():
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    (folder / "unreadable").mkdir()
    for number in range(30):
        (folder / "unreadable" / f"{number}.jpg").write_text("Not a picture.")
    for name in ("cut", "other", "short"):
        shutil.copytree(DEMO, folder / name)
    images = "train-images-idx3-ubyte.gz"
    os.truncate(folder / "cut" / images, 1000)
    (folder / "other" / images).write_bytes(gzip.compress(bytes((0, 0, 13, 3)) + bytes(100)))
    (folder / "short" / images).write_bytes(gzip.compress(bytes(5)))
    ended = hjepa(folder, "train tiny.yaml --run-dir run")
    assert ended.returncode == 0, ended.stderr
    return folder


@pytest.fixture
def place(prepared, tmp_path):
    """A copy of the prepared folder to damage."""
    return shutil.copytree(prepared, tmp_path / "place")


@pytest.mark.parametrize(("command", "says"), REFUSED.values(), ids=REFUSED)
def test_refused_in_one_line_before_anything_is_made(prepared, command, says):
    before = files(prepared)
    ended = hjepa(prepared, command)
    assert_one_line(ended, says)
    assert ended.stderr.count("\n") == 1
    assert files(prepared) == before


@pytest.mark.parametrize(
    ("command", "says"),
    [
        ("frobnicate", "No such command 'frobnicate'"),
        ("train tiny.yaml --frobnicate", "No such option"),
        ("train", "Missing argument"),
    ],
)
def test_commands_and_options_that_do_not_exist_are_refused(tmp_path, command, says):
    ended = hjepa(tmp_path, command)
    assert ended.returncode == 2
    assert says in ended.stderr
    assert "Traceback" not in ended.stderr


# Images: those that only look odd are used, and those that are broken are left out and named.


def odd_pictures(folder: Path) -> None:
    rgb = picture()
    rotated = Image.Exif()
    rotated[0x0112] = 6
    rgb.save(folder / "rotated.jpg", exif=rotated)
    rgb.convert("CMYK").save(folder / "cmyk.jpg")
    rgb.convert("L").save(folder / "grey.jpg")
    rgb.convert("RGBA").save(folder / "alpha.png")
    rgb.convert("LA").save(folder / "grey-alpha.png")
    rgb.quantize(16).save(folder / "palette.png")
    rgb.quantize(16).save(folder / "palette.gif")
    Image.fromarray(np.arange(24 * 28, dtype=np.uint16).reshape(24, 28) * 90).save(
        folder / "16-bit.png"
    )
    for name in ("p.webp", "p.bmp", "p.tiff", "p.ppm"):
        rgb.save(folder / name)
    for width, height in ((1, 1), (20000, 10), (10, 20000)):
        for ending in ("jpg", "png"):
            rgb.resize((width, height)).save(folder / f"{width}x{height}.{ending}")


def png_of(width: int, height: int) -> bytes:
    """A PNG that says it has these sides and holds almost nothing."""
    chunks = (
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)),
        (b"IDAT", zlib.compress(bytes(1000))),
        (b"IEND", b""),
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks
    )


def broken_pictures(good: bytes) -> dict[str, bytes]:
    broken = {
        "truncated.jpg": good[: len(good) // 2],
        "corrupt.jpg": good[:2] + bytes(300) + good[302:],
        "text.jpg": b"Not a picture.",
        "empty.png": b"",
        "truncated.png": png_of(28, 24),
        "large.png": png_of(9_900, 9_900),
        "bomb.png": png_of(60_000, 60_000),
        "[red] [/blue].jpg".replace("/", "|"): b"brackets",
        "[": b"",
    }
    del broken["["]
    return broken


def test_odd_images_all_train(place):
    folder = place / "odd"
    pictures(folder / "train", 8)
    pictures(folder / "val", 8)
    odd_pictures(folder / "train" / "a")
    odd_pictures(folder / "val" / "b")
    ended = hjepa(place, "train tiny.yaml --data-dir odd --run-dir new")
    assert ended.returncode == 0, ended.stderr
    assert not (place / "new/skipped.txt").exists()
    protocol = json.loads((place / "new/eval.json").read_text())["protocol"]
    assert protocol["skipped_images"] == 0
    assert protocol["bank_images"] == protocol["query_images"] == 26


