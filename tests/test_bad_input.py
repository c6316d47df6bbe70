"""Bad input, end to end: real commands end with a status and one line that says what to do."""

import gzip
import json
import os
import resource
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import time
import zlib
from ast import literal_eval
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import hjepa_mlx
from hjepa_mlx.recipes import config_folder, find_config

DEMO = Path(hjepa_mlx.__file__).parent / "data" / "demo"
HJEPA = [sys.executable, "-m", "hjepa_mlx"]
# The run that the tests share makes two passes over 36 images, with a checkpoint after each.
OLD, NEW = "run/checkpoints/step-00000004", "run/checkpoints/step-00000008"

TINY = """
compile: false
data: {name: folder, dir: pictures, image_size: 32, batch_size: 8}
model: {size: custom, dim: 64, depth: 3, heads: 1, patch_size: 4,
  predictor_dim: 64, predictor_depth: 1}
optim: {epochs: 2, warmup_epochs: 0}
run: {milestone_epochs: 1, log_every: 1, final_eval: false}
"""
FILES = {
    "tiny.yaml": TINY,
    "broken.yaml": "data: [1",
    "list.yaml": "- data",
    "twice.yaml": "optim: {epochs: 2}\noptim: {lr: 3e-4}",
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
    "override below a value": ("train tiny.yaml --set compile.x=1", "'compile' is a value"),
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
    "one block to share": (
        "train tiny.yaml --set model.predictor_context=both --set masks.targets=1",
        "masks.targets of at least 2",
    ),
    "level weights": ("train tiny.yaml --set loss.level_weights=[1,1]", "one item per level"),
    "no level predicted": ("train tiny.yaml --set loss.level_weights=[0,0,0]", "must be predicted"),
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
        "choose another --run-dir",
    ),
    "run folder below a file": ("train tiny.yaml --run-dir tiny.yaml/run", "choose another"),
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
    "evaluate on images none of which can be read": (
        "eval run --data-dir unreadable",
        "unreadable",
    ),
    "no image left for evaluation": (
        "train tiny.yaml --data-dir nine --set data.batch_size=4",
        "no image is left for evaluation",
    ),
    "too few images for k-NN while training": (
        "train tiny.yaml --data-dir few --set run.eval_every_epochs=1",
        "20 training images",
    ),
    "resume with other images": ("train tiny.yaml --resume --run-dir run --data-dir more", "36"),
    "result into no folder": ("eval run --json nowhere/scores.json", "nowhere/scores.json"),
    "truncated data set": ("datasets prepare fashion-mnist --data-dir cut", "cut/train-"),
    "truncated head of a data set": (
        "datasets prepare fashion-mnist --data-dir short",
        "short/train-images-idx3-ubyte.gz is not a whole IDX file",
    ),
    "data set of another kind": (
        "datasets prepare fashion-mnist --data-dir other",
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
    for name, count in {"pictures": 40, "more": 50, "few": 12, "nine": 9, "one": 1}.items():
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
    assert_one_line(hjepa(prepared, command), "only 0 of 27 images can be read", "unreadable/")
    assert len((tmp_path / "new/skipped.txt").read_text().splitlines()) == 30


# Runs: whatever is damaged, what is whole stays, and the advice in the message works.


@pytest.fixture
def place(prepared, tmp_path):
    """A copy of the prepared configs, images and run, to damage."""
    place = tmp_path / "place"
    for name in ("pictures", "run"):
        shutil.copytree(prepared / name, place / name)
    shutil.copy(prepared / "tiny.yaml", place)
    return place


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)


def halve(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def replace_by(text: str):
    return lambda path: path.write_text(text)


DAMAGE = {
    "model.safetensors with a flipped byte": ("model.safetensors", flip_a_byte, "checksum"),
    "model.safetensors missing": ("model.safetensors", Path.unlink, "is missing"),
    "optimizer.safetensors truncated": ("optimizer.safetensors", halve, "checksum"),
    "optimizer.safetensors empty": ("optimizer.safetensors", replace_by(""), "checksum"),
    "state.json garbage": ("state.json", replace_by("{{"), "state.json"),
    "state.json a list": ("state.json", replace_by("[]"), "state.json"),
    "state.json without most keys": ("state.json", replace_by('{"format": 1}'), "state.json"),
}
RESUME = "train tiny.yaml --resume --run-dir run"


@pytest.mark.parametrize(("file", "damage", "says"), DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_checkpoint_is_named_and_nothing_is_lost(place, file, damage, says):
    damage(place / NEW / file)
    before = files(place)
    assert_one_line(hjepa(place, RESUME), NEW, says, "Delete that folder")
    if file != "optimizer.safetensors":
        assert_one_line(hjepa(place, "eval run"), NEW, says, "Delete that folder")
    assert files(place) == before


def test_a_checkpoint_of_a_later_format_is_not_called_damaged(place):
    replace_by('{"format": 2}')(place / NEW / "state.json")
    ended = hjepa(place, RESUME)
    assert_one_line(ended, NEW, "has format 2", "reads format 1")
    assert "Delete" not in ended.stderr


def test_without_its_damaged_checkpoint_a_run_goes_on_from_the_one_before(place):
    shutil.rmtree(place / NEW)
    ended = hjepa(place, RESUME)
    assert ended.returncode == 0, ended.stderr
    assert "at step 4 of 8" in ended.stderr
    assert (place / NEW / "state.json").is_file()


def test_a_checkpoint_of_another_config_is_refused(place):
    assert hjepa(place, "train tiny.yaml --set model.dim=32 --run-dir other").returncode == 0
    shutil.rmtree(place / NEW)
    shutil.copytree(place / NEW.replace("run", "other"), place / NEW)
    for command in (RESUME, "eval run"):
        assert_one_line(hjepa(place, command), NEW, "belongs to another config", "(32,)", "(64,)")


def test_a_run_without_a_checkpoint_cannot_be_evaluated(place):
    shutil.rmtree(place / "run/checkpoints")
    assert_one_line(hjepa(place, "eval run"), "has no checkpoint")


def limit_file_size() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))


