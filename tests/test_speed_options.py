"""What makes a step cheaper: FLOP, stages, several masks a target pass, precision, compiling."""

import math
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_unflatten
from rounding import assert_same

from hjepa_mlx import timing, whitening
from hjepa_mlx.costs import average_gflop, costs
from hjepa_mlx.errors import UsageError
from hjepa_mlx.masks import MaskSampler
from hjepa_mlx.models.cpu import fused_layer_norm
from hjepa_mlx.models.hjepa import HJEPA
from hjepa_mlx.models.vit import grid_positions, sincos_positions
from hjepa_mlx.recipes import load_config
from hjepa_mlx.runs import keep_choices
from hjepa_mlx.step import TARGET, Step, as_arrays
from hjepa_mlx.timing import Speed


def matmul_flop(function, *inputs):
    """FLOP of the matmuls in the graph that MLX builds for `function`."""
    found = []

    def note(event):
        if event["type"] == "primitive" and event["name"] in ("Matmul", "AddMM"):
            _, (*_, inner), _ = event["inputs"][0]
            _, shape, _ = event["outputs"][0]
            found.append(2 * math.prod(shape) * inner)

    def flat(*arrays):
        return [array for _, array in tree_flatten(function(*arrays))]

    mx.export_function(note, flat, *inputs)
    return sum(found)


def update_flop(step):
    """FLOP of the matmuls of an update."""
    weights = {part: kinds for part, kinds in step.weights.items() if part != TARGET}
    names, arrays = zip(*tree_flatten(weights), strict=True)
    mx.eval(step.state)

    def updated(*gradients):
        named = list(zip(names, gradients, strict=True))
        return step.optimizer.apply_gradients(tree_unflatten(named), weights)

    return matmul_flop(updated, *map(mx.ones_like, arrays))


IMAGE_LEVEL = {
    "model": {"levels": 3, "level_blocks": [1, 2, 3], "level_pool": [1, 2, "image"]},
    "views": {"count": 2, "size": 12},
}


@pytest.mark.parametrize(
    "changes",
    [{}, {"masks": {"per_image": 2}}, IMAGE_LEVEL]
    + [{"model": {"predictor_context": told}} for told in ("mean", "both")],
    ids=["one mask", "two masks", "two views", "from the mean", "from both"],
)
def test_flop_are_those_of_the_matmuls_that_mlx_runs(monkeypatch, tiny_config, changes):
    monkeypatch.setattr("hjepa_mlx.models.cpu.backend.on_gpu", lambda: False)  # fused there
    # these cannot be exported, and have no matmul inside but for sums
    monkeypatch.setattr("hjepa_mlx.models.cpu.softmax", partial(mx.softmax, axis=-2))
    monkeypatch.setattr("hjepa_mlx.models.cpu.rational_gelu", nn.gelu)
    monkeypatch.setattr("hjepa_mlx.models.cpu.layer_norm", fused_layer_norm)
    monkeypatch.setattr(mx, "contiguous", lambda x: x)
    config = tiny_config(**changes)
    step, sampler = Step(HJEPA(config), config), MaskSampler(config)
    batch, views = config.data.batch_size, config.masks.per_image
    images = mx.zeros((batch, 32, 32, 3), mx.uint8)
    total, target = [], []
    for shape in sampler.shapes:  # costs are the mean over shapes
        masks = as_arrays(sampler.draw(np.random.default_rng(0), shape, batch * views))
        if step.moments:  # or the graph before would be a part of this one
            step.moments.update(whitening.start(config.model.dim))
        total.append(matmul_flop(lambda x, m=masks: step.compute_gradients(x, *m), images))
        patches = step.model.patches(images)
        target.append(matmul_flop(lambda x, m=masks: step.model.targets(x, m[1], m[3]), patches))
    if config.image_predicted:
        moments, x = whitening.start(config.model.dim), mx.zeros((batch, config.model.dim))
        white = matmul_flop(lambda x: whitening.whitened(x, moments), x)
        target = [white + flop for flop in target]
    update = update_flop(Step(HJEPA(config), config))
    cost = costs(config, step.model)
    assert 1e9 * cost.parts["update"].gflop * batch == pytest.approx(update)
    assert 1e9 * cost.parts["target"].gflop * batch == pytest.approx(np.mean(target), rel=1e-3)
    assert 1e9 * cost.gflop * batch == pytest.approx(np.mean(total) + update, rel=1e-3)


