"""What bench counts, measures and concludes; and the speed options of the step."""

import json
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
from mlx.utils import tree_flatten
from rich.console import Group

from hjepa_mlx import timing
from hjepa_mlx.bench import machine, run, synthetic
from hjepa_mlx.bench.estimates import changes, chip_named, estimate, project, verdict_on
from hjepa_mlx.bench.result import findings, keep, read
from hjepa_mlx.config import load_config
from hjepa_mlx.costs import average_gflop, costs
from hjepa_mlx.data.overview import hours_here
from hjepa_mlx.data.pipeline import Batch, Position
from hjepa_mlx.errors import UsageError
from hjepa_mlx.masks import MaskSampler
from hjepa_mlx.models.hjepa import HJEPA
from hjepa_mlx.models.vit import grid_positions, sincos_positions
from hjepa_mlx.runs import keep_choices
from hjepa_mlx.step import Step, as_arrays
from hjepa_mlx.tables import bench as bench_tables
from hjepa_mlx.tables import bench_side_by_side, text
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


@pytest.mark.parametrize(
    "changes",
    [{}, {"masks": {"per_image": 2}}]
    + [{"model": {"predictor_context": told}} for told in ("mean", "both")],
    ids=["one mask", "two masks", "from the mean", "from both"],
)
def test_flop_are_those_of_the_matmuls_that_mlx_runs(monkeypatch, tiny_config, changes):
    monkeypatch.setattr("hjepa_mlx.models.cpu.backend.on_metal", lambda: False)  # fused there
    # functions with a vjp of their own cannot be exported; these have no matmul inside
    monkeypatch.setattr("hjepa_mlx.models.cpu.softmax", partial(mx.softmax, axis=-1))
    monkeypatch.setattr("hjepa_mlx.models.cpu.rational_gelu", nn.gelu)
    config = tiny_config(**changes)
    step, sampler = Step(HJEPA(config), config), MaskSampler(config)
    batch, views = config.data.batch_size, config.masks.per_image
    images = mx.zeros((batch, 32, 32, 3), mx.uint8)
    total, target = [], []
    for shape in sampler.shapes:  # costs are the mean over shapes
        masks = as_arrays(sampler.draw(np.random.default_rng(0), shape, batch * views))
        total.append(matmul_flop(lambda x, m=masks: step.compute_gradients(x, *m), images))
        patches = step.model.patches(images)
        target.append(matmul_flop(lambda x, m=masks: step.model.targets(x, m[1], m[3]), patches))
    cost = costs(config, step.model)
    assert 1e9 * cost.target.gflop * batch == pytest.approx(np.mean(target), rel=1e-3)
    assert 1e9 * cost.gflop * batch == pytest.approx(np.mean(total), rel=1e-3)


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
    assert "Up to step 10: images of 24x24" in said
    assert "Up to step 20: images of 32x32" in said
    checkpoints = tmp_path / "run/checkpoints"
    weights = dict(mx.load(str(checkpoints / "step-00000020/model.safetensors")))
    before = {name: np.array(array) for name, array in weights.items()}
    for number in range(9, 21):  # as if stopped after step 8, at the lower resolution
        shutil.rmtree(checkpoints / f"step-{number:08d}")
    (checkpoints / "latest").write_text("step-00000008")
    assert "Up to step 10: images of 24x24" in train(tmp_path, "--resume")
    for name, array in mx.load(str(checkpoints / "step-00000020/model.safetensors")).items():
        assert np.array_equal(np.array(array), before[name]), name


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


@pytest.mark.parametrize(
    ("rates", "chosen"),
    [
        ((100, 130, 80, 90), ("float16", True)),
        ((100, 105, 80, 90), ("float32", True)),
        ((100, 90, 140, 150), ("bfloat16", True)),
        ((100, 90, 80, 150), ("float32", False)),
    ],
)
def test_auto_takes_what_is_clearly_faster_on_a_gpu(monkeypatch, tiny_config, rates, chosen):
    def time_steps(config, seconds, most=0):
        kind = "eager" if config.compile is False else timing.backend.precision(config)
        rate = dict(zip((*timing.DTYPES, "eager"), rates, strict=True))[kind]
        return Speed(2, (2 / rate,), 0.0, 0, 0.0)

    monkeypatch.setattr(timing.backend, "on_metal", lambda: True)
    monkeypatch.setattr(timing, "time_steps", time_steps)
    config = tiny_config(precision="auto", compile="auto")
    said = timing.settle(config)
    assert (config.precision, config.compile) == chosen
    assert len(said) == 2
    assert f"precision: {chosen[0]}" in said[0]
    assert not timing.settle(config)  # nothing is auto any more


