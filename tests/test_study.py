"""The research harness in benchmarks/recipes, on the demo's images."""

import json
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import hjepa_mlx as hj
from hjepa_mlx.masks import MaskSampler

import mlx.core as mx  # isort: skip  (after hjepa_mlx, which loads OpenBLAS)

SPLITS = ("validation", "test")
FOLDER = Path(__file__).parent.parent / "benchmarks" / "recipes"
SHORT = (
    "data.name=demo",
    "data.limit=320",
    "data.batch_size=32",
    "optim.epochs=1",
    "optim.warmup_epochs=0",
    "compile=false",
    "model.depth=2",
    "model.dim=64",
    "model.heads=1",
)


@pytest.fixture
def study(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(FOLDER)
    for name in ("variants", "scoring", "study", "data", "reference"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    import study

    monkeypatch.setattr(study, "RESULTS", tmp_path / "results")
    study.DATA_SETS["tiny"] = SHORT
    return study


def test_every_variant_is_a_valid_recipe_on_every_data_set(study, tmp_path):
    baseline = "research/ijepa_fashion"
    expected = (
        ("demo", "demo", 5_500, 27_500),
        ("fashion", baseline, 20_000, 200_000),
        ("fashion_short", baseline, 20_000, 100_000),
        ("photographs", baseline, 27 * 120, 100_000),
        ("pictures", baseline, 13_589, 200_000),
        ("pictures_long", baseline, 13_589, 1_016_000),
    )
    for data, recipe, images, most in expected:
        for name, variant in study.VARIANTS.items():
            if variant.recipe == recipe:
                config = study.config_of(name, data, 1, "test", tmp_path)
                MaskSampler(config)
                steps = images // config.data.batch_size * config.optim.epochs
                seen = steps * config.data.batch_size
                assert seen == pytest.approx(
                    variant.share * most, abs=0.02 * most + (variant.share != 1) * images / 2
                ), (name, data)


def test_a_run_is_trained_scored_and_not_done_again(study, tmp_path, monkeypatch):
    study.run("baseline", "tiny", 3, "validation", tmp_path)
    file = study.result_file("baseline", "tiny", 3, "validation")
    result = json.loads(file.read_text())
    assert result["recipe"]["seed"] == 3
    assert result["last_metrics"]["step"] == 10
    assert all(value > 0 for value in result["cost"].values())
    assert result["cost"]["pictures"] == 320
    assert result["machine"]["precision"] == "float32"
    levels = result["scores"]["target"]
    assert list(levels) == ["level_0", "whitened", "all_levels"]
    assert 10 < levels["level_0"]["knn"] < 100
    assert levels != result["scores"]["context"]
    monkeypatch.setattr(study, "trained", None)  # would fail if called
    study.run("baseline", "tiny", 3, "validation", tmp_path)
    result["recipe"]["seed"] = 4
    file.write_text(json.dumps(result))
    with pytest.raises(SystemExit, match="another recipe"):
        study.run("baseline", "tiny", 3, "validation", tmp_path)


def test_splits_are_folders_of_their_own_and_a_shorter_data_set_has_the_same_images(
    study, tmp_path
):
    folders = [study.config_of("nano", "fashion", 0, s, tmp_path).data.dir for s in SPLITS]
    assert folders == [str(tmp_path / "fashion" / split) for split in SPLITS]
    short, long = (
        study.config_of("small", data, 0, "test", tmp_path) for data in ("fashion_short", "fashion")
    )
    assert short.data == long.data
    assert (short.optim.epochs, long.optim.epochs) == (5, 10)


def test_the_table_is_mean_and_deviation_over_seeds(study):
    for seed, value in enumerate((70.0, 72.0, 77.0)):
        row = {"level_0": dict.fromkeys(study.SCORES, value)}
        cost = {"gflop_per_image": 0.5, "seconds": 60, "pictures": 9_000, "tflop": 4.5}
        parts = {"cost": cost, "machine": {"device": "CPU"}, "warnings": {}}
        result = parts | {"scores": {"target": row}}
        file = study.result_file("baseline", "tiny", seed, "validation")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(result))
    pixels = {"scores": {"pixels": {"16×16": {"linear_probe": 40.1}}}}
    study.baseline_file("tiny", "validation").write_text(json.dumps(pixels))
    table = study.table(["baseline"], "tiny", [0, 1, 2], "validation")
    plain, cells = zip(*(column.cells for column in table.columns), strict=True)
    assert plain[:4] == ("no network", "", "pixels", "16×16")
    assert plain[10:13] == ("", "40.1", "")
    assert cells[:10] == (
        *("baseline", "CPU", "target", "level_0", "3", "0"),
        *("0.50", "4", "9,000", "60"),
    )
    assert cells[10] == "73.0 ± 3.6"


def test_meta_s_networks_start_at_one_scale_and_ours_do_not(study, tmp_path):
    def deviations(variant, encoder="context_encoder"):
        config = study.config_of(variant, "fashion", 0, "test", tmp_path)
        network = study.VARIANTS[variant].network or hj.HJEPA
        blocks = network(config)[encoder].blocks
        return [float(mx.std(block.mlp.fc2.weight)) for block in blocks]

    assert deviations("ijepa") == pytest.approx([0.02] * 6, rel=0.02)
    assert deviations("ijepa") == deviations("ijepa", "target_encoder")
    ours = deviations("baseline")
    assert ours[5] / ours[0] == pytest.approx(6**-0.5, rel=0.02)


def test_the_reference_evaluates_what_study_trained(study, monkeypatch, tmp_path, capsys):
    import reference

    monkeypatch.setattr(reference, "DATA", ("tiny", "test"))
    study.run("baseline", "tiny", 0, "test", tmp_path)
    folder = study.config_of("baseline", "tiny", 0, "test", tmp_path).run.dir
    trained_once = hj.Run(folder).metrics
    command = ["reference.py", "baseline", "--seeds", "0", "--root", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", command)
    reference.main()
    assert hj.Run(folder).metrics == trained_once
    printed = capsys.readouterr().out
    rows = [line.split("│")[1:-1] for line in printed.splitlines() if "baseline" in line]
    assert [row[1].strip() for row in rows] == ["target", "context"]
    assert all(10 < float(cell) < 100 for row in rows for cell in row[2:4])


def test_the_collator_draws_masks_as_meta_s_code_does(study, tmp_path):
    config = study.config_of("ijepa", "fashion", 0, "test", tmp_path)
    sampler = study.VARIANTS["ijepa"].sampler(config)
    lengths = []
    for step in range(100):
        masks = sampler(step, 128)
        lengths.append(masks.context.shape[1])
        left = []
        for context, targets in zip(masks.context, masks.targets, strict=True):
            inside = {8 * row + column for row in range(7) for column in range(7)}
            assert set(targets.ravel()) <= inside
            left.append(sorted(inside - set(targets.ravel())))
            assert context.tolist() == left[-1][: lengths[-1]]
        assert min(map(len, left)) == lengths[-1]
    assert 10 < np.mean(lengths) < 13


def test_ijepa_predicts_a_block_without_looking_at_the_others(study, tmp_path):
    config = study.config_of("ijepa", "fashion", 0, "test", tmp_path)
    variant = study.VARIANTS["ijepa"]
    model, masks = variant.network(config), variant.sampler(config)(0, 2)
    assert [block.attn.heads for block in model.predictor.blocks] == [3, 3, 3]
    n = masks.targets.shape[2]
    moved = masks.centres.copy()
    moved[:, n:] = moved[:, : 3 * n]  # all blocks but the first
    patches = model.patches(np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), np.uint8))
    for network, alone in ((model, True), (hj.HJEPA(config), False)):
        first, second = (
            np.array(network.predict(patches, mx.array(masks.context), mx.array(x), [4 * n])[0][0])
            for x in (masks.centres, moved)
        )
        assert np.allclose(first[:, :n], second[:, :n], atol=1e-6) == alone
        assert not np.allclose(first[:, n:], second[:, n:], atol=1e-6)


