"""Commands run for real, and the folder of configs, images and a run that they share."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image
from typer.testing import CliRunner

HJEPA = [sys.executable, "-m", "hjepa_mlx"]
# The shared run makes two passes over 36 images, 8 steps, with a checkpoint after each step.
OLD, NEW = "run/checkpoints/step-00000007", "run/checkpoints/step-00000008"

STATE = {  # of a checkpoint: the least that its state.json holds
    "format": 1, "step": 1, "epoch": 0, "images": 1, "position": [0, 0], "own_parts": {},
    "window": [], "random_state": [0, 0], "loss_scale": {}, "sha256": {},
}  # fmt: skip

TINY = """
compile: false
data: {name: folder, dir: pictures, image_size: 32, batch_size: 8}
model: {size: custom, dim: 64, depth: 3, heads: 1, patch_size: 4,
  levels: 3, level_pool: [1, 2, 4], predictor_dim: 64, predictor_depth: 1}
optim: {epochs: 2, warmup_epochs: 0}
run: {checkpoint_minutes: 1.0e-9, log_every: 1, final_eval: false}
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


def hjepa(folder: Path, command: str, **options) -> subprocess.CompletedProcess:
    """Run `hjepa-mlx COMMAND` in `folder`."""
    command = HJEPA + shlex.split(command)
    how = {"capture_output": True, "text": True, "timeout": 600}  # a busy machine is slow
    return subprocess.run(command, cwd=folder, **how, **options)


OURS = {
    "bench", "compare", "datasets", "doctor", "embed", "eval", "export", "finetune", "predict",
    "push", "train", "viz",
}  # fmt: skip


def do(commands: str) -> tuple[int, str]:
    """Run commands, of ours or of the shell, until one fails; its status and what it said."""
    from hjepa_mlx.cli import app  # not before conftest.py has set what MLX looks at

    status, said = 0, ""
    for command in filter(None, commands.split("; ")):
        if command.split()[0] not in OURS:
            subprocess.run(command, shell=True, check=True)
            continue
        ended = CliRunner().invoke(app, shlex.split(command))
        status, said = ended.exit_code, " ".join(ended.output.split())
        if status:
            break
    return status, said


def works(commands: str) -> str:
    """What commands say that end well."""
    status, said = do(commands)
    assert status == 0, said
    return said


def advised(command: str, advice: str) -> re.Match:
    """The advice, a pattern, that a command gives."""
    _, said = do(command)
    found = re.search(advice, said)
    assert found, said
    return found


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