def test_a_resolution_schedule_costs_less_and_keeps_the_budget():
    budget = {"imagenet100": 20, "imagenet100_fast": 13}
    for name, most in budget.items():
        config = load_config(name)
        assert average_gflop(config, HJEPA(config)) <= most
    slow, fast = load_config("imagenet100"), load_config("imagenet100_fast")
    assert costs(slow, HJEPA(slow)).gflop == costs(fast, HJEPA(fast)).gflop


def test_positions_of_another_grid_cover_the_same_image():
    def near(grid, places):
        return np.allclose(np.array(grid), np.array(sincos_positions(places, 32)), atol=1e-6)

    assert near(grid_positions(6, 6, 32), np.indices((6, 6)).reshape(2, -1).T)
    # a patch of the 3x3 grid is where four of the 6x6 grid are
    assert near(grid_positions(3, 6, 32), (np.indices((3, 3)) * 2 + 0.5).reshape(2, -1).T)
    rows, columns = np.indices((3, 6))  # a wide image: rows are stretched, columns are not
    assert near(grid_positions((3, 6), 6, 32), np.stack([rows * 2 + 0.5, columns], -1))


def test_several_masks_for_one_target_pass_are_the_mean_of_single_ones(tiny_config):
    config = tiny_config(masks={"per_image": 2})
    step = Step(HJEPA(config), config)
    sampler = MaskSampler(config)
    images = mx.array(np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), np.uint8))
    both = sampler.draw(np.random.default_rng(1), sampler.shapes[0], 8)
    looks = [
        both._replace(**{k: getattr(both, k)[n::2] for k in ("context", "targets", "centres")})
        for n in (0, 1)
    ]
    _, together = step.compute_gradients(images, *as_arrays(both))
    one, other = (
        dict(tree_flatten(step.compute_gradients(images, *as_arrays(look))[1])) for look in looks
    )
    for name, gradient in tree_flatten(together):
        mean = (one[name] + other[name]) / 2
        assert np.allclose(np.array(gradient), np.array(mean), atol=1e-6), name


RECIPE = """
name: tiny
precision: float32
compile: true
data: {name: demo, image_size: 32, progressive: [[24, 0.5]], batch_size: 16, limit: 160, workers: 1}
model: {size: custom, dim: 64, depth: 3, heads: 1, patch_size: 4, levels: 2, predictor_dim: 64,
        predictor_depth: 1}
masks: {per_image: 2}
optim: {epochs: 2, warmup_epochs: 0.5}
run: {log_every: 1, checkpoint_minutes: 1.0e-9, keep_last: 30, final_eval: false}
"""  # 20 steps, 10 of them at 24x24


def train(folder: Path, *more: str) -> str:
    (folder / "tiny.yaml").write_text(RECIPE)
    command = [sys.executable, "-m", "hjepa_mlx", "train", "tiny.yaml", "--run-dir", "run", *more]
    return subprocess.run(command, check=True, capture_output=True, text=True, cwd=folder).stderr


def test_a_resolution_schedule_is_followed_and_resumed_bit_for_bit(tmp_path):
    said = train(tmp_path)
    assert "Up to step 10: images of 24×24" in said
    assert "Up to step 20: images of 32×32" in said
    checkpoints = tmp_path / "run/checkpoints"
    weights = dict(mx.load(str(checkpoints / "step-00000020/model.safetensors")))
    before = {name: np.array(array) for name, array in weights.items()}
    for number in range(9, 21):  # as if stopped after step 8, at the lower resolution
        shutil.rmtree(checkpoints / f"step-{number:08d}")
    (checkpoints / "latest").write_text("step-00000008")
    assert "Up to step 10: images of 24×24" in train(tmp_path, "--resume")
    assert_same(mx.load(str(checkpoints / "step-00000020/model.safetensors")), before)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (["data.progressive=[[30,0.5]]"], "30 is not a multiple of model.patch_size=4"),
        (["data.progressive=[[16,0.5],[24,0.5]]"], "add up to less than 1"),
        (["data.progressive=[[16,1.5]]"], "progressive"),
        (["data.progressive=[[32,0.5]]"], "smaller than data.image_size=32"),
        (["masks.per_image=0"], "per_image"),
    ],
)
def test_what_cannot_be_trained_is_refused(settings, says):
    with pytest.raises(UsageError, match=says):
        load_config("demo", settings)


