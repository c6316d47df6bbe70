"""A run that was interrupted and resumed is the run that was not."""

import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import layouts
import numpy as np
import pytest
from commands import STATE, TINY, picture, pictures
from layouts import CMC
from mlx.core import load
from rich.console import Console
from rounding import assert_same, nearly
from typer.testing import CliRunner

import hjepa_mlx as hj
from hjepa_mlx import checkpoint
from hjepa_mlx.cli import app
from hjepa_mlx.masks import Masks

RECIPE = """
name: tiny
precision: float32
compile: true
data: {name: demo, image_size: 32, batch_size: 16, limit: 160, flip: true, workers: 2}
model: {size: custom, dim: 64, depth: 3, heads: 1, patch_size: 4, predictor_dim: 64,
        predictor_depth: 1, level_pool: [1, 2, image]}
views: {count: 2, colour: 0.5, grey: 0.2, blur: 0.5}
loss: {sigreg: 0.01}
optim: {epochs: 2, warmup_epochs: 0.5}
run: {log_every: 3, checkpoint_minutes: 1.0e-9, keep_last: 2, final_eval: false}
"""  # 10 steps an epoch, 20 in all; a checkpoint after every step
TIMING = ("images_per_second", "peak_memory_gb")


def command(folder: Path, *more: str) -> list[str]:
    recipe = folder / "tiny.yaml"
    recipe.write_text(RECIPE)
    run = ["train", str(recipe), "--run-dir", str(folder / "run"), *more]
    return [sys.executable, "-m", "hjepa_mlx", *run]


def finish(folder: Path, *more: str) -> None:
    run = command(folder, *more)
    subprocess.run(run, check=True, capture_output=True, cwd=folder, timeout=600)


def metrics(folder: Path) -> list[dict]:
    rows = [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in TIMING} for row in rows]


def last_weights(folder: Path) -> dict[str, np.ndarray]:
    checkpoint = folder / "run/checkpoints/step-00000020"
    names = ("model.safetensors", "optimizer.safetensors")
    return {f"{n}:{k}": np.array(v) for n in names for k, v in load(str(checkpoint / n)).items()}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("uninterrupted")
    finish(folder)
    return folder


def assert_same_run(one: Path, other: Path) -> None:
    for mine, theirs in zip(metrics(one), metrics(other), strict=True):
        assert mine == nearly(theirs)
    assert_same(last_weights(one), last_weights(other))


@pytest.mark.parametrize("kill_after", [random.Random(0).randrange(1, 9), 10, 13])
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


def test_the_newest_checkpoints_stay_and_milestones_of_earlier_versions(tmp_path: Path) -> None:
    for step in range(1, 6):
        folder = tmp_path / f"step-0000000{step}"
        folder.mkdir()
        old = {"milestone": step == 2} if step < 5 else {}
        state = STATE | {"own_parts": {"error": "l1"}} | old
        (folder / "state.json").write_text(json.dumps(state))
    checkpoint.tidy(tmp_path, keep_last=2)
    kept = checkpoint.complete(tmp_path)
    assert [path.name[-1] for path in kept] == ["2", "4", "5"]
    assert checkpoint.read_state(kept[0])["own_parts"]["loss_fn"] == "l1"


def test_a_run_keeps_its_newest_checkpoints(uninterrupted: Path) -> None:
    kept = sorted(path.name for path in (uninterrupted / "run/checkpoints").glob("step-*"))
    assert kept == ["step-00000019", "step-00000020"]
    assert (uninterrupted / "run/checkpoints/latest").read_text() == "step-00000020"


def test_a_finished_run_can_be_resumed_and_has_nothing_left_to_do(uninterrupted: Path) -> None:
    before, checkpoints = metrics(uninterrupted), uninterrupted / "run/checkpoints"
    extra = checkpoints / "step-00000018"  # as if the run had died within its last save
    shutil.copytree(checkpoints / "step-00000020", extra)
    (checkpoints / "latest").write_text(extra.name)
    finish(uninterrupted, "--resume")
    assert metrics(uninterrupted) == before
    assert not extra.exists()
    assert (checkpoints / "latest").read_text() == "step-00000020"


