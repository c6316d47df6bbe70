"""Whole runs through the Python API on the demo images."""

import errno
import json
import math
import os
import shutil
import stat
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from rich.console import Console

import hjepa_mlx as hj
from hjepa_mlx import checkpoint, runs
from hjepa_mlx.costs import costs
from hjepa_mlx.data.source import open_source
from hjepa_mlx.eval.knn import QuickKNN
from hjepa_mlx.files import locked, write_json
from hjepa_mlx.losses import mse
from hjepa_mlx.masks import Masks, MaskSampler
from hjepa_mlx.recipes import parse, resolve
from hjepa_mlx.runs import Run
from hjepa_mlx.signals import position_only_loss, reading, warnings
from hjepa_mlx.train import Training
from hjepa_mlx.window import Window

TINY = {
    "name": "tiny",
    "compile": False,
    "data": {"name": "demo", "image_size": 32, "batch_size": 32, "limit": 320, "flip": False},
    "model": {"size": "custom", "dim": 64, "depth": 3, "heads": 1, "patch_size": 4,
              "predictor_dim": 64, "predictor_depth": 1},
    "optim": {"epochs": 2, "warmup_epochs": 0.5},
    "run": {"log_every": 4, "signals_every": 10, "eval_every_epochs": 1, "eval_share": 1.0},
}  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    config = resolve(parse(TINY))
    config.run.dir = str(tmp_path_factory.mktemp("runs") / "tiny")
    return hj.train(config)


def test_metrics_hold_what_the_design_promises(run: Run) -> None:
    first, *_, last = run.metrics
    assert first["step"] == 0
    assert first["effective_rank_level_2"] > 1
    assert last["step"] == 20
    promised = {
        "step", "epoch", "loss", "loss_level_0", "loss_level_1", "loss_level_2", "lr",
        "weight_decay", "momentum", "images_per_second", "peak_memory_gb", "grad_norm",
        "feature_std_level_0", "effective_rank_level_0", "position_only_loss_level_0",
        "knn_level_0", "knn_level_1", "knn_level_2",
    }  # fmt: skip
    assert promised <= last.keys()
    assert last["lr"] == pytest.approx(1e-6)
    assert last["momentum"] == 1.0


def test_the_logged_loss_is_the_mean_of_its_steps_and_falls(run: Run) -> None:
    rows = [row for row in run.metrics if "loss" in row]
    assert [row["step"] for row in rows] == [4, 8, 12, 16, 20]
    weights = (1.0, 0.7, 0.5)
    for row in rows:
        parts = sum(w * row[f"loss_level_{level}"] for level, w in enumerate(weights))
        assert row["loss"] == pytest.approx(parts, rel=1e-5)
    assert rows[-1]["loss"] < 0.9 * rows[0]["loss"]


def test_the_saved_config_is_the_resolved_one(run: Run) -> None:
    assert hj.load_config(run.path / "config.yaml") == run.config
    assert run.config.masks.context_tokens == 19
    assert run.config.model.level_blocks == [1, 2, 3]


def test_a_loaded_model_encodes_levels_on_their_grids(run: Run) -> None:
    model = hj.load(run.path)
    images = np.stack([open_source(run.config.data, "test").read(i) for i in range(5)])
    levels = model.encode(images)
    assert [level.shape for level in levels] == [(5, 64, 64), (5, 16, 64), (5, 4, 64)]
    again = hj.load(run.latest).encode(images)
    assert all(mx.array_equal(a, b) for a, b in zip(levels, again, strict=True))
    with pytest.raises(hj.HJEPAError, match=r"\[B, 32, 32, 3\]"):
        model.encode(images[:, :28])


def test_the_target_encoder_moved_less_than_the_context_encoder(run: Run) -> None:
    trained, random = hj.load(run.path), hj.HJEPA(run.config)

    def moved(encoder: str) -> float:
        weight = [getattr(m, encoder).blocks[0].mlp.fc1.weight for m in (trained, random)]
        return float(mx.abs(weight[0] - weight[1]).mean())

    assert 0 < moved("target_encoder") < moved("context_encoder")


def test_the_report_has_the_form_of_the_design(run: Run) -> None:
    scores = hj.evaluate(hj.load(run.path)).scores
    levels = {"level_0", "level_1", "level_2", "all_levels"}
    assert scores["knn"].keys() == scores["feature_rank"].keys() == levels
    assert scores["baselines"]["random_init"]["knn"].keys() == levels
    assert 60 < scores["baselines"]["pixels"]["knn"] < 85
    assert scores["protocol"]["bank_images"] == 320
    assert scores["protocol"]["query_images"] == 1000
    json.dumps(scores)


