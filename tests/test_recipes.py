"""Every recipe, trained and evaluated by the command line on small data in the true layout."""

import json
import subprocess
import sys

import layouts
import numpy as np
import pytest
from layouts import CMC, OTHERS

from hjepa_mlx.data.catalog import CATALOG
from hjepa_mlx.errors import UsageError
from hjepa_mlx.masks import MaskSampler
from hjepa_mlx.recipes import find_config, load_config, resolve

DATA_SETS = ("cifar10", "stl10", "imagenet100", "imagenet1k")
RECIPES = (*DATA_SETS, "imagenet100_stl10", "m1_max_imagenet100_100epoch")


def hjepa(*arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "hjepa_mlx", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A folder with all data sets: a few hundred images each."""
    root = tmp_path_factory.mktemp("data")
    layouts.cifar10(root / "cifar10", per_batch=40)
    layouts.stl10(root / "stl10", train=60, test=40, unlabeled=200)
    layouts.tars(root / "imagenet1k", layouts.photos(CMC + OTHERS))
    layouts.parquet(root / "imagenet100", layouts.photos(CMC))
    for name in DATA_SETS:
        layouts.prepared(root, name)
    return root


@pytest.mark.parametrize("name", RECIPES[:-1])  # the last is another name of the third
def test_a_recipe_trains_end_to_end_through_its_own_pipeline(root, tmp_path, name):
    run = tmp_path / "run"
    small = ("model.size=nano", "model.predictor_dim=64", "model.predictor_depth=1")
    short = (
        "data.batch_size=20",
        "optim.epochs=1",
        "optim.warmup_epochs=0",
        "compile=false",
        "run.final_eval=false",
    )
    sets = [part for change in small + short for part in ("--set", change)]
    ended = hjepa("train", name, "--data-dir", root, "--run-dir", run, *sets)
    assert ended.returncode == 0, ended.stderr
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    images = {"imagenet1k": 206, "imagenet100_stl10": 400}.get(name, 200)
    assert rows[-1]["step"] == images // 20
    assert all(np.isfinite(row["loss"]) for row in rows if "loss" in row)
    assert not (run / "eval.json").exists()


@pytest.mark.parametrize("name", RECIPES)
def test_without_its_data_a_recipe_ends_in_one_line_with_the_command(tmp_path, name):
    ended = hjepa("train", name, "--data-dir", tmp_path, "--run-dir", tmp_path / "run")
    assert ended.returncode == 1
    (line,) = ended.stderr.splitlines()
    first = load_config(name).data.name.split("+")[0]
    assert line.endswith(f"hjepa-mlx datasets download {first} --data-dir {tmp_path}")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", RECIPES[:-1])
def test_a_recipe_opens_with_its_command_and_what_is_promised(name):
    config = load_config(name)
    MaskSampler(config)
    lines = find_config(name).read_text().splitlines()
    head = "\n".join(line for line in lines if line.startswith("#"))
    assert lines[4:] == [line for line in lines[4:] if not line.startswith("#")]
    promise = CATALOG[config.data.name].promise
    assert promise is not None
    assert head.splitlines()[0].endswith(f"hjepa-mlx train {name}")
    low, high = promise.hours
    hours = f"{low:g}-{high:g} hours" if low < 48 else f"{low / 24:g}-{high / 24:g} days"
    assert f"Promised for 100 epochs on an M1 Max: {hours}" in head
    assert "linear probe {:g}-{:g} %".format(*promise.linear_probe) in head
    assert "k-NN {:g}-{:g} %".format(*promise.knn) in head


def test_the_long_name_is_the_same_recipe():
    long, short = load_config("m1_max_imagenet100_100epoch"), load_config("imagenet100")
    long.name = short.name
    assert long == short


def test_retired_keys_are_dropped_from_a_run_and_refused_in_a_recipe(tmp_path):
    tree = load_config("demo").model_dump()
    tree["data"] |= {"weights": "auto", "image_size": 64}
    tree["run"] |= {"eval_share": 0.1, "milestone_epochs": 2}
    for name in ("config.yaml", "own.yaml"):
        (tmp_path / name).write_text(json.dumps(tree))
    assert load_config(tmp_path).data.image_size == 64
    with pytest.raises(UsageError, match=r"Config key 'data\.weights' is gone: .* Delete it"):
        load_config(tmp_path / "own.yaml")
    with pytest.raises(UsageError, match=r"'run\.signals_every' is gone"):
        load_config("demo", ["run.signals_every=3"])
    tree["data"]["weights"] = [2, 1]
    (tmp_path / "config.yaml").write_text(json.dumps(tree))
    with pytest.raises(UsageError, match=r"data\.weights=\[2, 1\], which is gone"):
        load_config(tmp_path)


def test_a_run_from_before_muon_keeps_adamw_and_a_recipe_of_any_name_does_not(tmp_path):
    tree = load_config("imagenet100").model_dump()
    del tree["optim"]["kind"]
    (tmp_path / "config.yaml").write_text(json.dumps(tree))
    assert load_config(tmp_path).optim.kind == "adamw"
    (tmp_path / "config.yaml").write_text("data: {dir: pictures}\noptim: {lr: 0.001}")
    own = load_config(tmp_path / "config.yaml")
    assert (own.optim.kind, own.data.listing, own.data.bits) == ("muon", 2, "auto")


def test_an_edited_config_is_checked_again():
    config = load_config("demo")
    config.model.levels = 2
    with pytest.raises(UsageError, match=r"is of 3 levels, but model\.levels=2"):
        resolve(config)
    config.model.level_blocks = config.model.level_pool = config.loss.level_weights = "auto"
    assert resolve(config).model.level_pool == [1, "image"]
    assert config.model.level_pool == "auto"  # the given config stays as it was


@pytest.mark.parametrize(
    ("asked", "pools", "view"),
    [
        ([], [1, 1, 1, "image"], 48),
        (["model.levels=2"], [1, "image"], 48),
        (["model.levels=1"], [1], 48),
        (["model.level_pool=[1,2]"], [1, 2], 48),
        (["data.image_size=192", "model.patch_size=8"], [1, 1, 1, "image"], 40),  # 5 of 24
        (["data.image_size=64", "model.patch_size=8"], [1, 1, 1, "image"], 24),  # at least 3
        (["data.image_size=16", "model.patch_size=8"], [1, 1, 1, "image"], 16),  # all of 2
    ],
)
def test_levels_follow_their_cells_and_views_the_grid(asked, pools, view):
    config = load_config("imagenet100", ["masks.context_tokens=auto", *asked])
    assert (config.model.level_pool, config.model.levels) == (pools, len(pools))
    assert config.views.size == view


def test_patches_of_16_at_32_pixels_are_refused_and_the_plan_says_what_the_grid_means(root):
    pooled = "--set", "model.level_pool=[1,2,4,image]"
    ended = hjepa("train", "cifar10", "--dry-run", "--data-dir", root, *pooled)
    assert "level 0: 8x8 cells of 4 pixels" in ended.stdout
    assert "level 2: 2x2 cells of 16 pixels after block 12, with so few" in ended.stdout
    assert "# steps        200 images" in ended.stdout
    refused = hjepa("train", "cifar10", "--dry-run", "--set", "model.patch_size=16")
    assert refused.returncode == 2
    assert "2x2 grid (image 32, patch 16) is too small" in refused.stderr


def test_evaluation_on_another_data_set_needs_only_its_name(root, tmp_path):
    small = ("model.size=nano", "data.batch_size=20", "optim.epochs=1", "optim.warmup_epochs=0")
    sets = [
        part
        for change in (*small, "compile=false", "run.final_eval=false")
        for part in ("--set", change)
    ]
    run = tmp_path / "run"
    assert hjepa("train", "cifar10", "--data-dir", root, "--run-dir", run, *sets).returncode == 0
    quick = ("--draws", "0", "--attentive-images", "0")
    ended = hjepa("eval", run, "--data", "stl10", "--data-dir", root, "--json", "-", *quick)
    assert json.loads(ended.stdout)["protocol"]["bank_images"] == 60
