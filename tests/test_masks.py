"""Masks, checked by their properties over grids from 8x8 to 28x28 and one to four levels."""

import re

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from hjepa_mlx.errors import UsageError
from hjepa_mlx.masks import MaskSampler, context_shapes, pooling, target_shapes

GRIDS = st.integers(8, 28)
SEEDS = st.integers(0, 2**32 - 1)
STEPS = st.integers(0, 10**6)


@pytest.fixture(scope="module")
def sampler_for(tiny_config):
    def build(grid, levels=3, seed=0, **masks):
        return MaskSampler(
            tiny_config(
                seed=seed,
                data={"image_size": 4 * grid},
                model={"depth": 4, "levels": levels},
                masks=masks,
            )
        )

    return build


def levels_for(grid):
    # Cells of 8x8 patches need target blocks longer than 4, which grids from 11x11 have.
    return st.integers(1, 3 if grid < 11 else 4)


def row_column(index, side):
    return np.stack(np.divmod(index, side), -1)


def is_one_of(shapes, height, width):
    return any((s.height, s.width) == (height, width) for s in shapes)


@given(data=st.data(), grid=GRIDS, seed=SEEDS, step=STEPS, batch=st.integers(1, 5))
@settings(max_examples=60)
def test_context_indices_are_sorted_unique_counted_and_outside_every_target(
    sampler_for, data, grid, seed, step, batch
):
    sampler = sampler_for(grid, data.draw(levels_for(grid)), seed)
    masks = sampler(step, batch)
    assert masks.context.shape == (batch, sampler.context_tokens)
    assert masks.context.min() >= 0
    assert masks.context.max() < grid**2
    assert (np.diff(masks.context, axis=1) > 0).all()
    for context, targets in zip(masks.context, masks.targets, strict=True):
        assert not np.intersect1d(context, targets).size


@given(grid=GRIDS, seed=SEEDS, step=STEPS, targets=st.integers(1, 4))
@settings(max_examples=60)
def test_target_blocks_are_full_rectangles_of_one_listed_shape(
    sampler_for, grid, seed, step, targets
):
    sampler = sampler_for(grid, seed=seed, targets=targets)
    blocks = row_column(sampler(step, 3).targets, grid)  # [B, M, h·w, 2]
    assert blocks.shape[:2] == (3, targets)
    height, width = blocks[0, 0].max(0) - blocks[0, 0].min(0) + 1
    assert is_one_of(sampler.shapes, height, width)
    corners = blocks[:, :, :1]
    assert (corners >= 0).all()
    assert (corners + np.array([height, width]) <= grid).all()
    rectangle = [(row, column) for row in range(height) for column in range(width)]
    np.testing.assert_array_equal(blocks - corners, np.broadcast_to(rectangle, blocks.shape))


@given(height=st.integers(1, 28), width=st.integers(1, 28), size=st.sampled_from([1, 2, 3, 4, 8]))
def test_pooling_equals_a_loop_that_averages_each_cell(height, width, size):
    matrix, centres = pooling(height, width, size)
    features = np.random.default_rng(0).normal(size=(height, width, 3))
    cells = [
        (slice(row, row + size), slice(column, column + size))
        for row in range(0, height, size)
        for column in range(0, width, size)
    ]
    np.testing.assert_allclose(matrix.sum(1), 1, rtol=1e-6)
    pooled = matrix @ features.reshape(height * width, 3)
    np.testing.assert_allclose(pooled, [features[c].mean((0, 1)) for c in cells], atol=1e-6)
    positions = np.stack(np.mgrid[:height, :width], -1)
    np.testing.assert_array_equal(centres, [2 * positions[c].mean((0, 1)) for c in cells])


@given(data=st.data(), grid=GRIDS, step=STEPS)
@settings(max_examples=60)
def test_centres_are_the_mean_positions_of_the_patches_each_cell_averages(
    sampler_for, data, grid, step
):
    levels = data.draw(levels_for(grid))
    masks = sampler_for(grid, levels)(step, 2)
    patches = row_column(masks.targets, grid)  # [B, M, h·w, 2]
    expected = [(matrix @ patches).reshape(2, -1, 2) for matrix in masks.pool]
    assert len(expected) == levels
    centres = row_column(masks.centres, 2 * grid - 1) / 2
    np.testing.assert_allclose(centres, np.concatenate(expected, 1), atol=1e-5)


def ranges(lowest, highest):
    """[low, high] in whole hundredths, so that a bound is met exactly or missed by far."""
    hundredths = st.integers(round(100 * lowest), round(100 * highest))
    return st.tuples(hundredths, hundredths).map(lambda pair: [n / 100 for n in sorted(pair)])


