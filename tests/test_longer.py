"""A run that goes on longer: its rule, its record, its refusals."""

import json
import math
import shutil
from contextlib import closing
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from rounding import assert_same
from typer.testing import CliRunner

import hjepa_mlx as hj
from hjepa_mlx.cli import app
from hjepa_mlx.compare import compare
from hjepa_mlx.longer import longer

RECIPE = """
name: tiny
precision: float32
compile: false
data: {name: demo, image_size: 32, batch_size: 16, limit: 160}
model: {size: custom, dim: 64, depth: 2, heads: 1, levels: 2, patch_size: 4, predictor_dim: 64,
        predictor_depth: 1}
optim: {epochs: 2, warmup_epochs: 0.5, weight_decay: [0.1, 0.3], momentum: [0.9, 1.0]}
run: {log_every: 1, checkpoint_minutes: 1000, eval_every_epochs: 0, final_eval: false}
"""  # 10 steps an epoch


@pytest.fixture
def run(tmp_path: Path) -> hj.Run:
    (tmp_path / "tiny.yaml").write_text(RECIPE)
    return hj.train(hj.load_config(tmp_path / "tiny.yaml", [f"run.dir={tmp_path / 'run'}"]))


def train(*arguments: object) -> str:
    ended = CliRunner().invoke(app, ["train", *map(str, arguments)])
    assert ended.exit_code == 0, ended.output
    return ended.output


def documented(step: int) -> hj.Schedule:
    """The guide's rule for 2 epochs of 10 steps and 2 more, with a warm-up of 5 steps."""
    total = 20 if step < 20 else 40
    progress = step / (total - 1)
    after_warmup = (step - 5) / (total - 6)
    weight = (1 + math.cos(math.pi * after_warmup)) / 2
    lr = 1e-3 * (step + 1) / 5 if step < 5 else 1e-3 * weight + 1e-6 * (1 - weight)
    if 20 <= step < 25:
        share = (step - 19) / 5
        lr = float(np.float32(1e-6)) * (1 - share) + lr * share
    decay = (1 + math.cos(math.pi * progress)) / 2
    return hj.Schedule(lr, 0.1 * decay + 0.3 * (1 - decay), 0.9 * (1 - progress) + 1.0 * progress)


def test_two_epochs_and_two_more_are_the_documented_schedules_own_reference(run: hj.Run) -> None:
    config = run.config
    step = hj.Step(hj.HJEPA(config), config)
    mx.random.seed(config.seed)
    sampler, source = hj.MaskSampler(config), hj.open_source(config.data, "pretrain")
    with closing(hj.training_batches(source, config)) as batches:
        for number in range(40):
            images = mx.array(next(batches).images)
            step([(images, sampler(number, 16))], documented(number))
    assert "Stage 2 goes on from step 20 (epoch 2) to epoch 4" in train(run.path, "--epochs", 4)
    found = mx.load(str(run.checkpoints / "step-00000040/model.safetensors"))
    assert isinstance(found, dict)
    reference = dict(tree_flatten(step.model.parameters()))
    assert_same(found, reference)
    rates = [row["lr"] for row in run.metrics[1:]]
    np.testing.assert_allclose(rates, [documented(n).lr for n in range(40)], rtol=1e-12)
    (stage,) = hj.Run(run.path).config.run.history
    assert (stage.step, stage.epoch, stage.epochs, stage.batch_size) == (20, 2.0, 2, 16)


def test_a_longer_run_that_was_interrupted_is_resumed_by_the_same_command(run: hj.Run) -> None:
    config = longer(run.path, 4)
    hj.Run(run.path).store(config)  # as if killed before the first step
    assert longer(run.path, 4) == config
    with pytest.raises(hj.HJEPAError, match=r"trained 2 epochs already\. Give --epochs more"):
        longer(run.path, 2)
    (run.latest / "state.json").unlink()
    with pytest.raises(hj.HJEPAError, match="no checkpoint yet"):
        longer(run.path, 6)


def test_another_batch_and_image_size_are_a_stage_of_the_same_run(run: hj.Run) -> None:
    settings = ("--set", "data.batch_size=32", "--set", "data.image_size=48")
    plan = train(run.path, "--epochs", 3, *settings, "--dry-run")
    assert "Stage 2 goes on from step 20 (epoch 2) to epoch 3: 48×48 pixels, batches of 32" in plan
    assert hj.Run(run.path).config == run.config  # a dry run changes nothing
    first = ("--set", "data.progressive=[[16, 0.7]]")  # 2 of 3 epochs are less
    assert "to epoch 3: 16×16 pixels at first" in train(
        run.path, "--epochs", 3, *first, "--dry-run"
    )
    said = train(run.path, "--epochs", 3, *settings)
    again = hj.Run(run.path)
    assert again.latest.name == "step-00000025"  # 5 steps of 32 images
    assert again.metrics[-1]["epoch"] == 3.0
    assert again.metrics[-1]["lr"] == 1e-6
    assert [row["step"] for row in again.last_stage] == [*range(21, 26)]
    copy = shutil.copytree(run.path, run.path.parent / "copy")
    assert compare([run.path, copy]).data["training"]["images"] == [20 * 16 + 5 * 32] * 2
    model = hj.load(run.path)
    assert model.config.masks.context_tokens == 43  # its share of 12×12 patches, before of 8×8
    # positions are still counted in the patches of the first images
    assert model.context_encoder.grid == 8
    assert "Stage 2" in said
    again = ("--epochs", 3, "--set", "run.final_eval=true")
    assert "there is nothing to do" in (said := train(run.path, *again))
    assert "k-NN" in said  # the evaluation that was missing
    assert "k-NN" not in train(run.path, *again)


def test_a_recipe_takes_its_epochs_and_a_run_is_not_changed_by_resuming(
    run: hj.Run, tmp_path: Path
) -> None:
    assert "epochs: 7" in train(tmp_path / "tiny.yaml", "--epochs", 7, "--dry-run")
    more = ["--resume", "--run-dir", str(run.path), "--set", "optim.epochs=4"]
    ended = CliRunner().invoke(app, ["train", str(tmp_path / "tiny.yaml"), *more])
    assert f"To train it longer: hjepa-mlx train {run.path} --epochs 4" in ended.stderr
    less = CliRunner().invoke(
        app, ["train", str(tmp_path / "tiny.yaml"), *more[:-1], "optim.epochs=1"]
    )
    assert f"Resume with the run's own config, {run.path}/config.yaml" in less.stderr
    ended = CliRunner().invoke(app, ["train", str(run.path), "--epochs", "4", "--set", "seed=1"])
    assert "seed was 0, now 1" in ended.stderr
    for dry in [], ["--dry-run"]:
        other = ["train", str(run.path), "--epochs", "4", "--set", "optim.kind=adamw", *dry]
        assert "optim.kind was 'muon', now 'adamw'" in CliRunner().invoke(app, other).stderr
    config = longer(run.path, 3)
    config.run.dir, config.optim.epochs = str(tmp_path / "new"), 1
    assert hj.train(config).config.run.history == []


def test_signals_are_compared_with_those_from_before(run: hj.Run) -> None:
    rows = [json.dumps(row | {"effective_rank_level_1": 99}) for row in run.metrics]
    (run.path / "metrics.jsonl").write_text("\n".join(rows) + "\n")
    assert "Level 1 may be collapsing: effective rank" in train(run.path, "--epochs", 3)
