"""Whole runs through the Python API on the demo images."""

import shutil
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

import hjepa_mlx as hj
from hjepa_mlx import runs
from hjepa_mlx.data.source import open_source
from hjepa_mlx.files import locked
from hjepa_mlx.losses import smooth_l1
from hjepa_mlx.masks import Masks, MaskSampler
from hjepa_mlx.recipes import parse, resolve
from hjepa_mlx.runs import Run

TINY = {
    "name": "tiny",
    "compile": False,
    "data": {"name": "demo", "image_size": 32, "batch_size": 32, "limit": 320, "flip": False},
    "model": {"size": "custom", "dim": 64, "depth": 3, "heads": 1, "patch_size": 4,
              "level_pool": [1, 2, 4], "predictor_dim": 64, "predictor_depth": 1},
    "loss": {"level_weights": [1.0, 0.7, 0.5]},
    "optim": {"epochs": 2, "warmup_epochs": 0.5},
    "run": {"log_every": 4, "eval_every_epochs": 1},
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
        "knn_level_0", "knn_level_1", "knn_level_2", "knn_whitened",
    }  # fmt: skip
    assert promised <= last.keys()
    assert last["lr"] == pytest.approx(1e-6)
    assert last["momentum"] == 1.0


def test_a_long_run_does_not_read_its_metrics_at_every_look(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads: list[int] = []
    whole = Run.metrics.fget
    monkeypatch.setattr(Run, "metrics", property(lambda run: reads.append(1) or whole(run)))
    counts = []
    for epochs in (1, 3):
        config = resolve(parse(TINY | {"optim": {"epochs": epochs, "warmup_epochs": 0.5}}))
        config.run.dir, config.run.log_every = str(tmp_path / str(epochs)), 1
        hj.train(config)
        counts.append(len(reads))
    assert counts[1] == 2 * counts[0]


def test_the_logged_loss_is_the_mean_of_its_steps_and_falls(run: Run) -> None:
    rows = [row for row in run.metrics if "loss" in row]
    assert [row["step"] for row in rows] == [4, 8, 12, 16, 20]
    weights = (1.0, 0.7, 0.5)
    for row in rows:
        parts = sum(w * row[f"loss_level_{level}"] for level, w in enumerate(weights))
        assert row["loss"] == pytest.approx(parts + 0.2 * row["vicreg"], rel=1e-5)
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
    with pytest.raises(hj.HJEPAError, match=r"multiples of the patch size 4; .* \[5, 27, 32, 3\]"):
        model.encode(images[:, :27])


def test_the_target_encoder_moved_less_than_the_context_encoder(run: Run) -> None:
    trained, random = hj.load(run.path), hj.HJEPA(run.config)

    def moved(encoder: str) -> float:
        weight = [getattr(m, encoder).blocks[0].mlp.fc1.weight for m in (trained, random)]
        return float(mx.abs(weight[0] - weight[1]).mean())

    assert 0 < moved("target_encoder") < moved("context_encoder")


def test_a_loss_that_is_not_finite_ends_the_run_and_keeps_the_last_checkpoint(
    tmp_path: Path,
) -> None:
    config = resolve(parse(TINY | {"run": {"dir": str(tmp_path / "run"), "log_every": 1000}}))
    config.run.checkpoint_minutes = 1e-6
    draw, steps = MaskSampler(config), [0]

    def masks(step: int, n: int) -> Masks:
        steps.append(step)
        return draw(step, n)

    def poisoned(prediction: mx.array, target: mx.array) -> mx.array:
        return smooth_l1(prediction, target) * (float("nan") if steps[-1] == 3 else 1)

    with pytest.raises(hj.HJEPAError, match=r"step 4: the loss is nan.*step-00000003"):
        hj.train(config, loss_fn=poisoned, sampler=masks)
    assert Run(tmp_path / "run").latest.name == "step-00000003"


@pytest.mark.parametrize(("log_every", "minutes"), [(1000, 1e-6), (1, 1000)])
def test_a_moment_that_is_not_finite_ends_the_run_before_it_is_saved(
    log_every: int, minutes: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = resolve(parse(TINY | {"run": {"dir": str(tmp_path / "run"), "log_every": log_every}}))
    config.run.checkpoint_minutes, plain, calls = minutes, hj.Step.__call__, []

    def spoilt(step: hj.Step, *given: object) -> object:
        calls.append(step)
        if len(calls) == 3:  # the loss never tells of an infinite second moment
            kinds = step.optimizer.state["predictor"]
            name = next(iter(kinds))
            kinds[name]["v"] = mx.full(kinds[name]["v"].shape, mx.inf)
        return plain(step, *given)

    monkeypatch.setattr(hj.Step, "__call__", spoilt)
    step, kept = ("3", "step-00000002") if log_every == 1000 else ("10", "none yet")
    with pytest.raises(hj.HJEPAError, match=f"stopped at step {step}: a weight.*{kept}"):
        hj.train(config)
    if kept != "none yet":  # as the message says
        monkeypatch.undo()
        assert hj.train(config, resume=True).metrics[-1]["step"] == 20


def test_a_run_is_one_once_it_has_a_record_of_its_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runs, "write_record", lambda *_: 1 / 0)
    config = resolve(parse(TINY | {"run": {"dir": str(tmp_path / "run")}}))
    with pytest.raises(ZeroDivisionError):
        runs.create(config, object())
    runs.check_new(config)


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
    with pytest.raises(hj.HJEPAError, match=r"of your own, Brighter\. Load it with hj\.load\("):
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


def test_parts_of_one_s_own_are_tried_before_a_run_is_made(tmp_path: Path) -> None:
    config = resolve(parse(TINY | {"run": {"dir": str(tmp_path / "run")}}))
    larger = resolve(parse(TINY | {"data": TINY["data"] | {"image_size": 64}}))
    with pytest.raises(hj.HJEPAError, match="do not fit the grid of 8×8"):
        hj.train(config, sampler=hj.MaskSampler(larger))
    with pytest.raises(hj.HJEPAError, match="must return one number"):
        hj.train(config, loss_fn=lambda prediction, target: (prediction - target).square())
    assert not (tmp_path / "run").exists()