def test_a_loss_that_is_not_finite_ends_the_run_and_keeps_the_last_checkpoint(
    tmp_path: Path,
) -> None:
    config = resolve(parse(TINY))
    config.run.dir = str(tmp_path / "run")
    config.run.checkpoint_minutes = 1e-6
    config.run.signals_every, config.run.log_every = 1, 1000
    draw = MaskSampler(config)

    def poisoned(step: int, n: int) -> Masks:
        if step == 3:
            training.model.predictor.mask_token = mx.full((64,), float("nan"))
        return draw(step, n)

    training = Training(config, False, Console(quiet=True), sampler=poisoned)
    with pytest.raises(hj.HJEPAError, match=r"The loss is nan at step 4.*step-00000003"):
        training.fit()
    assert training.run.latest.name == "step-00000003"


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
    [("effective_rank", 11.0, 9.0), ("feature_std", 4.1, 3.9), ("position_only_loss", 2.1, 1.9)],
)
def test_collapse_is_said_in_words(signal: str, sound: float, collapsed: float) -> None:
    first = {f"{signal}_level_1": 20.0, "loss_level_1": 1.0}
    assert warnings(first, {f"{signal}_level_1": sound, "loss_level_1": 0.0}) == []
    assert warnings({f"{signal}_level_1": -1.0}, {f"{signal}_level_1": -1.1}) == []
    (said,) = warnings(first, {f"{signal}_level_1": collapsed})
    words = signal.replace("_", " ")
    assert f"Level 1 may be collapsing: {words} {collapsed:g}, at the start 20." in said


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


def test_the_knn_of_training_keeps_to_its_share_of_the_time() -> None:
    config = resolve(parse(TINY | {"data": TINY["data"] | {"name": "demo", "limit": 40}}))
    config.run.eval_share = 0.02
    bank, queries = open_source(config.data, "train"), open_source(config.data, "test")
    queries = queries.take(np.arange(10))
    model = hj.HJEPA(config)
    knn = QuickKNN(model, bank, queries, config)
    # 50 images cost what the target encoder costs for 50, until it is known what they take
    of_a_step = costs(config, model)
    enough = 50 / 0.02 * of_a_step.target.gflop / of_a_step.gflop
    assert enough < 2500
    assert not knn.affordable(elapsed=100, images=int(0.95 * enough))
    assert knn.affordable(elapsed=100, images=int(1.05 * enough))
    assert set(knn()) == {"knn_level_0", "knn_level_1", "knn_level_2", "knn_all_levels"}
    assert knn.longest > 0
    assert not knn.affordable(elapsed=99 * knn.longest, images=10**6)  # two of them in 99
    assert knn.affordable(elapsed=101 * knn.longest, images=10**6)
    knn()
    assert not knn.affordable(elapsed=101 * knn.longest, images=10**6)


def test_a_run_with_a_loss_of_ones_own_is_only_resumed_with_it(tmp_path: Path) -> None:
    def absolute(prediction: mx.array, target: mx.array) -> mx.array:
        return mx.abs(prediction - target).mean()

    config = resolve(parse(TINY | {"run": {"dir": str(tmp_path / "own"), "log_every": 4}}))
    config.optim.epochs, config.data.limit = 1, 64
    own = hj.train(config, loss_fn=absolute)
    config = config.model_copy(deep=True)
    config.run.dir = str(tmp_path / "plain")
    plain = hj.train(config)
    assert own.metrics[-1]["loss_level_0"] > 1.5 * plain.metrics[-1]["loss_level_0"]
    config.run.dir = str(tmp_path / "own")
    with pytest.raises(hj.HJEPAError, match=r"trained with .*absolute"):
        hj.train(config, resume=True)
    shutil.rmtree(own.checkpoints)  # as if killed before the first one
    with pytest.raises(hj.HJEPAError, match=r"trained with .*absolute"):
        hj.train(config, resume=True)
    assert hj.train(config, resume=True, loss_fn=absolute).latest == own.latest


def test_a_run_starts_from_the_network_it_is_given(tmp_path: Path) -> None:
    config = resolve(parse(TINY | {"run": {"dir": str(tmp_path / "run")}}))
    config.optim.epochs, config.data.limit, config.optim.warmup_epochs = 1, 64, 0
    config.optim.lr, config.optim.final_lr = 1e-9, 0.0
    model = hj.HJEPA(config)
    chosen = 0.5 * model.context_encoder.patch_embed.proj.weight
    model.context_encoder.patch_embed.proj.weight = chosen
    run = hj.train(config, model=model)
    trained = hj.load(run.path).context_encoder.patch_embed.proj.weight
    assert mx.allclose(trained, chosen, atol=1e-6)
    other = config.model_copy(deep=True)
    other.model.heads = 2
    with pytest.raises(hj.HJEPAError, match="another config: model differs"):
        hj.train(other, model=model)
    other = config.model_copy(deep=True)
    other.loss.level_weights = [0, 1, 1]
    with pytest.raises(hj.HJEPAError, match="level_weights predicts differs"):
        hj.train(other, model=model)
    larger = hj.HJEPA(resolve(parse(TINY | {"data": TINY["data"] | {"image_size": 64}})))
    with pytest.raises(hj.HJEPAError, match="image_size differs"):
        hj.train(config, model=larger)


