"""Bad input, end to end: real commands end with a status and one line that says what to do."""

import json
import os
import shlex
import struct
import subprocess
import sys
import zlib
from ast import literal_eval
from pathlib import Path

import numpy as np
import pytest
from commands import assert_one_line, files, hjepa, picture, pictures
from PIL import Image
from typer.testing import CliRunner

from hjepa_mlx.cli import app

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
    "override below a value": ("train tiny.yaml --set compile.x=1", "'compile' is a value"),
    "word for a number": ("train tiny.yaml --set optim.epochs=many", "a valid integer"),
    "fraction for an integer": ("train tiny.yaml --set seed=1.5", "'seed': it should be"),
    "negative batch": ("train tiny.yaml --set data.batch_size=-4", "greater than or equal to 2"),
    "share above one": ("train tiny.yaml --set data.crop_scale=[0.3,1.5]", "less than or equal"),
    "range upside down": ("train tiny.yaml --set data.crop_scale=[0.9,0.3]", "[low, high]"),
    "unknown loss": ("train tiny.yaml --set loss.kind=smoth_l1", "mean 'smooth_l1'?"),
    "unknown loss, dry": ("train tiny.yaml --dry-run --set loss.kind=l1", "smooth_l1, mse"),
    "unknown precision": ("train tiny.yaml --set precision=int8", "'float32'"),
    "warm-up to the end": ("train tiny.yaml --set optim.warmup_epochs=2", "less than optim.epochs"),
    "heads": ("train tiny.yaml --set model.heads=5", "not a multiple of model.heads=5"),
    "image no multiple of patch": ("train tiny.yaml --set model.patch_size=5", "patch_size=5"),
    "grid too small": ("train tiny.yaml --set model.patch_size=16", "Use model.patch_size=4"),
    "too many context tokens": ("train tiny.yaml --set masks.context_tokens=60", "context_tokens"),
    "one block to share": (
        "train tiny.yaml --set model.predictor_context=both --set masks.targets=1",
        "masks.targets of at least 2",
    ),
    "level weights": ("train tiny.yaml --set loss.level_weights=[1,1]", "one item per level"),
    "no level predicted": ("train tiny.yaml --set loss.level_weights=[0,0,0]", "must be predicted"),
    "more levels than blocks": ("train tiny.yaml --set model.levels=4", "is of 3 levels"),
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
    "repeated key": ("train twice.yaml", "'optim' is given twice"),
    "unknown data set, dry": ("train tiny.yaml --dry-run --set data.name=fashon", "No data set"),
    "batch too large, dry": ("train tiny.yaml --dry-run --set data.batch_size=99", "there are 36"),
    "size of a settled model": (
        "train run/config.yaml --set model.size=base",
        "model.size=base contradicts model.dim=64",
    ),
    "folder without images": ("train tiny.yaml --data-dir no-pictures", "/no-pictures (looked for"),
    "one-image folder": ("train tiny.yaml --data-dir one", "needs at least 8 training images"),
    "batch larger than the data": ("train tiny.yaml --set data.batch_size=99", "there are 36"),
    "run folder that holds a run": ("train tiny.yaml --run-dir run", "--resume"),
    "run folder that is a file": (
        "train tiny.yaml --run-dir tiny.yaml",
        "Choose another --run-dir",
    ),
    "run folder below a file": ("train tiny.yaml --run-dir tiny.yaml/run", "Choose another"),
    "resume without a run": ("train tiny.yaml --resume", "no run of 'tiny'"),
    "resume what is no run": ("train tiny.yaml --resume --run-dir pictures", "is not a run"),
    "resume with another config": (
        "train tiny.yaml --resume --run-dir run --set optim.lr=1",
        "optim.lr was 0.001, now 1.0",
    ),
    "fewer epochs than were trained": ("train run --epochs 1", "run has trained 2 epochs already"),
    "size of no whole patches": (
        "embed run pictures --out f.npz --image-size 30x32",
        "30×32 is not a multiple of the patch size 4",
    ),
    "unknown fit": ("eval run --fit pad", "There are: crop, whole"),
    "unknown key of fine-tuning": ("finetune run --set finetune.lrs=1", "mean 'finetune.lr'?"),
    "another network for fine-tuning": ("finetune run --set model.depth=4", "leave model.*"),
    "predict by no classifier": ("predict run pictures --out p.csv", "run is no classifier"),
    "evaluate what is no run": ("eval pictures", "pictures is not a run"),
    "evaluate what does not exist": ("eval nowhere", "nowhere is not a run"),
    "evaluate on an unknown data set": ("eval run --data fashon-mnist", "'fashon-mnist'"),
    "evaluate on a folder not given": ("eval run --data folder", "give --data-dir FOLDER"),
    "evaluate on images none of which can be read": (
        "eval run --data-dir unreadable",
        "unreadable",
    ),
    "no image left for evaluation": (
        "eval run --data-dir one",
        "no image is left for evaluation",
    ),
    "resume with other images": (
        "train tiny.yaml --resume --run-dir run --data-dir nine",
        "Gone since the run began: 31 images (first: a/10.jpg). Put them back",
    ),
    "result into no folder": ("eval run --json nowhere/scores.json", "nowhere/scores.json"),
}


