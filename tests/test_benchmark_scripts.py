"""The scripts in benchmarks/ measure what they say, at sizes that take seconds."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from hjepa_mlx.backend import blas_name

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # OpenBLAS and torch share the cores


def script(name):
    """A script of benchmarks/ as a module."""
    spec = importlib.util.spec_from_file_location(f"benchmark_{Path(name).stem}", BENCHMARKS / name)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["memory.py", "estimates.py", "kernels.py", "ranks.py"])
def test_a_script_computes_with_the_blas_that_the_package_chooses(name):
    """Importing MLX before the package gives its reference BLAS, 30 times slower."""
    code = "import runpy, sys; runpy.run_path(sys.argv[1]); import hjepa_mlx as hj; "
    code += "print(hj.backend.blas_name())"
    command = [sys.executable, "-c", code, str(BENCHMARKS / name)]
    shown = subprocess.run(command, check=True, capture_output=True, text=True)
    assert shown.stdout.strip() == blas_name()


@pytest.mark.parametrize(("kind", "most"), [("adamw", 200), ("muon", 600)])
def test_an_update_launches_no_more_kernels_for_a_deeper_network(
    tiny_config, monkeypatch, kind, most
):
    monkeypatch.setattr("hjepa_mlx.backend.on_gpu", lambda: True)  # as the script's command does
    kernels = script("kernels.py").kernels
    shallow, deep = (
        kernels(tiny_config(model={"depth": depth}, optim={"kind": kind})) for depth in (3, 6)
    )
    assert shallow["update"] == deep["update"]
    assert shallow["update"].total() < most
    assert shallow["gradients"]["Matmul"] < deep["gradients"]["Matmul"]


def test_two_ranks_of_this_machine_are_measured():
    assert script("ranks.py").measured("demo", batch=4, ranks=2, steps=2) > 0


def test_memory_grows_with_the_batch_and_shrinks_with_checkpointing(tiny_config):
    memory = script("memory.py")
    at_8, at_16, checkpointed = (
        memory.measure(tiny_config(data={"batch_size": batch}, model={"depth": 8} | more))
        for batch, more in ((8, {}), (16, {}), (16, {"checkpoint_blocks": True}))
    )
    assert at_8["peak_gb"] < at_16["peak_gb"]
    assert checkpointed["peak_gb"] < at_16["peak_gb"]
    assert at_8["estimated_gb"] < at_16["estimated_gb"]
    assert at_16["seconds_per_step"] > 0


def test_the_promised_batch_is_the_largest_multiple_of_8_that_fits():
    memory = script("memory.py")
    rows = [{"batch": batch, "peak_gb": 0.5 + 0.1 * batch} for batch in (8, 16, 32)]
    line = memory.line(rows, "peak_gb")
    assert (line["fixed_gb"], line["per_image_gb"]) == pytest.approx((0.5, 0.1))
    assert line["largest_deviation_percent"] < 1e-6
    batch = memory.largest_batch(line, 10.0)
    assert batch == 88
    assert 0.5 + 0.1 * (batch + 8) > 10.0
    assert memory.largest_batch(line, 1.0) == 0


def test_memory_over_many_steps_is_reported_at_even_distances(tiny_config):
    found = script("memory.py").grow(tiny_config(compile=True), steps=80, every=20)
    assert [row["step"] for row in found["rows"]] == [20, 40, 60, 80]
    assert all(row["resident_mb"] > row["active_mb"] > 0 for row in found["rows"])
    # The cache hands out buffers up to 2 % larger in sum. Keeping each step's images adds 12 %.
    assert found["active_growth_percent"] == pytest.approx(0, abs=5)
    assert found["traces_after_warmup"] == 0


def test_the_speed_of_a_run_in_stages_is_all_images_over_all_the_time():
    compare = script("peers/compare.py")
    part = {"images_per_second": 30.0, "gflop_per_image": 1.0, "matmul_gflops": 100.0}
    slow = {**part, "images_per_second": 10.0, "gflop_per_image": 3.0}
    whole = compare.over_the_run([0.75, 0.25], [part, slow])
    assert whole["images_per_second"] == pytest.approx(400 / (300 / 30 + 100 / 10))
    assert whole["gflop_per_image"] == pytest.approx(1.5)
    assert whole["mfu_percent"] == pytest.approx(30)
    assert whole["images_per_second_part_1"] == 10


def test_every_contender_is_timed_over_its_whole_training():
    compare = script("peers/compare.py")
    found = compare.contenders(batch=16, steps=12, mask_batch=0, number=0)
    assert found.keys() >= {name for pair in compare.RATIOS for name in pair}
    for commands in found.values():
        assert sum(share for share, _ in commands) == pytest.approx(1)
    sizes = [command[command.index("--size") + 1] for _, command in found["imagenet100_fast"]]
    assert sizes == ["128", "224"]


def test_ratios_are_ours_over_torch_s():
    compare = script("peers/compare.py")
    speeds = {"torch 6x192": 2, "torch 6x384": 1, "imagenet100": 4, "imagenet100_fast": 8}
    rounds = {
        name: [{"images_per_second": speed * luck} for luck in (0.5, 1.0, 1.1)]
        for name, speed in speeds.items()
    }
    found = compare.summary(rounds)
    rate = found["contenders"]["imagenet100"]["images_per_second"]
    assert rate == {"median": 4, "least": 2, "most": pytest.approx(4.4)}
    ratios = [found["ratios"][f"{ours} / {torch}"]["of_medians"] for ours, torch in compare.RATIOS]
    assert dict(zip(compare.RATIOS, ratios, strict=True)) == {
        ("imagenet100", "torch 6x192"): 2,
        ("imagenet100", "torch 6x384"): 4,
        ("imagenet100_fast", "torch 6x192"): 4,
    }


@pytest.fixture
def peer():
    pytest.importorskip("timm")
    pytest.importorskip("torch")
    return script("peers/ijepa_torch.py")


@pytest.fixture
def small_step(peer):
    return peer.Step(64, 8, dim=64, depth=2, predictor_dim=64, predictor_depth=2, lr=3e-3)


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore")
def test_the_peer_s_context_is_in_raster_order_and_holds_no_target(peer):
    rng = np.random.default_rng(0)
    for _ in range(20):
        context, targets = (masks.numpy() for masks in peer.draw_masks(rng, 4, 14))
        assert targets.shape[:2] == (4, 4)
        assert 0.12 < targets.shape[2] / 14**2 < 0.24  # whole patches
        assert context.shape[1] >= 10
        assert (np.diff(context) > 0).all()
        for tokens, blocks in zip(context, targets, strict=True):
            assert not np.intersect1d(tokens, blocks).size


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore")
def test_the_peer_s_loss_falls(peer, small_step):
    import torch

    rng = np.random.default_rng(0)
    images = torch.from_numpy(rng.integers(0, 256, (8, 64, 64, 3), np.uint8))
    losses = [small_step(images, *peer.draw_masks(rng, 8, small_step.grid)) for _ in range(20)]
    assert np.mean(losses[-5:]) < 0.8 * np.mean(losses[:3])


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore")
def test_the_peer_s_target_encoder_moves_by_ema_alone(peer, small_step):
    import torch

    rng = np.random.default_rng(0)
    images = torch.from_numpy(rng.integers(0, 256, (2, 64, 64, 3), np.uint8))
    targets = list(small_step.target_encoder.parameters())
    before = [weight.clone() for weight in targets]
    small_step(images, *peer.draw_masks(rng, 2, small_step.grid), momentum=0.75)
    context = small_step.context_encoder.parameters()
    for old, new, trained in zip(before, targets, context, strict=True):
        assert new.grad is None
        torch.testing.assert_close(new, 0.75 * old + 0.25 * trained)
    moved = any((new != old).any() for new, old in zip(targets, before, strict=True))
    assert moved