def of_pictures(folder: Path, *overrides: str) -> hj.Config:
    """A config of a run of 8 steps on pictures in a folder."""
    pictures(folder / "pictures", 40)
    (folder / "tiny.yaml").write_text(TINY)
    own = [f"data.dir={folder / 'pictures'}", f"run.dir={folder / 'run'}"]
    return hj.load_config(folder / "tiny.yaml", [*own, *overrides])


@pytest.mark.parametrize("swapped", [False, True])
def test_a_run_resumes_on_the_images_it_was_trained_on_only(tmp_path: Path, swapped: bool) -> None:
    config = of_pictures(tmp_path, "run.checkpoint_minutes=1000", "optim.epochs=1")
    saved = hj.train(config).latest
    if swapped:
        (tmp_path / "pictures/a/00.jpg").unlink()
        picture(99).save(tmp_path / "pictures/a/another.jpg")
        with pytest.raises(hj.HJEPAError, match=r"Gone since the run began: 1 image .*a/00.jpg"):
            hj.train(config, resume=True)
    (tmp_path / "run/images.json").unlink()  # as runs of earlier versions
    state = json.loads((saved / "state.json").read_text())
    del state["fingerprint"]  # as checkpoints of earlier versions, which compare the count only
    (saved / "state.json").write_text(json.dumps(state))
    assert hj.train(config, resume=True).latest == saved


def test_a_run_whose_data_went_away_is_saved_and_goes_on_bit_identically(tmp_path: Path) -> None:
    config = of_pictures(tmp_path, f"run.dir={tmp_path / 'whole'}")
    whole = hj.train(config)
    config.run.dir = str(tmp_path / "broken")
    draw = hj.MaskSampler(config)

    def lose_the_data(number: int, count: int) -> Masks:
        if number == 2:
            (tmp_path / "pictures").rename(tmp_path / "moved")
        return draw(number, count)

    with pytest.raises(hj.HJEPAError) as lost:
        hj.train(config, sampler=lose_the_data)
    assert f"{tmp_path / 'pictures'} cannot be read" in str(lost.value)
    assert "saved. When it is back: hj.train" in str(lost.value)
    config.data.dir = str(tmp_path / "moved")
    broken = hj.train(config, resume=True, sampler=lose_the_data)
    assert broken.config.data.dir == str(tmp_path / "moved")
    assert_same(*(load(str(run.latest / "model.safetensors")) for run in (broken, whole)))


def test_a_run_given_by_its_folder_is_resumed_though_it_never_logged(tmp_path: Path) -> None:
    path = hj.train(of_pictures(tmp_path)).path
    for name in ("metrics.jsonl", "checkpoints"):
        (path / name).rename(tmp_path / name)
    copy = path.rename(tmp_path / "copy")
    text = (copy / "config.yaml").read_text().replace(f"dir: {path}", "dir: null")
    (copy / "config.yaml").write_text(text)
    ended = CliRunner().invoke(app, ["train", str(copy), "--resume", "--dry-run"])
    assert f"dir: {copy}" in ended.output.replace("\n", " ").replace("  ", " ")


def test_a_run_that_began_on_original_files_says_that_its_images_differ_now(tmp_path: Path) -> None:
    layouts.folders(tmp_path / "imagenet100", layouts.photos(CMC))
    layouts.prepared(tmp_path, "imagenet100")
    config = of_pictures(tmp_path, "data.name=imagenet100", f"data.dir={tmp_path}")
    saved = hj.train(config).latest
    state = json.loads((saved / "state.json").read_text())
    del state["fingerprint"]
    (saved / "state.json").write_text(json.dumps(state))
    said = io.StringIO()
    hj.train(config, resume=True, console=Console(file=said, width=200))
    assert "images that differ slightly" in said.getvalue()
