"""The training step on a small real model and random pictures."""

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from rounding import assert_same, nearly

from hjepa_mlx import step as step_module
from hjepa_mlx.costs import costs
from hjepa_mlx.masks import MaskSampler
from hjepa_mlx.models.hjepa import HJEPA
from hjepa_mlx.step import FIRST_SCALE, Schedule, Step, as_arrays

CUT = 0.02 * 0.88  # deviation of normal numbers of 0.02 that are cut at two deviations
VALUES = Schedule(lr=1e-3, weight_decay=0.04, momentum=0.9)


@pytest.fixture(scope="module")
def new_step(tiny_config):
    """A function from config changes to a fresh Step, always with the same weights."""

    def build(**changes):
        config = tiny_config(**changes)
        return Step(HJEPA(config), config)

    return build


def batch(step, number, size=4):
    """Random pictures and their masks."""
    side = step.config.data.image_size
    pictures = np.random.default_rng(number).integers(0, 256, (size, side, side, 3), np.uint8)
    return mx.array(pictures), MaskSampler(step.config)(number, size)


def run(step, *numbers):
    """One step a number; the metrics of the last."""
    for number in numbers:
        metrics = step([batch(step, number)], VALUES)
    return {name: value.item() for name, value in metrics.items()}


def weights(step):
    return flat(step.model.parameters())


def flat(tree):
    return {name: np.array(array) for name, array in tree_flatten(tree)}


def gradient(step):
    """The gradient of a step that has run once, as AdamW's first moment holds it, in one vector."""
    moments = [m for name, m in sorted(flat(step.optimizer.state).items()) if name.endswith(".m")]
    return np.concatenate([m.ravel() for m in moments]) / (1 - step.optimizer.betas[0])


def distance(one, other):
    """Norm of the difference over the norm."""
    return np.linalg.norm(one - other) / np.linalg.norm(other)


def assert_equal(one, other):
    assert one.keys() == other.keys()
    for name in one:
        np.testing.assert_array_equal(one[name], other[name], err_msg=name)


def test_the_compiled_step_equals_the_plain_one_and_is_traced_once_a_token_count(new_step):
    changes = {"data": {"image_size": 40}, "model": {"levels": 2}}  # blocks 4x5, 4x4 and 5x4
    compiled, plain = new_step(compile=True, **changes), new_step(**changes)
    assert run(compiled, 0) == pytest.approx(run(plain, 0), rel=1e-5)
    assert distance(gradient(compiled), gradient(plain)) < 1e-5
    for name, weight in weights(compiled).items():
        # Where a gradient is rounding noise Adam's direction is noise too, so not the maximum.
        assert np.abs(weight - weights(plain)[name]).mean() < 0.1 * VALUES.lr, name

    run(compiled, *range(1, 8))
    assert compiled.traces == 2  # 16 and 20 patches a block; 4x5 and 5x4 share a trace
    for number in range(8, 38):
        values = Schedule(1e-3 / number, 0.04 * number, 1 - 0.1 / number)
        compiled([batch(compiled, number)], values)
    assert compiled.traces == 2


def test_weights_start_small_and_residual_ones_smaller(tiny_config):
    model = HJEPA(tiny_config())
    for number, block in enumerate(model.context_encoder.blocks, 1):
        residual = CUT / (2 * number) ** 0.5
        layers = (block.attn.qkv, block.attn.proj, block.mlp.fc1, block.mlp.fc2)
        for layer, std in zip(layers, (CUT, residual, CUT, residual), strict=True):
            assert np.array(layer.weight).std() == pytest.approx(std, rel=0.05)
            assert not np.array(layer.bias).any()
    assert np.array(model.predictor.heads[0].weight).std() == pytest.approx(CUT, rel=0.05)
    embedding = np.array(model.context_encoder.patch_embed.proj.weight)  # Xavier-uniform
    assert np.abs(embedding).max() == pytest.approx((6 / sum(embedding.shape)) ** 0.5, rel=0.01)


def test_images_are_normalised_by_the_config_s_mean_and_deviation(tiny_config):
    mean, std = [0.2, 0.4, 0.6], [0.1, 0.3, 0.5]
    pictures = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), np.uint8)
    patches = HJEPA(tiny_config(model={"image_mean": mean, "image_std": std})).patches(pictures)
    second = ((pictures / 255 - mean) / std)[:, :4, 4:8]  # first row of patches
    assert np.allclose(patches[:, 1], second.reshape(2, -1), atol=1e-5)