def test_a_checkpoint_that_cannot_be_written_leaves_the_one_before(place):
    shutil.rmtree(place / NEW)
    ended = hjepa(place, RESUME, preexec_fn=limit_file_size)
    assert_one_line(ended, "File too large", "--resume")
    assert {p.name for p in (place / NEW).parent.glob("step-*")} == {Path(OLD).name}
    assert hjepa(place, "eval run").returncode == 0


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 30 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=30m", "tmpfs", str(disk)]
    linux = sys.platform == "linux"
    if not linux or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("only root on Linux can mount a small disk")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_run_that_the_disk_cannot_hold_is_not_started(prepared, small_disk):
    command = f"train tiny.yaml --run-dir {small_disk}/run --set run.keep_last=50"
    assert_one_line(hjepa(prepared, command), "GB", str(small_disk), "run.keep_last")
    assert not files(small_disk)


def test_a_disk_that_fills_up_loses_no_earlier_results(prepared, small_disk):
    shutil.copytree(prepared / "run", small_disk / "run")
    shutil.rmtree(small_disk / NEW)
    kept = [small_disk / OLD / "model.safetensors", small_disk / "run/metrics.jsonl"]
    before = [path.read_bytes() for path in kept]
    (small_disk / "other").write_bytes(bytes(shutil.disk_usage(small_disk).free - 100_000))
    command = f"train tiny.yaml --resume --run-dir {small_disk}/run"
    assert_one_line(hjepa(prepared, command), "No space left", "--resume")
    after = [path.read_bytes() for path in kept]
    assert after[0] == before[0]
    assert after[1].startswith(before[1][: before[1].index(b'{"step": 5')])
    (small_disk / "other").unlink()
    assert hjepa(prepared, command).returncode == 0


def interrupted(place, number, deaf=False):
    """Train until some steps are done, then send a signal: exit status and stderr.

    deaf: whoever reads stderr goes away first, as `tee` does at Ctrl-C.
    """
    command = HJEPA + shlex.split("train tiny.yaml --run-dir new --set optim.epochs=15")

    def hang_up_by_default() -> None:  # though these tests may run under nohup
        signal.signal(signal.SIGHUP, signal.SIG_DFL)

    with subprocess.Popen(
        command, cwd=place, stderr=subprocess.PIPE, text=True, preexec_fn=hang_up_by_default
    ) as process:
        metrics = place / "new/metrics.jsonl"
        while not (metrics.is_file() and metrics.read_text().count("\n") > 2):
            assert process.poll() is None
            time.sleep(0.02)
        if deaf:
            process.stderr.close()
        process.send_signal(number)
        if number == signal.SIGHUP:  # shell and kernel both hang up
            process.send_signal(number)
        said = "" if deaf else process.stderr.read()
        return process.wait(timeout=60), said


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_an_interrupted_run_is_saved_and_the_command_it_names_goes_on(place, number):
    status, stderr = interrupted(place, number)
    assert status == 130
    assert "Traceback" not in stderr
    last = stderr.splitlines()[-1]
    assert last.startswith("hjepa-mlx: Stopped at step ")
    step = last.removeprefix("hjepa-mlx: Stopped at step ").split()[0]
    assert (place / f"new/checkpoints/step-{int(step):08}/state.json").is_file()
    ended = hjepa(place, last.split(": hjepa-mlx ")[1])
    assert ended.returncode == 0, ended.stderr
    assert f"at step {step} of 60" in ended.stderr
    lines = (place / "new/metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(61))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_an_interrupted_run_is_saved_though_nobody_reads_what_it_says(place, number):
    assert interrupted(place, number, deaf=True)[0] == 130
    assert list(place.glob("new/checkpoints/step-*/state.json"))


def test_a_run_that_ignores_hanging_up_goes_on():
    ignore = "import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN)"  # as nohup does
    code = f"{ignore}; from hjepa_mlx.session import interruptible\n"
    code += "import os\nwith interruptible() as i: os.kill(os.getpid(), 1); print(i.wanted)"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ended.stdout == "False\n"


def test_a_run_resumed_by_its_own_config_is_not_a_newer_one_of_that_name(place):
    (place / "runs").mkdir()
    for day in (1, 2):
        shutil.copytree(place / "run", place / f"runs/tiny-2026010{day}-000000")
    for named in ("runs/tiny-20260101-000000/config.yaml", "runs/tiny-20260101-000000"):
        ended = hjepa(place, f"train {named} --resume")
        assert ended.returncode == 0, ended.stderr
        assert "Resuming runs/tiny-20260101-000000 at step 8 of 8" in ended.stderr


def test_a_recipe_s_name_is_not_the_run_of_that_name(place, monkeypatch):
    monkeypatch.chdir(place)
    shutil.copytree(place / "run", place / "demo")
    assert find_config("demo") == config_folder() / "demo.yaml"
    assert find_config("./demo") == Path("demo/config.yaml")