class Brighter(hj.HJEPA):
    def encode(self, images, encoder="target"):
        return [1 + level for level in super().encode(images, encoder)]


def test_a_network_of_one_s_own_is_read_again_by_naming_it(tmp_path: Path) -> None:
    config = resolve(parse(TINY | {"run": {"dir": str(tmp_path / "run")}}))
    config.optim.epochs, config.data.limit, config.optim.warmup_epochs = 1, 64, 0
    trained = Brighter(config)
    assert trained.origin is None
    run = hj.train(config, model=trained)
    assert trained.origin is not None
    assert trained.origin.step == run.metrics[-1]["step"]
    with pytest.raises(hj.HJEPAError, match=r"network of your own, Brighter: hj\.load\("):
        hj.load(run.path)
    again = hj.load(run.path, Brighter(run.config))
    images = mx.zeros((1, 32, 32, 3), mx.uint8)
    assert mx.array_equal(again.encode(images)[0], trained.encode(images)[0])


def test_a_config_edited_in_python_is_checked_before_training(tmp_path: Path) -> None:
    config = resolve(parse(TINY | {"run": {"dir": str(tmp_path / "run")}}))
    config.optim.warmup_epochs = 2
    with pytest.raises(hj.HJEPAError, match=r"optim.warmup_epochs=2 must be less than"):
        hj.train(config)
    assert not (tmp_path / "run").exists()


def test_runs_begun_in_the_same_second_have_folders_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = resolve(parse(TINY))
    paths = {runs.create(config).path for _ in range(3)}
    assert len(paths) == 3


def test_a_run_that_is_being_trained_is_not_trained_again_beside_it(tmp_path: Path) -> None:
    config = resolve(parse(TINY | {"run": {"dir": str(tmp_path / "run")}}))
    with (
        locked(runs.create(config).path / ".lock", "it"),
        pytest.raises(hj.HJEPAError, match="run is being written by another process"),
    ):
        hj.train(config, resume=True)


def test_a_run_does_not_depend_on_what_was_drawn_before_it(tmp_path: Path) -> None:
    losses = []
    for number in (1, 2):
        tree = TINY | {"loss": {"sigreg": 0.1}, "optim": {"epochs": 1, "warmup_epochs": 0.5}}
        config = resolve(parse(tree))
        config.run.dir, config.data.limit = str(tmp_path / str(number)), 64
        model = hj.HJEPA(config)
        mx.random.seed(number)
        losses.append(hj.train(config, model=model).metrics[-1]["loss"])
    assert losses[0] == losses[1]


def test_a_checkpoint_that_cannot_be_deleted_ends_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in (1, 2, 3):
        (tmp_path / f"step-0000000{step}").mkdir()
        state = dict.fromkeys(checkpoint.KEYS) | {"format": checkpoint.FORMAT}
        (tmp_path / f"step-0000000{step}" / "state.json").write_text(json.dumps(state))
    monkeypatch.setattr(os, "rmdir", lambda *_, **__: os.open("/nowhere", 0))
    checkpoint._prune(tmp_path, keep_last=1)
    assert [path.name for path in checkpoint.complete(tmp_path)] == ["step-00000003"]
    monkeypatch.undo()
    checkpoint._prune(tmp_path, keep_last=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000003"]


def test_a_file_system_that_syncs_no_folders_will_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def sync(handle: int) -> None:
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(os, "fsync", sync)
    write_json(tmp_path / "file.json", [1])
    assert (tmp_path / "file.json").read_text() == "[\n 1\n]\n"


def test_images_per_second_leave_out_what_is_done_between_steps(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = 100.0
    monkeypatch.setattr("hjepa_mlx.window.time.monotonic", lambda: now)
    window = Window()
    for _ in range(5):
        window.add({})
        now += 2
    with window.paused():
        now += 60
    assert window.rate(batch=16) == 8
    window.begin()
    window.add({})
    now += 1
    assert window.rate(batch=16) == 16


def test_overflows_that_no_loss_scale_ends_stop_the_run() -> None:
    def window(scale: float) -> Window:
        found = Window()
        found.add({"loss": 1.0, "grad_norm": math.nan, "overflow": True, "loss_scale": scale})
        return found

    window(2.0).read(1, None)
    with pytest.raises(hj.HJEPAError, match=r"norm nan.*use precision=float32"):
        window(1.0).read(1, None)


def test_parts_of_one_s_own_are_tried_before_a_run_is_made(tmp_path: Path) -> None:
    config = resolve(parse(TINY | {"run": {"dir": str(tmp_path / "run")}}))
    larger = resolve(parse(TINY | {"data": TINY["data"] | {"image_size": 64}}))
    with pytest.raises(hj.HJEPAError, match="do not fit the grid of 8×8"):
        hj.train(config, sampler=hj.MaskSampler(larger))
    with pytest.raises(hj.HJEPAError, match="must give one number"):
        hj.train(config, loss_fn=lambda prediction, target: (prediction - target).square())
    assert not (tmp_path / "run").exists()
