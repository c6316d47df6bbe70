"""Collapse signals, the meter between two logged rows, and files that are whole or not there."""

import errno
import json
import math
import os
import shutil
import stat
from pathlib import Path

import numpy as np
import pytest
from commands import STATE

import hjepa_mlx as hj
from hjepa_mlx import checkpoint
from hjepa_mlx.files import atomic_folder, write_json
from hjepa_mlx.losses import mse
from hjepa_mlx.meter import Meter
from hjepa_mlx.signals import highest, position_only_loss, reading, warnings


def test_position_only_loss_is_zero_when_only_position_matters() -> None:
    rng = np.random.default_rng(0)
    by_position = np.repeat(rng.normal(size=(1, 16, 32)), 8, 0)
    assert position_only_loss(by_position) == pytest.approx(0, abs=1e-12)
    other = rng.normal(size=(8, 16, 32))
    normal = (other - other.mean(2, keepdims=True)) / other.std(2, keepdims=True)
    error = np.abs(normal - normal.mean(0))
    expected = np.where(error < 1, 0.5 * error**2, error - 0.5).mean()
    assert position_only_loss(other) == pytest.approx(expected, rel=1e-4)
    assert position_only_loss(other, mse) == pytest.approx(np.square(error).mean(), rel=1e-4)


@pytest.mark.parametrize(
    ("signal", "sound", "collapsed"),
    [("effective_rank", 2.1, 1.9), ("feature_std", 1.6, 1.4), ("position_only_loss", 0.8, 0.7)],
)
def test_collapse_is_said_in_words(signal: str, sound: float, collapsed: float) -> None:
    key = f"{signal}_level_1"
    before = highest([{key: 1.2}, {key: 3.0, "loss_level_1": 1.0}, {"loss_level_1": 2.0}])
    assert before == {key: 3.0}
    assert warnings(before, {key: sound, "loss_level_1": 0.0}, [1]) == []
    below = "position_only_loss_level_1"
    assert warnings(highest([{below: -1.0}]), {below: -9}, [1]) == []
    elsewhere = warnings(before, {key: collapsed}, [0, 2])  # level 1 is only read
    assert (elsewhere == []) == (signal == "feature_std")
    (said,) = warnings(before, {key: collapsed}, [1])
    words = signal.replace("_", " ")
    assert f"Level 1 may be collapsing: {words} {collapsed:g}, it was 3." in said


def test_the_rank_of_an_untrained_network_can_fall_and_images_that_look_alike_are_said() -> None:
    (said,) = warnings({"effective_rank_level_0": 1.4}, {"effective_rank_level_0": 1.1}, [0])
    assert "effective rank 1.1, it was 1.4." in said
    (said,) = warnings({"feature_std_level_0": 0.0}, {"feature_std_level_0": 0.0}, [0])
    assert said == "Level 0: all images look alike to it. Are they different?"


@pytest.mark.parametrize(
    ("loss", "rank", "words"),
    [
        ([0.9, 0.3], [2, 20], "falls while the rank rises"),
        ([0.3, 0.9], [2, 20], "healthy"),
        ([0.9, 0.3], [20, 2], "collapse"),
        ([0.3, 0.9], [20, 2], "unstable"),
        ([0.5, 0.5], [9, 9], "levelled off"),
    ],
)
def test_loss_and_rank_are_read_together(loss: list, rank: list, words: str) -> None:
    steps = np.linspace(0, 1, 12)
    rows = [
        {"step": i, "loss": np.interp(t, [0, 1], loss), "loss_level_0": 0.1,
         "effective_rank_level_0": np.interp(t, [0, 1], rank), "position_only_loss_level_0": 0.2}
        for i, t in enumerate(steps)
    ]  # fmt: skip
    assert [words in line for line in reading(rows)] == [True]
    for row in rows:
        row["loss_level_0"] = 0.3
    assert "Level 0: the loss is no lower than" in reading(rows)[1]
    assert reading(rows[:2]) == reading(rows)[1:]  # too short for the first sentence


