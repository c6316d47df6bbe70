"""What bench measures, concludes, keeps and prints."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from commands import advised
from rich.console import Group
from typer.testing import CliRunner

from hjepa_mlx import timing
from hjepa_mlx.bench import machine, run, synthetic
from hjepa_mlx.bench.estimates import changes, chip_named, estimate, project, verdict_on
from hjepa_mlx.bench.result import findings, keep, read
from hjepa_mlx.cli import app
from hjepa_mlx.costs import costs
from hjepa_mlx.data.overview import hours_here
from hjepa_mlx.data.pipeline import Batch, Position
from hjepa_mlx.errors import UsageError
from hjepa_mlx.models.hjepa import HJEPA
from hjepa_mlx.recipes import load_config
from hjepa_mlx.step import Step
from hjepa_mlx.tables import text
from hjepa_mlx.tables.bench import bench as bench_tables
from hjepa_mlx.tables.bench import side_by_side


@pytest.fixture(scope="module")
def facts(tmp_path_factory):
    """What the command writes for a tiny recipe, with every duration cut short."""
    small = [
        "model.size=nano",
        "model.patch_size=8",
        "model.levels=2",
        "model.level_pool=[1,image]",
        "masks.context_tokens=12",
    ]
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
        patch.chdir(tmp_path_factory.mktemp("bench"))
        Path("fast.yaml").write_text(fast.to_yaml())
        command = "bench fast.yaml --sustained 0.005 --project-to m1-max --json facts.json"
        ended = CliRunner().invoke(app, command.split())
        assert ended.exit_code == 0, ended.output
        return json.loads(Path("facts.json").read_bytes())


def test_bench_json_is_the_design_s(facts):
    assert set(facts["gflop_per_image"]) >= {"target", "context", "predictor", "total"}
    assert set(facts["step"]) >= {"images_per_second", "mfu", "peak_memory_gb"}
    assert facts["step"]["traces_after_warmup"] == 0
    assert facts["data"]["images_per_second"] > 0
    assert "made-up JPEG" in facts["data"]["source"]
    assert facts["end_to_end"]["images_per_second"] > 0
    demo, fast = facts["estimates"]
    assert fast["promised_hours"] == [10, 15]
    assert demo["promised_hours"] is None
    hours = fast["images"] * 100 / fast["images_per_second"] / 3600
    assert fast["hours_100_epochs"] == pytest.approx(hours)
    assert fast["hours_per_epoch"] == pytest.approx(hours / 100)
    assert facts["sustained"]["first_images_per_second"] > 0
    assert facts["sweep"] == sorted(facts["sweep"], key=lambda row: row["batch"])
    assert all(row["images_per_second"] > 0 for row in facts["sweep"])
    parts = {"target", "context", "views", "predictor", "backward", "update"}
    assert set(facts["parts_seconds"]) == parts


def test_bench_says_what_it_found(facts, tmp_path):
    shown = text(Group(*bench_tables(facts, findings(facts))))
    for words in ("matmul GFLOP/s", "MFU %", "is the limit", "promised", "Projected, not measured"):
        assert words in shown
    path = keep(facts, tmp_path)
    faster = json.loads(path.read_text())
    faster["step"]["mfu"] *= 2
    compared = text(side_by_side(read(path), faster))
    assert "2.00" in compared
    assert "demo, hours of 100 epochs" in compared
    (tmp_path / "other.json").write_text('{"images": 3}')
    with pytest.raises(UsageError, match="not a result of hjepa-mlx bench"):
        read(tmp_path / "other.json")


@pytest.mark.usefixtures("facts")  # which does as advised
def test_what_bench_cannot_measure_is_refused_with_advice(tmp_path):
    (tmp_path / "own.yaml").write_text("data: {name: folder, dir: pictures}")
    advised(f"bench {tmp_path}/own.yaml", r"Choose a recipe of a data set .*: .*\bimagenet100\b")
    advised("bench demo --sustained -1", "give a number of minutes")


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
            yield Batch(np.zeros((4, 32, 32, 3), np.uint8), Position(), np.arange(4))

    monkeypatch.setattr(machine.time, "perf_counter", lambda: now)
    monkeypatch.setattr(timing, "Step", OneSecondStep)
    monkeypatch.setattr(machine, "training_batches", three_second_batches)
    rate, share = machine.time_end_to_end(None, config, 10)
    assert rate == 4 / (1 + 3)  # images a second: a batch of 4 for every read and step
    assert share == 1 / (1 + 3)


def test_a_small_batch_s_dearer_update_does_not_make_the_recipe_slower(monkeypatch, tiny_config):
    asked = tiny_config(data={"batch_size": 64})
    small = asked.with_batch(2)
    bench = object.__new__(run.Bench)
    bench.main, bench.together = small, {"images_per_second": 100.0}
    monkeypatch.setattr(bench, "measurable", lambda config: small, raising=False)
    cost = [costs(config, HJEPA(config)).gflop for config in (small, asked)]
    assert cost[0] > 1.5 * cost[1]
    assert bench.rate(asked) == pytest.approx(100 * cost[0] / cost[1] / (1 + run.overhead(asked)))


def test_half_precision_is_measured_by_large_matmuls_on_a_gpu(monkeypatch):
    seen = []
    monkeypatch.setattr(machine, "MATMUL_SIDE", 64)
    monkeypatch.setattr(machine, "SMALL_SIDE", 32)
    monkeypatch.setattr(machine, "_best", lambda compute, seconds: seen.append(compute()) or 1.0)
    for on_gpu in (True, False):
        monkeypatch.setattr(machine.backend, "on_gpu", lambda on_gpu=on_gpu: on_gpu)
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
    looks = gflop.parts["target"].gflop / gflop.gflop
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