@given(grid=GRIDS, area=ranges(0.05, 0.9), aspect=ranges(0.3, 3))
@settings(max_examples=60)
def test_target_blocks_keep_to_area_and_aspect_wherever_a_rectangle_can(grid, area, aspect):
    fitting = {
        (h, w)
        for h in range(1, grid)
        for w in range(1, grid)
        if area[0] <= h * w / grid**2 <= area[1] and aspect[0] <= h / w <= aspect[1]
    }
    assume(fitting)
    shapes = {(s.height, s.width) for s in target_shapes(grid, area, aspect)}
    assert shapes <= fitting
    assert len(shapes) == min(4, len(fitting))


@pytest.mark.parametrize("grid", range(8, 29))
def test_default_blocks_fit_every_grid(grid, tiny_config):
    masks = tiny_config().masks
    for shape in target_shapes(grid, masks.target_area, masks.target_aspect):
        assert 0.15 <= shape.area / grid**2 <= 0.2
        assert 0.75 <= shape.height / shape.width <= 1.5
    for shape in context_shapes(grid, masks.context_area):
        assert 0.85 <= shape.area / grid**2 <= 1


@given(grid=GRIDS, step=STEPS)
@settings(max_examples=30)
def test_the_context_lies_inside_one_block_of_the_area_asked_for(sampler_for, grid, step):
    sampler = sampler_for(grid, targets=1, context_area=[0.3, 0.5], context_tokens=8)
    for context in row_column(sampler(step, 8).context, grid):
        height, width = context.max(0) - context.min(0) + 1
        assert any(
            s.height >= height and s.width >= width and 0.3 <= s.area / grid**2 <= 0.5
            for s in context_shapes(grid, [0.3, 0.5])
        )


@given(grid=GRIDS, seed=SEEDS, step=STEPS)
@settings(max_examples=30)
def test_masks_depend_on_seed_and_step_and_nothing_else(sampler_for, grid, seed, step):
    masks = sampler_for(grid, seed=seed)(step, 4)
    again = sampler_for(grid, seed=seed)(step, 4)
    for one, other in zip(masks[:3], again[:3], strict=True):
        np.testing.assert_array_equal(one, other)
    for changed in (
        sampler_for(grid, seed=seed)(step + 1, 4),
        sampler_for(grid, seed=seed ^ 1)(step, 4),
    ):
        assert not np.array_equal(masks.context, changed.context)
        assert not np.array_equal(masks.targets, changed.targets)


@pytest.mark.parametrize("grid", [8, 9, 14, 28])
def test_every_patch_is_sometimes_context_and_sometimes_target(sampler_for, grid):
    sampler = sampler_for(grid)
    batches = [sampler(step, 256) for step in range(8)]
    for part in ("context", "targets"):
        seen = np.unique(np.concatenate([getattr(batch, part).ravel() for batch in batches]))
        np.testing.assert_array_equal(seen, np.arange(grid**2))


def test_context_and_targets_prefer_neither_the_top_nor_the_left(sampler_for):
    sampler = sampler_for(14)
    batches = [sampler(step, 256) for step in range(24)]
    for part in ("context", "targets"):
        patches = np.concatenate([getattr(batch, part).ravel() for batch in batches])
        counts = np.bincount(patches, minlength=196).reshape(14, 14)
        for frequency in (counts.sum(1), counts.sum(0)):
            np.testing.assert_allclose(frequency, frequency[::-1], rtol=0.05)


def test_too_many_context_tokens_are_refused_with_a_number_that_works(sampler_for):
    with pytest.raises(UsageError, match=r"context_tokens=60 .*8x8 grid.*4 target blocks") as error:
        sampler_for(8, context_tokens=60)
    most = int(re.search(r"context_tokens to (\d+)", str(error.value))[1])
    assert sampler_for(8, context_tokens=most)(0, 64).context.shape == (64, most)
    with pytest.raises(UsageError, match=f"context_tokens={most + 1}"):
        sampler_for(8, context_tokens=most + 1)


def test_a_grid_too_small_for_blocks_is_refused_with_its_size(sampler_for):
    with pytest.raises(UsageError, match=r"2x2 grid \(image 8, patch 4\).*4x4"):
        sampler_for(2)


def test_a_level_that_repeats_another_is_refused_with_the_depth_that_works(sampler_for):
    with pytest.raises(
        UsageError, match=r"Level 3 pools 8x8.*3x4 on a 8x8 grid.*level_pool=\[1,2,4\],"
    ):
        sampler_for(8, levels=4)