def test_ranks_are_of_centred_or_of_standardised_features(study):
    import reference
    import scoring

    rng = np.random.default_rng(0)
    plane = rng.normal(size=(4_000, 2)) @ np.eye(2, 5) + 100.0
    assert reference.centred_rank(plane) == pytest.approx(2, abs=0.01)
    x = rng.normal(size=(4000, 16))
    for scales in (1.0, 10.0 ** np.arange(-8, 8)):
        assert scoring.standardised_rank(x * scales) == pytest.approx(16, rel=0.01)
    assert scoring.standardised_rank(np.tile(x[:, :4], 4)) == pytest.approx(4, rel=0.02)


def test_the_clock_stops_a_run_that_the_next_call_ends(study, tmp_path, monkeypatch):
    runs = [("baseline", 0), ("nano", 0)]
    began = time.monotonic()
    study.run("untrained", "tiny", 0, "test", tmp_path)
    end = time.monotonic() + (taken := time.monotonic() - began)

    class Waits(MaskSampler):
        def __call__(self, step, count):
            while step == 5 and time.monotonic() < end:
                time.sleep(0.01)
            return super().__call__(step, count)

    waits = type(study.VARIANTS["baseline"])(study.VARIANTS["baseline"].overrides, sampler=Waits)
    monkeypatch.setitem(study.VARIANTS, "baseline", waits)
    said = list(study.in_time(runs, "tiny", "test", tmp_path, taken / 60))
    assert "baseline, seed 0: stopped by the clock" in said[0]
    assert said[1].startswith("nano, seed 0: not begun")
    assert not any(study.result_file(name, "tiny", 0, "test").exists() for name, _ in runs)

    assert list(study.in_time(runs[:1], "tiny", "test", tmp_path, 60)) == []
    result = json.loads(study.result_file("baseline", "tiny", 0, "test").read_text())
    assert result["last_metrics"]["step"] == 10


def test_a_run_that_would_not_fit_is_not_begun_but_a_smaller_one_is(study, tmp_path, monkeypatch):
    def run(variant, data, seed, split, root, end=None):
        file = study.result_file(variant, data, seed, split)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps({"cost": {"seconds": 50, "tflop": 1.0}}))

    monkeypatch.setattr(study, "run", run)
    work = {"baseline": 1.0, "ijepa": 2.0, "nano": 0.5}
    monkeypatch.setattr(study, "left_of", lambda variant, config: (0.0, work[variant]))
    said = list(study.in_time([(name, 0) for name in work], "tiny", "test", tmp_path, 1))
    assert len(said) == 1
    assert said[0].startswith("ijepa, seed 0: not begun")
    assert said[0].endswith("s are left. It needs about 100 s.")
    assert study.result_file("nano", "tiny", 0, "test").exists()