def on_a_gpu(monkeypatch, rates, compiling=0.0):
    """Trials on a GPU at these images/s, by dtype or "compiled"; the seconds that compiling takes.

    Returns the list of trials, filled as they are made.
    """
    trials = []

    def time_steps(config, seconds):
        trials.append("compiled" if config.compile else config.precision)
        warm_up = (1.0, 1.0 + compiling) if config.compile else (1.0, 1.0)
        batch = config.data.batch_size
        return Speed(batch, (batch / rates[trials[-1]],), warm_up, 0, 0.0)

    monkeypatch.setattr(timing.backend, "device", lambda: "cuda")
    monkeypatch.setattr(timing, "time_steps", time_steps)
    return trials


@pytest.mark.parametrize(
    ("rates", "chosen"),
    [((100, 130, 80), "float16"), ((100, 105, 80), "float32"), ((100, 90, 140), "bfloat16")],
)
def test_auto_takes_the_precision_that_is_clearly_faster_on_a_gpu(
    monkeypatch, tiny_config, rates, chosen
):
    trials = on_a_gpu(monkeypatch, dict(zip(timing.DTYPES, rates, strict=True)))
    config = tiny_config(precision="auto")
    (said,) = timing.settle(config, steps=10)
    assert config.precision == chosen
    assert f"precision: {chosen} (float32 100" in said
    assert trials == list(timing.DTYPES)
    assert not timing.settle(config, steps=10)  # nothing is auto any more


@pytest.mark.parametrize(
    ("steps", "compiled", "compiling", "chosen", "says"),
    [
        (100_000, 125, 120, True, "125 images/s compiled, 100 not: it took 2.0 min and saves 13.3"),
        (100_000, 102, 120, False, "saves 1.3 of 66.7 min"),
        (100_000, 80, 0, False, "saves -16.7 of 66.7 min"),
        (20_000, 125, 180, False, "it took 3.0 min and saves 2.7 of 13.3 min"),
        (10_000, None, 0, False, "100 images/s; not tried, as the run takes only 6.7 min"),
    ],
)
def test_auto_compiles_on_a_gpu_where_the_run_gains_more_than_it_costs(
    monkeypatch, tiny_config, steps, compiled, compiling, chosen, says
):
    on_a_gpu(monkeypatch, {"float32": 100, "compiled": compiled}, compiling)
    config = tiny_config(compile="auto")  # batches of 4
    assert not timing.backend.compiles(config)  # not before it is measured
    (said,) = timing.settle(config, steps)
    assert config.compile is chosen
    assert says in said


def test_on_a_cpu_nothing_is_tried(monkeypatch, tiny_config):
    monkeypatch.setattr(timing.backend, "device", lambda: "cpu")
    monkeypatch.setattr(timing, "time_steps", lambda *_: pytest.fail("steps were timed"))
    config = tiny_config(precision="auto", compile="auto")
    said = timing.settle(config, steps=10**9)
    assert config.precision == "float32"
    assert config.compile is timing.backend.can_compile()
    assert "on a CPU, lower precision is slower" in said[0]


def test_resuming_keeps_what_auto_had_become(tiny_config):
    config = tiny_config(precision="auto", compile="auto")
    before = tiny_config(precision="float16", compile=False)
    keep_choices(config, before)
    assert (config.precision, config.compile) == ("float16", False)
    explicit = tiny_config(precision="float32", compile=True)
    keep_choices(explicit, before)
    assert (explicit.precision, explicit.compile) == ("float32", True)
