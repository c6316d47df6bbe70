"""A run that was interrupted and resumed is the run that was not."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import layouts
import numpy as np
import pytest
from mlx.core import load

from hjepa_mlx.runs import Run

RECIPE = """
name: tiny
precision: float32
compile: true
data: {name: demo, image_size: 32, batch_size: 16, limit: 160, flip: true, workers: 2}
model: {size: custom, dim: 64, depth: 3, heads: 1, patch_size: 4, predictor_dim: 64,
        predictor_depth: 1}
loss: {sigreg: 0.01}
optim: {epochs: 4, warmup_epochs: 1}
run: {log_every: 3, signals_every: 7, checkpoint_minutes: 1.0e-9, keep_last: 2,
      milestone_epochs: 2}
"""  # 10 steps an epoch, 40 in all; a checkpoint after every step
TIMING = ("images_per_second", "peak_memory_gb")


def command(folder: Path, *more: str) -> list[str]:
    recipe = folder / "tiny.yaml"
    recipe.write_text(RECIPE)
    run = ["train", str(recipe), "--run-dir", str(folder / "run"), *more]
    return [sys.executable, "-m", "hjepa_mlx", *run]


def finish(folder: Path, *more: str) -> None:
    subprocess.run(command(folder, *more), check=True, capture_output=True, cwd=folder)


def metrics(folder: Path) -> list[dict]:
    rows = [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in TIMING} for row in rows]


def last_weights(folder: Path) -> dict[str, np.ndarray]:
    checkpoint = folder / "run/checkpoints/step-00000040"
    names = ("model.safetensors", "optimizer.safetensors")
    return {f"{n}:{k}": np.array(v) for n in names for k, v in load(str(checkpoint / n)).items()}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("uninterrupted")
    finish(folder)
    return folder


def assert_same_run(one: Path, other: Path) -> None:
    assert metrics(one) == metrics(other)
    mine, theirs = last_weights(one), last_weights(other)
    assert mine.keys() == theirs.keys()
    for name, weight in mine.items():
        assert np.array_equal(weight, theirs[name]), name


@pytest.mark.parametrize("kill_after", [random.Random(0).randrange(1, 9), 10, 23])
def test_a_run_killed_at_any_step_and_resumed_is_bit_identical(
    kill_after: int, uninterrupted: Path, tmp_path: Path
) -> None:
    process = subprocess.Popen(
        command(tmp_path), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=tmp_path
    )
    reached = tmp_path / f"run/checkpoints/step-{kill_after:08d}"
    while not reached.exists():  # it stays for a while: keep_last is 2
        assert process.poll() is None
        time.sleep(0.001)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    finish(tmp_path, "--resume")
    assert_same_run(tmp_path, uninterrupted)


def test_old_checkpoints_go_and_milestones_stay(uninterrupted: Path) -> None:
    kept = sorted(path.name for path in (uninterrupted / "run/checkpoints").glob("step-*"))
    assert kept == ["step-00000020", "step-00000038", "step-00000039", "step-00000040"]
    assert (uninterrupted / "run/checkpoints/latest").read_text() == "step-00000040"


def test_a_finished_run_can_be_resumed_and_has_nothing_left_to_do(uninterrupted: Path) -> None:
    before = metrics(uninterrupted)
    finish(uninterrupted, "--resume")
    assert metrics(uninterrupted) == before


def test_a_run_whose_data_went_away_is_saved_and_goes_on_bit_identically(tmp_path: Path) -> None:
    layouts.stl10(tmp_path / "data/stl10", train=40, test=40, unlabeled=160)
    data = layouts.prepared(tmp_path / "data", "stl10") / "pretrain-images.npy"
    more = ["--set", "data.name=stl10", "--data-dir", str(tmp_path / "data")]
    (tmp_path / "whole").mkdir()
    (tmp_path / "broken").mkdir()
    finish(tmp_path / "whole", *more)
    process = subprocess.Popen(
        command(tmp_path / "broken", *more),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        cwd=tmp_path / "broken",
    )
    while not (tmp_path / "broken/run/checkpoints/step-00000005").exists():
        assert process.poll() is None
        time.sleep(0.001)
    data.rename(tmp_path / "away")
    _, said = process.communicate()
    assert process.returncode == 1
    line = said.splitlines()[-1]
    assert f"hjepa-mlx: {data} cannot be read" in line
    assert "saved. When it is back: hjepa-mlx train" in line
    (tmp_path / "away").rename(data)
    moved = (tmp_path / "data").rename(tmp_path / "moved")
    finish(tmp_path / "broken", "--resume", *more[:-1], str(moved))
    assert Run(tmp_path / "broken/run").config.data.dir == str(moved)
    assert_same_run(tmp_path / "broken", tmp_path / "whole")