def test_images_per_second_leave_out_what_is_done_between_steps(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = 100.0
    monkeypatch.setattr("hjepa_mlx.meter.time.monotonic", lambda: now)
    meter = Meter()
    for _ in range(5):
        meter.add({})
        now += 2
    with meter.paused():
        now += 60
    assert meter.rate(batch=16) == 8
    meter.start()
    meter.add({})
    now += 1
    assert meter.rate(batch=16) == 16


def test_overflows_that_no_loss_scale_ends_stop_the_run() -> None:
    def meter(scale: float) -> Meter:
        found = Meter()
        found.add({"loss": 1.0, "grad_norm": math.nan, "overflow": True, "loss_scale": scale})
        return found

    meter(2.0).read(1, None)
    with pytest.raises(hj.HJEPAError, match=r"norm nan.*with precision=float32"):
        meter(1.0).read(1, None)


def test_a_checkpoint_that_cannot_be_deleted_ends_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in (1, 2, 3):
        (tmp_path / f"step-0000000{step}").mkdir()
        (tmp_path / f"step-0000000{step}" / "state.json").write_text(json.dumps(STATE))
    monkeypatch.setattr(os, "rmdir", lambda *_, **__: os.open("/nowhere", 0))
    checkpoint.tidy(tmp_path, keep_last=1)
    assert [path.name for path in checkpoint.complete(tmp_path)] == ["step-00000003"]
    monkeypatch.undo()
    checkpoint.tidy(tmp_path, keep_last=1)
    assert {path.name for path in tmp_path.iterdir()} == {"latest", "step-00000003"}


def test_a_folder_has_its_name_once_all_in_it_is_on_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done, fsync, replace = [], os.fsync, os.replace

    def name(handle: int) -> str:
        open_now = os.fstat(handle)
        paths = [tmp_path, *tmp_path.rglob("*")]
        return next(path.name for path in paths if os.path.samestat(path.stat(), open_now))

    monkeypatch.setattr(os, "fsync", lambda handle: [done.append(name(handle)), fsync(handle)])
    monkeypatch.setattr(os, "replace", lambda *both: [done.append("!"), replace(*both)])
    with atomic_folder(tmp_path / "new/made") as part:
        (part / "inner").mkdir()
        (part / "inner/file").write_text("content")
    named = done.index("!")
    assert done[:2] == [tmp_path.name, "new"]
    assert {*done[2:named]} == {".made.part", "inner", "file"}
    assert done[named + 1 :] == ["new"]
    with pytest.raises(KeyError), atomic_folder(tmp_path / "other") as part:
        raise KeyError
    assert [path.name for path in tmp_path.rglob("*")] == ["new", "made", "inner", "file"]


def test_a_checkpoint_that_is_there_is_not_written_again(tmp_path: Path) -> None:
    made = tmp_path / "step-00000003"
    made.mkdir()
    (made / "state.json").touch()
    assert checkpoint.save(tmp_path, None, 3, {}, 1) == made


def test_a_run_that_was_moved_away_is_not_made_again(tmp_path: Path) -> None:
    with pytest.raises(hj.HJEPAError, match=r"Saving .*step-00000001 failed \(No such file"):
        checkpoint.save(tmp_path / "run/checkpoints", None, 1, {}, 1)
    assert not list(tmp_path.iterdir())


def test_old_checkpoints_lose_their_names_for_good_before_what_is_in_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done, rmtree = [], shutil.rmtree
    for step in (1, 2):
        (tmp_path / f"step-0000000{step}").mkdir()
        (tmp_path / f"step-0000000{step}" / "state.json").write_text(json.dumps(STATE))
    (tmp_path / "latest").write_text("step-00000002")
    monkeypatch.setattr(os, "fsync", lambda _: done.append("synced"))
    monkeypatch.setattr(shutil, "rmtree", lambda *x, **more: [done.append("gone"), rmtree(*x)])
    checkpoint.tidy(tmp_path, keep_last=1)
    assert done == ["synced", "gone"]


def test_a_file_system_that_syncs_no_folders_will_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def sync(handle: int) -> None:
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(os, "fsync", sync)
    write_json(tmp_path / "file.json", [1])
    assert (tmp_path / "file.json").read_text() == "[\n 1\n]\n"
