"""The research harness in benchmarks/recipes, on the demo's images; and the data it makes."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

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
    for name in ("variants", "study", "data", "reference"):
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
    )
    for data, recipe, images, most in expected:
        for name, variant in study.VARIANTS.items():
            if variant.recipe == recipe:
                config = study.config_of(name, data, 1, "test", tmp_path)
                MaskSampler(config)
                steps = images // config.data.batch_size * config.optim.epochs
                seen = steps * config.data.batch_size
                assert seen == pytest.approx(most, rel=0.02), (name, data)


def test_a_run_is_trained_scored_and_not_done_again(study, tmp_path, monkeypatch):
    study.run("baseline", "tiny", 3, "validation", tmp_path)
    file = study.result_file("baseline", "tiny", 3, "validation")
    result = json.loads(file.read_text())
    assert result["recipe"]["seed"] == 3
    assert result["last_metrics"]["step"] == 10
    assert all(value > 0 for value in result["cost"].values())
    levels = result["scores"]["target"]
    assert list(levels) == ["level_0"]
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
        cost = {"gflop_per_image": 0.5, "seconds": 60}
        result = {"cost": cost, "warnings": {}, "scores": {"target": row}}
        file = study.result_file("baseline", "tiny", seed, "validation")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(result))
    table = study.table(["baseline"], "tiny", [0, 1, 2], "validation")
    cells = [next(iter(column.cells)) for column in table.columns]
    assert cells[:7] == ["baseline", "0.50", "60", "target", "level_0", "3", "0"]
    assert cells[7] == "73.0 ± 3.6"


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

    rng = np.random.default_rng(0)
    plane = rng.normal(size=(4_000, 2)) @ np.eye(2, 5) + 100.0
    assert reference.centred_rank(plane) == pytest.approx(2, abs=0.01)
    x = rng.normal(size=(4000, 16))
    for scales in (1.0, 10.0 ** np.arange(-8, 8)):
        assert study.standardised_rank(x * scales) == pytest.approx(16, rel=0.01)
    assert study.standardised_rank(np.tile(x[:, :4], 4)) == pytest.approx(4, rel=0.02)


def test_the_direction_of_edges_is_read_from_the_structure_tensor(study):
    images = np.zeros((3, 32, 32, 3), np.uint8)
    images[0, :, ::4] = 255  # upright stripes: the slope points along x
    images[1, ::4] = 255
    directions, edged = study.structure(images, 8)
    assert directions.shape == (3 * 16, 2)
    assert np.allclose(directions[:16], (1, 0), atol=0.01)
    assert np.allclose(directions[16:32], (-1, 0), atol=0.01)
    assert edged.tolist() == [True] * 32 + [False] * 16


def test_each_patch_gets_the_features_of_the_cell_it_lies_in(study):
    cells = np.arange(4.0)[None, :, None]  # 2×2 cells of 3 patches a side on a grid of 5
    places = study._of_patches(cells, 5, 3).reshape(5, 5)
    assert places[:3, :3].tolist() == [[0] * 3] * 3
    assert places[3:, 3:].tolist() == [[3] * 2] * 2
    assert places[0, 4] == 1


def test_photographs_are_cut_so_that_training_never_sees_what_is_judged(
    study, tmp_path, monkeypatch
):
    import data

    x = np.linspace(0, 255, 1200).astype(np.uint8)  # brightness says where a crop is from
    picture = np.repeat(np.repeat(x[None, :, None], 800, 0), 3, 2)
    wallpapers = tmp_path / "wallpapers"
    (wallpapers / "mate/nature").mkdir(parents=True)
    Image.fromarray(picture).save(wallpapers / "one_by_me.jpg", quality=95)
    Image.fromarray(picture[:, ::-1]).save(wallpapers / "mate/nature/two.jpg", quality=95)
    monkeypatch.setattr(data, "WALLPAPERS", wallpapers)
    assert data.photographs(tmp_path) == 2

    def shades(name, split, of):
        files = sorted((tmp_path / "photographs" / name / split / of).glob("*.png"))
        pixels = np.stack([np.asarray(Image.open(file)) for file in files])
        assert pixels.shape[1:] == (64, 64, 3)
        return len(files), pixels.min(), pixels.max()

    for of, upper in (("one_by_me", False), ("two", True)):
        for name in ("test", "validation"):
            learnt, low, high = shades(name, "train", of)
            judged, judged_low, judged_high = shades(name, "test", of)
            assert (low >= judged_high - 2) if upper else (high <= judged_low + 2)
            if name == "test":
                assert (learnt, judged) == (120, 60)
        assert judged_low >= 125 if upper else judged_high <= 130  # in the learnt half