def test_on_a_cpu_half_precision_is_not_even_tried(monkeypatch, tiny_config):
    monkeypatch.setattr(timing.backend, "on_metal", lambda: False)
    monkeypatch.setattr(timing, "time_steps", lambda *_: pytest.fail("steps were timed"))
    config = tiny_config(precision="auto", compile="auto")
    said = timing.settle(config)
    assert config.precision == "float32"
    assert "a CPU has no arithmetic for less" in said[0]


@pytest.fixture(scope="module")
def facts():
    """A whole bench of a tiny recipe, with every duration cut short."""
    small = ["model.size=nano", "model.patch_size=8", "model.levels=2", "masks.context_tokens=12"]
    small += ["data.image_size=64", "data.progressive=[[32,0.5]]"]
    fast = load_config("imagenet100_fast", small)
    recipes = {"demo": load_config("demo"), "imagenet100_fast": fast}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "SECONDS", 0.1)
        patch.setattr(run, "SHORT", 0.05)
        patch.setattr(run, "LONGEST_STEP", 0.05)
        patch.setattr(run, "RECIPES", list(recipes))
        patch.setattr(run, "load_config", recipes.__getitem__)
        patch.setattr(timing, "FEWEST", 1)
        patch.setattr(machine, "MATMUL_SIDE", 256)
        patch.setattr(synthetic, "DIFFERENT", 2)
        return run.bench(fast, chip_named("m1-max"), minutes=0.005)


def test_bench_json_is_the_design_s(facts):
    json.dumps(facts)  # nothing that JSON does not know
    assert set(facts["gflop_per_image"]) >= {"target", "context", "predictor", "total"}
    assert set(facts["step"]) >= {"images_per_second", "mfu", "peak_memory_gb"}
    assert facts["step"]["traces_after_warmup"] == 0
    assert facts["data"]["images_per_second"] > 0
    assert "made-up JPEG" in facts["data"]["source"]
    assert facts["end_to_end"]["images_per_second"] > 0
    demo, fast = facts["estimates"]
    assert fast["promised_hours"] == (10, 15)
    assert demo["promised_hours"] is None
    hours = fast["images"] * 100 / fast["images_per_second"] / 3600
    assert fast["hours_100_epochs"] == pytest.approx(hours)
    assert fast["hours_per_epoch"] == pytest.approx(hours / 100)
    assert facts["sustained"]["first_images_per_second"] > 0
    assert facts["sweep"] == sorted(facts["sweep"], key=lambda row: row["batch"])
    assert all(row["images_per_second"] > 0 for row in facts["sweep"])
    assert set(facts["parts_seconds"]) == {"target", "context", "predictor", "backward", "update"}


def test_bench_says_what_it_found(facts, tmp_path):
    shown = text(Group(*bench_tables(facts, findings(facts))))
    for words in ("matmul GFLOP/s", "MFU %", "is the limit", "promised", "Projected, not measured"):
        assert words in shown
    path = keep(facts, tmp_path)
    faster = json.loads(path.read_text())
    faster["step"]["mfu"] *= 2
    compared = text(bench_side_by_side(read(path), faster))
    assert "2.00" in compared
    assert "demo, hours of 100 epochs" in compared
    (tmp_path / "other.json").write_text('{"images": 3}')
    with pytest.raises(UsageError, match="not a result of hjepa-mlx bench"):
        read(tmp_path / "other.json")


def test_a_pipeline_slower_than_the_step_shows_in_their_speed_together(monkeypatch, tiny_config):
    config = tiny_config(data={"batch_size": 4})
    now = 0

    class OneSecondStep(Step):
        def __call__(self, *arguments):
            nonlocal now
            now += 1
            return super().__call__(*arguments)

    def three_second_batches(source, config):
        nonlocal now
        while True:
            now += 3
            yield Batch(np.zeros((4, 32, 32, 3), np.uint8), Position())

    monkeypatch.setattr(machine.time, "perf_counter", lambda: now)
    monkeypatch.setattr(timing, "Step", OneSecondStep)
    monkeypatch.setattr(machine, "training_batches", three_second_batches)
    rate, share = machine.time_end_to_end(None, config, 10)
    assert rate == 4 / (1 + 3)  # images a second: a batch of 4 for every read and step
    assert share == 1 / (1 + 3)


def test_half_precision_is_measured_by_large_matmuls_on_a_gpu(monkeypatch):
    seen = []
    monkeypatch.setattr(machine, "MATMUL_SIDE", 64)
    monkeypatch.setattr(machine, "SMALL_SIDE", 32)
    monkeypatch.setattr(machine, "_best", lambda compute, seconds: seen.append(compute()) or 1.0)
    for on_metal in (True, False):
        monkeypatch.setattr(machine.backend, "on_metal", lambda on_metal=on_metal: on_metal)
        assert machine.matmul_gflops("float16") > 0
    assert [product.shape for product in seen] == [(64, 64), (32, 32)]


