"""Commands that end well: what they print, and that other programs can read it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import hjepa_mlx
from hjepa_mlx.cli.common import in_runs
from hjepa_mlx.config import Config
from hjepa_mlx.costs import costs
from hjepa_mlx.models.hjepa import HJEPA
from hjepa_mlx.recipes import parse, resolve
from hjepa_mlx.sections import Views

SMALL = [
    "--set",
    "model.size=small",
    "--set",
    "data.image_size=224",
    "--set",
    "model.patch_size=16",
]


def hjepa(*arguments: str, folder: Path) -> str:
    command = [sys.executable, "-m", "hjepa_mlx", *arguments]
    return subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True).stdout


def test_a_dry_run_prints_a_config_that_can_be_trained_and_makes_nothing(tmp_path: Path) -> None:
    printed = hjepa("train", "demo", *SMALL, "--dry-run", folder=tmp_path)
    assert list(tmp_path.iterdir()) == []
    tree = yaml.safe_load(printed)
    assert resolve(parse(tree)).model_dump() == tree
    assert "14x14 = 196 in the target encoder, 58 in the context encoder" in printed
    assert "context_encoder 21.59 M" in printed  # timm's vit_small_patch16 without token and head
    assert "5,500 images, 343 an epoch, 1,715 in all" in printed


def test_a_dry_run_says_which_levels_are_only_looked_at(tmp_path: Path) -> None:
    pooled = "model.level_pool=[1,2,4]", "--set", "loss.level_weights=[0,0,1]"
    printed = hjepa("train", "demo", "--set", *pooled, "--dry-run", folder=tmp_path)
    assert "cells predicted: level 2: " in printed
    assert "level 0: 8x8 cells of 4 pixels after block 1 (not predicted), level 1: " in printed
    assert "level 2: 2x2 cells of 16 pixels after block 3, with so few" in printed


def test_the_default_small_model_costs_what_its_shapes_say() -> None:
    config = resolve(Config(views=Views(count=1)))
    cost = costs(config, HJEPA(config))
    # By hand: 12 blocks of width 384 over 196 and 58 tokens, patch embeddings; gradients cost
    # twice a forward pass, but the pixels have none. A view of 9 tokens has two MLPs beside.
    target = 12 * (24 * 196 * 384**2 + 4 * 196**2 * 384) + 2 * 196 * 768 * 384
    context = 3 * 12 * (24 * 58 * 384**2 + 4 * 58**2 * 384) + 2 * 2 * 58 * 768 * 384
    assert cost.parts["target"].gflop == pytest.approx(target / 1e9, rel=0.01)
    views = 3 * 12 * (24 * 9 * 384**2 + 4 * 9**2 * 384) + 2 * 2 * 9 * 768 * 384
    views += 3 * 2 * 1536 * (384 + 384 + 384 + 512)
    assert cost.parts["context"].gflop == pytest.approx(context / 1e9)
    assert cost.parts["views"].gflop == pytest.approx(views / 1e9, rel=0.02)
    assert 23 < cost.gflop < 24  # GFLOP per image


def test_doctor_speaks_json(tmp_path: Path) -> None:
    facts = json.loads(hjepa("doctor", "--json", "-", folder=tmp_path))
    assert facts["matmul_gflops"] > 1
    assert {"chip", "memory_gb", "mlx", "blas", "free_disk_gb", "advice"} <= facts.keys()


def test_the_version_is_printed(tmp_path: Path) -> None:
    assert hjepa("--version", folder=tmp_path).strip() == hjepa_mlx.__version__


def test_every_command_has_help_with_an_example(tmp_path: Path) -> None:
    commands = "train eval doctor bench viz compare embed finetune predict export push"
    for command in commands.split():
        assert f"hjepa-mlx {command}" in hjepa(command, "--help", folder=tmp_path)


def test_json_is_written_through_a_link(tmp_path: Path) -> None:
    """As /dev/stdout is one: it must not be replaced by a file."""
    link, target = tmp_path / "link.json", tmp_path / "target.json"
    link.symlink_to(target)
    hjepa("datasets", "list", "--json", str(link), folder=tmp_path)
    assert link.is_symlink()
    assert json.loads(target.read_text())["datasets"]


def test_a_run_is_found_by_its_name_beside_pictures_of_that_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("cats", "runs/cats", "own", "runs/own"):
        Path(folder).mkdir(parents=True)
    for run in ("runs/cats", "own", "runs/own"):
        Path(run, "config.yaml").touch()
    assert [in_runs(name) for name in ("cats", "own", "dogs")] == ["runs/cats", "own", "dogs"]