@pytest.mark.parametrize(("command", "says"), REFUSED.values(), ids=REFUSED)
def test_refused_in_one_line_before_anything_is_made(prepared, command, says, monkeypatch):
    before = files(prepared)
    monkeypatch.chdir(prepared)
    inside = CliRunner().invoke(app, shlex.split(command))  # much faster than a process each
    ended = subprocess.CompletedProcess(command, inside.exit_code, inside.stdout, inside.stderr)
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
    names = {"brackets[/b].jpg": b"", "two\nlines.jpg": b""}
    if sys.platform == "linux":
        names[os.fsdecode(b"not-utf-8-\xff.jpg")] = b""
    return names | {
        "truncated.jpg": good[: len(good) // 2],
        "corrupt.jpg": good[:2] + bytes(300) + good[302:],
        "text.jpg": b"Not a picture.",
        "empty.png": b"",
        "truncated.png": png_of(28, 24),
        "large.png": png_of(9_900, 9_900),
        "bomb.png": png_of(60_000, 60_000),
    }


def test_odd_images_all_train(prepared, tmp_path):
    for split in ("train", "val"):
        pictures(tmp_path / "odd" / split, 20)
        odd_pictures(tmp_path / "odd" / split / "a")
    ended = hjepa(
        prepared,
        "train tiny.yaml --set run.final_eval=true "
        f"--data-dir {tmp_path}/odd --run-dir {tmp_path}/new",
    )
    assert ended.returncode == 0, ended.stderr
    assert not (tmp_path / "new/skipped.txt").exists()
    protocol = json.loads((tmp_path / "new/eval.json").read_text())["protocol"]
    assert protocol["skipped_images"] == 0
    assert protocol["bank_images"] == protocol["query_images"] == 38


def test_broken_images_are_left_out_counted_and_named(prepared, tmp_path):
    for split in ("train", "val"):
        pictures(tmp_path / "data" / split, 24)
    folder = tmp_path / "data" / "train" / "a"
    broken = broken_pictures((folder / "00.jpg").read_bytes())
    for name, content in broken.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)
    ended = hjepa(
        prepared,
        "train tiny.yaml --set run.final_eval=true "
        f"--data-dir {tmp_path}/data --run-dir {tmp_path}/new",
    )
    assert ended.returncode == 0, ended.stderr
    assert "Traceback" not in ended.stderr
    assert f"{len(broken)} unreadable so far" in ended.stderr
    lines = (tmp_path / "new/skipped.txt").read_text().splitlines()
    named = [literal_eval(line.split("\t")[0]) for line in lines]
    assert sorted(named) == sorted(str(folder / name) for name in broken)
    protocol = json.loads((tmp_path / "new/eval.json").read_text())["protocol"]
    assert protocol["skipped_images"] == len(broken)
    assert protocol["bank_images"] == 24


def test_a_folder_of_broken_images_only_is_refused_and_they_are_named(prepared, tmp_path):
    command = f"train tiny.yaml --data-dir unreadable --run-dir {tmp_path}/new"
    assert_one_line(hjepa(prepared, command), "none of 27 images can be read", "unreadable/")
    assert len((tmp_path / "new/skipped.txt").read_text().splitlines()) == 30