def test_datasets_list_shows_kept_results_of_this_machine_only(facts, tmp_path):
    keep(facts, tmp_path / "here")
    fast = facts["estimates"][1]["hours_100_epochs"]
    assert hours_here(tmp_path / "here")["imagenet100"] == pytest.approx(fast)
    keep({**facts, "machine": {**facts["machine"], "chip": "Apple M9"}}, tmp_path / "other")
    assert hours_here(tmp_path / "other") == {}


def test_an_estimate_counts_the_images_that_a_limit_leaves():
    hours = [
        estimate("imagenet100", load_config("imagenet100", limit), 100.0)
        for limit in (["data.limit=10000"], ["data.limit=999999999"], [])
    ]
    assert [found["images"] for found in hours] == [10_000, 126_689, 126_689]
    assert hours[0]["hours_per_epoch"] == pytest.approx(10_000 / 100 / 3600)


def test_signals_and_knn_are_part_of_the_hours():
    config = load_config("imagenet100")
    without = load_config("imagenet100", ["run.eval_every_epochs=0"])
    gflop = costs(config, HJEPA(config))
    looks = gflop.target.gflop / gflop.gflop
    knn = 6_000 / (config.run.eval_every_epochs * 126_689)  # images seen for each trained on
    assert run.overhead(config) - run.overhead(without) == pytest.approx(knn * looks)
    steps = 10 * config.run.log_every
    signals = 256 / (steps * config.data.batch_size)
    assert run.overhead(without) == pytest.approx(signals * looks)


def test_verdicts():
    said = [verdict_on(hours, (10, 15)) for hours in (9, 10, 15, 30, 300)]
    assert said == ["faster", "as promised", "as promised", "slower ×2.0", "slower ×20"]


def test_projection_is_flop_over_speed_where_bytes_allow_it():
    config, chip = load_config("imagenet100"), chip_named("Apple M1 Max")
    cost = costs(config, HJEPA(config))
    assert project(config, chip, 0.6) == pytest.approx(
        600 * chip["matmul_tflops"] / cost.gflop, rel=0.05
    )
    moved = sum(part.gigabytes for part in cost.parts.values())
    assert project(config, {**chip, "bandwidth_gbs": 4.0}, 0.6) == pytest.approx(
        4.0 / moved, rel=0.01
    )
    with pytest.raises(UsageError, match="Did you mean 'm1-max'"):
        chip_named("m1-maxx")


def test_changes_to_a_slow_recipe_are_cheaper_and_loadable():
    slow = {"recipe": "imagenet100", "gflop_per_image": 19.75, "hours_100_epochs": 70}
    slow["verdict"] = "slower ×4.7"
    found = changes(slow, {"float16": 1.4, "bfloat16": 0.9})
    assert found[0] == {"settings": ["precision=float16"], "hours_100_epochs": pytest.approx(50)}
    assert len(found) == 4
    for change in found:
        load_config("imagenet100", change["settings"])
        assert change["hours_100_epochs"] < 70
    assert not changes({**slow, "verdict": "as promised"}, {"float16": 1.4})
    on_a_coarse_grid = changes({**slow, "recipe": "cifar10"}, {})
    assert "progressive" not in str(on_a_coarse_grid)  # too few patches for the levels


@pytest.mark.parametrize(
    ("command", "says"),
    [
        (["--project-to", "m1-ultramax"], "Did you mean 'm1-ultra'"),
        (["--sustained", "-1"], "give a number of minutes"),
        (["demo", "--set", "data.name=folder"], "set of the catalog"),
        (["--compare", "a.json", "b.json"], "a.json cannot be read"),
    ],
)
def test_bench_refuses_in_one_line(tmp_path, command, says):
    command = [sys.executable, "-m", "hjepa_mlx", "bench", *command]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert ended.returncode == 2
    assert says in ended.stderr
    assert ended.stderr.count("\n") == 1


def test_power_in_words(monkeypatch):
    said = {"batt": "Now drawing from 'Battery Power'\n", "-g": " lowpowermode         1\n"}
    monkeypatch.setattr(machine.sys, "platform", "darwin")
    monkeypatch.setattr(machine, "_output", lambda *command: said[command[-1]])
    assert machine.power() == "on battery, low-power mode is on"
    said |= {"batt": "Now drawing from 'AC Power'", "-g": " lowpowermode 0\n"}
    assert machine.power() == ""


def test_resuming_keeps_what_auto_had_become(tiny_config):
    config = tiny_config(precision="auto", compile="auto")
    before = tiny_config(precision="float16", compile=False)
    keep_choices(config, before)
    assert (config.precision, config.compile) == ("float16", False)
    explicit = tiny_config(precision="float32", compile=True)
    keep_choices(explicit, before)
    assert (explicit.precision, explicit.compile) == ("float32", True)