def test_a_compiled_step_draws_new_random_numbers_each_time(new_step):
    step = new_step(compile=True, loss={"sigreg": 0.1})
    still = Schedule(lr=0.0, weight_decay=0.0, momentum=1.0)
    first, second = (step([batch(step, 0)], still) for _ in range(2))
    assert first["loss_level_0"].item() == second["loss_level_0"].item()
    assert first["sigreg"].item() != second["sigreg"].item()


def test_the_target_encoder_moves_by_ema_alone(new_step):
    step = new_step()
    assert not any("target" in name for name, _ in tree_flatten(step.model.trainable_parameters()))
    assert not any("target" in name for name, _ in tree_flatten(step.optimizer.state))
    run(step, 0)  # so that the two encoders differ
    old = flat(step.model.target_encoder.parameters())
    run(step, 1)
    context = flat(step.model.context_encoder.parameters())
    momentum = np.float32(VALUES.momentum)
    expected = {k: momentum * w + (1 - momentum) * context[k] for k, w in old.items()}
    assert_equal(flat(step.model.target_encoder.parameters()), expected)


def test_two_accumulated_batches_equal_one_of_double_size(new_step):
    accumulating, whole = new_step(), new_step()
    pictures, masks = batch(whole, 0, size=8)
    halves = []
    for part in (slice(0, 4), slice(4, 8)):
        half = masks._replace(
            **{k: getattr(masks, k)[part] for k in ("context", "targets", "centres")}
        )
        halves.append((pictures[part], half))
    accumulated, expected = accumulating(halves, VALUES), whole([(pictures, masks)], VALUES)
    assert accumulated.keys() == expected.keys()
    for name, value in expected.items():
        assert accumulated[name].item() == pytest.approx(value.item(), rel=1e-5)
    assert distance(gradient(accumulating), gradient(whole)) < 1e-5


def test_clipping_shortens_the_gradient_and_keeps_its_direction(new_step):
    free, clipped = (new_step(optim={"grad_clip": clip, "kind": "adamw"}) for clip in (0.0, 0.01))
    norm = run(free, 0)["grad_norm"]
    assert np.linalg.norm(gradient(free)) == pytest.approx(norm, rel=1e-5)
    assert norm > 0.1
    assert run(clipped, 0)["grad_norm"] == norm  # reported as it was before
    assert np.linalg.norm(gradient(clipped)) == pytest.approx(0.01, rel=1e-3)
    assert distance(gradient(clipped), gradient(free) * 0.01 / norm) < 1e-3


@pytest.mark.parametrize("precision", ["float16", "bfloat16"])
def test_gradient_checkpointing_leaves_the_weights_in_float32(new_step, precision):
    step = new_step(precision=precision, model={"checkpoint_blocks": True})
    before = weights(step)
    images, masks = batch(step, 0)
    step.compute_gradients(images, *as_arrays(masks))
    assert {weight.dtype for weight in weights(step).values()} == {np.dtype("f4")}
    assert_equal(weights(step), before)


def test_gradient_checkpointing_gives_the_same_weights_in_less_memory(new_step):
    results, peaks = [], []
    for checkpoint_blocks in (False, True):
        model = {"depth": 12, "predictor_depth": 1, "checkpoint_blocks": checkpoint_blocks}
        masks = {"targets": 1, "context_tokens": 40}
        step = new_step(compile=True, model=model, masks=masks)
        mx.eval(step.state)
        held = mx.get_active_memory()
        mx.reset_peak_memory()
        step([batch(step, 0, size=32)], VALUES)
        results.append(weights(step))
        peaks.append(mx.get_peak_memory() - held)
    for name, weight in results[0].items():
        np.testing.assert_allclose(weight, results[1][name], atol=1e-6, err_msg=name)
    assert peaks[1] < 0.7 * peaks[0]


@pytest.mark.parametrize("precision", ["float16", "bfloat16"])
def test_half_precision_follows_float32_and_keeps_float32_weights(new_step, precision):
    half, full = new_step(precision=precision), new_step()
    assert run(half, 0)["loss"] == pytest.approx(run(full, 0)["loss"], rel=0.01)
    assert 1e-6 < distance(gradient(half), gradient(full)) < 0.05
    moments = half.optimizer.state["context_encoder"]
    assert {a.dtype for a in flat([half.model.parameters(), moments]).values()} == {np.dtype("f4")}
    assert run(half, *range(1, 6))["loss"] == pytest.approx(
        run(full, *range(1, 6))["loss"], rel=0.01
    )


