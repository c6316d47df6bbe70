"""Damaged, full and interrupted: what is whole stays, and the advice in the message works."""

import json
import os
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from commands import HJEPA, NEW, OLD, assert_one_line, files, hjepa

from hjepa_mlx.recipes import config_folder, find_config


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
    assert "at step 7 of 8" in ended.stderr
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
    assert Path(OLD).name == max(p.name for p in (place / NEW).parent.glob("step-*"))
    assert "at step 7 of 8" in hjepa(place, RESUME).stderr


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
    blocks = os.statvfs(small_disk)
    (small_disk / "other").write_bytes(bytes(blocks.f_bavail * blocks.f_frsize - 100_000))
    command = f"train tiny.yaml --resume --run-dir {small_disk}/run"
    assert_one_line(hjepa(prepared, command), "No space left", "--resume")
    after = [path.read_bytes() for path in kept]
    assert after[0] == before[0]
    assert after[1].startswith(before[1][: before[1].index(b'{"step": 8')])
    (small_disk / "other").unlink()
    assert hjepa(prepared, command).returncode == 0


def interrupted(place, number, deaf=False):
    """Train until some steps are done, then send a signal: exit status and stderr.

    deaf: whoever reads stderr goes away first, as `tee` does at Ctrl-C.
    """
    command = HJEPA + shlex.split(
        "train tiny.yaml --run-dir new --set optim.epochs=15 --set run.checkpoint_minutes=15"
    )

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
        return process.wait(timeout=600), said


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


def test_a_second_ctrl_c_leaves_at_once_as_the_first_one_says():
    code = "import os; from hjepa_mlx.session import interruptible\n"
    code += "with interruptible(): os.kill(os.getpid(), 2); os.kill(os.getpid(), 2); print('here')"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "press Ctrl-C again to leave at once" in ended.stderr
    assert (ended.returncode, ended.stdout) == (130, "")


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