def test_an_overflow_halves_the_loss_scale_and_touches_nothing_else_until_it_fits(new_step):
    step = new_step(precision="float16")
    run(step, 0)
    step.scaler["scale"] = mx.array(1e38)
    before = flat(step.model.parameters()), flat(step.optimizer.state)
    metrics = run(step, 1)
    assert metrics["overflow"]
    assert metrics["loss_scale"] == pytest.approx(5e37)
    assert np.isfinite(metrics["loss"])
    for now, then in zip((weights(step), flat(step.optimizer.state)), before, strict=True):
        assert_equal(now, then)

    step.scaler["scale"] = mx.array(2.0**30)
    overflows = [run(step, number)["overflow"] for number in range(2, 22)]
    tries = overflows.index(False)
    assert tries >= 1
    assert not any(overflows[tries:])
    assert step.scaler["scale"].item() == 2.0 ** (30 - tries)
    assert not any(np.array_equal(w, before[0][name]) for name, w in weights(step).items())


def test_sigreg_does_not_grow_with_the_masks_of_an_image(new_step):
    for images in (8, 16):
        few, many = (new_step(loss={"sigreg": 1.0}, masks={"per_image": views}) for views in (1, 4))
        found = []
        for step in (few, many):
            masks = MaskSampler(step.config)(0, images * step.config.masks.per_image)
            mx.random.seed(0)
            metrics = step([(batch(step, 0, images)[0], masks)], VALUES)
            found.append(metrics["sigreg"].item())
        assert found[1] == pytest.approx(found[0], rel=0.1)


def test_the_loss_scale_doubles_after_enough_good_steps(new_step, monkeypatch):
    monkeypatch.setattr(step_module, "STEPS_TO_GROW", 3)
    monkeypatch.setattr(step_module, "LARGEST_SCALE", 4 * FIRST_SCALE)
    step = new_step(precision="float16")
    scales = [run(step, number)["loss_scale"] / FIRST_SCALE for number in range(10)]
    assert scales == [1, 1, 2, 2, 2, 4, 4, 4, 4, 4]


def test_the_same_seed_gives_the_same_bits(new_step):
    changes = {"loss": {"sigreg": 0.1}, "seed": 7}  # SIGReg draws random numbers in the step
    one, other = new_step(**changes), new_step(**changes)
    for step in (one, other):
        mx.random.seed(7)
        run(step, 0, 1, 2)
    assert_same(weights(one), weights(other))
    assert not np.array_equal(
        weights(one)["predictor.embed.weight"], weights(new_step())["predictor.embed.weight"]
    )


@pytest.mark.parametrize("term", ["vicreg", "sigreg"])
def test_a_regulariser_adds_its_weighted_term_to_loss_and_gradient(new_step, term):
    plain, regularised = new_step(), new_step(loss={term: 0.5})
    without, metrics = run(plain, 0), run(regularised, 0)
    assert metrics[term] > 0
    assert term not in without
    assert metrics["loss"] == pytest.approx(without["loss"] + 0.5 * metrics[term], rel=1e-5)
    assert distance(gradient(regularised), gradient(plain)) > 0.01


def test_the_loss_is_the_weighted_sum_of_the_levels(new_step):
    metrics = run(new_step(loss={"level_weights": [1.0, 0.5, 0.25]}), 0)
    levels = [metrics[f"loss_level_{level}"] for level in range(3)]
    assert metrics["loss"] == pytest.approx(np.dot(levels, [1.0, 0.5, 0.25]))


def test_a_level_of_weight_0_is_looked_at_but_not_predicted(new_step):
    only_last = {"levels": 1, "level_blocks": [3], "level_pool": [1]}
    alone = new_step(model=only_last, loss={"level_weights": [0.5]})
    looked_at = {"levels": 3, "level_blocks": [1, 2, 3], "level_pool": [1, 1, 1]}
    beside = new_step(model=looked_at, loss={"level_weights": [0, 0, 0.5]})
    expected, metrics = run(alone, 0, 1), run(beside, 0, 1)
    assert metrics.pop("loss_level_2") == expected.pop("loss_level_0")
    assert metrics == nearly(expected)
    assert_same(weights(beside), weights(alone))
    assert costs(beside.config, beside.model) == costs(alone.config, alone.model)
    pictures, _ = batch(beside, 0)
    levels, (last,) = beside.model.encode(pictures), alone.model.encode(pictures)
    assert len(levels) == 3
    assert np.array_equal(levels[2], last)
