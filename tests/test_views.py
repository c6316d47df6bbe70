"""Views: small crops, coloured; and the image level, predicted from contexts and views."""

import mlx.core as mx
import numpy as np
import pytest
from PIL import Image, ImageEnhance
from scipy.ndimage import gaussian_filter
from test_step import batch, run, weights

from hjepa_mlx import whitening
from hjepa_mlx.errors import UsageError
from hjepa_mlx.masks import MaskSampler
from hjepa_mlx.models.hjepa import HJEPA
from hjepa_mlx.step import Step, as_arrays
from hjepa_mlx.views import LUMA, SHARP, Views, _colours, draw, render

IMAGE_LEVEL = {"levels": 3, "level_blocks": [1, 3, 3], "level_pool": [1, 2, "image"]}


@pytest.fixture
def image_config(tiny_config):
    """A function from config changes to a config that predicts the image level too."""

    def build(model={}, **changes):  # noqa: B006
        views = {"count": 1, **changes.pop("views", {})}
        return tiny_config(model={**IMAGE_LEVEL, **model}, views=views, **changes)

    return build


def photographs(count=2, size=64):
    """Smooth random pictures, whose colours stay within 70 and 140."""
    rng = np.random.default_rng(0)
    coarse = [Image.fromarray(rng.integers(70, 141, (9, 9, 3), np.uint8)) for _ in range(count)]
    return np.stack([np.asarray(image.resize((size, size))) for image in coarse])


def as_drawn(boxes, **changes):
    """Views of these boxes, unchanged but for what is given."""
    count = len(boxes)
    plain = Views(
        np.array(boxes, np.float32),
        np.zeros(count, np.float32),
        np.full(count, SHARP, np.float32),
        np.broadcast_to(np.eye(3, dtype=np.float32), (count, 3, 3)),
        np.zeros(count, np.float32),
    )
    return plain._replace(**{k: np.array(v, np.float32) for k, v in changes.items()})


def rendered(images, views, size):
    return np.array(render(mx.array(images), tuple(map(mx.array, views)), size))


def test_a_view_is_what_pil_cuts_out_and_shrinks():
    noise = np.random.default_rng(1).integers(0, 256, (2, 64, 64, 3), np.uint8)
    config = {"size": 16, "boxes": [(0.1, 0.2, 0.6, 0.5), (0.0, 0.0, 1.0, 1.0),
                                    (0.7, 0.55, 0.3, 0.4), (0.33, 0.01, 0.2, 0.15)]}  # fmt: skip
    views = rendered(noise, as_drawn(config["boxes"]), config["size"])
    for number, (top, left, height, width) in enumerate(config["boxes"]):
        box = tuple(64 * edge for edge in (left, top, left + width, top + height))
        image = Image.fromarray(noise[number // 2])  # two views an image
        expected = image.resize((16, 16), Image.Resampling.BILINEAR, box=box)
        assert np.abs(views[number] - np.asarray(expected)).max() < 1.5, number  # PIL rounds twice


def test_a_mirrored_view_is_its_mirror_image():
    images, boxes = photographs(), [(0.1, 0.2, 0.6, 0.5)] * 2
    plain, mirrored = (rendered(images, as_drawn(boxes, mirrored=[m] * 2), 16) for m in (0, 1))
    np.testing.assert_allclose(mirrored, plain[:, :, ::-1], atol=1e-3)


def test_blur_is_a_gaussian_of_its_deviation():
    images, boxes = photographs(), [(0, 0, 1, 1)] * 2
    sharp, blurred = (rendered(images, as_drawn(boxes, blur=[b] * 2), 32) for b in (SHARP, 0.9))
    expected = gaussian_filter(sharp, (0, 0.9, 0.9, 0), mode="constant", truncate=8)
    inside = np.s_[:, 5:-5, 5:-5]
    np.testing.assert_allclose(blurred[inside], expected[inside], atol=0.05)


def test_colours_change_as_pil_s_enhancers_change_them(image_config):
    images, boxes = photographs(), [(0, 0, 1, 1)] * 2
    config = image_config(views={"colour": 0.4})
    rng, count = np.random.default_rng(3), 2
    views = draw(rng, config, count)
    # the numbers that were drawn, taken back from the maps
    luma = LUMA.astype(np.float32)
    scale = np.einsum("vij,j->vi", views.colour, np.ones(3))[:, 0]  # contrast · brightness
    brightness = scale + views.grey
    coloured = rendered(images, as_drawn(boxes, colour=views.colour, grey=views.grey), 64)
    for number in range(count):
        image = ImageEnhance.Brightness(Image.fromarray(images[number])).enhance(brightness[number])
        image = ImageEnhance.Contrast(image).enhance(scale[number] / brightness[number])
        # saturation and hue leave the luma as it is
        difference = (coloured[number] - np.asarray(image, np.float32)) @ luma
        assert np.abs(difference).max() < 2.0  # PIL rounds to whole levels each time


def test_half_a_turn_of_the_hue_turns_colours_into_their_complements(image_config, monkeypatch):
    monkeypatch.setattr("hjepa_mlx.views.JITTER", (0, 0, 0, 0.5))
    rng = type("Ones", (), {"uniform": lambda *_: np.ones((4, 1)), "random": lambda *_: np.ones(1)})
    matrix, _ = _colours(rng(), 1, 1.0, 0.0)
    colour = np.array([200.0, 40.0, 90.0])
    luma = colour @ LUMA
    np.testing.assert_allclose(matrix[0] @ colour, 2 * luma - colour, rtol=1e-3)


def test_views_without_colour_are_grey(image_config):
    views = draw(np.random.default_rng(0), image_config(views={"grey": 1.0}), 2)
    seen = rendered(photographs(), views, 16)
    assert np.ptp(seen, axis=-1).max() < 0.5


def test_views_are_inside_the_image_and_as_large_as_asked(image_config):
    config = image_config(views={"area": [0.2, 0.5], "count": 3})
    top, left, height, width = draw(np.random.default_rng(0), config, 100).boxes.T
    assert len(top) == 300
    assert min(top.min(), left.min()) >= 0
    assert max((top + height).max(), (left + width).max()) <= 1 + 1e-6
    assert 0.19 < (height * width).min() < 0.25
    assert 0.45 < (height * width).max() <= 0.5 + 1e-6


def test_views_come_from_the_seed_and_the_step_and_leave_the_masks_as_they_are(
    image_config, tiny_config
):
    config = image_config()
    (once, again), other = (
        [MaskSampler(config)(step, 4) for _ in range(n)] for step, n in ((5, 2), (6, 1))
    )
    for field, value in once.views._asdict().items():
        np.testing.assert_array_equal(value, getattr(again.views, field))
    assert not np.array_equal(once.views.boxes, other[0].views.boxes)
    without = MaskSampler(tiny_config(model={**IMAGE_LEVEL, "level_pool": [1, 2, 4]}))(5, 4)
    assert without.views is None
    np.testing.assert_array_equal(without.context, once.context)


def test_the_image_level_is_learned_beside_the_masked_ones(image_config):
    config = image_config(optim={"lr": 1e-3}, loss={"vicreg": 0.2})
    step = Step(HJEPA(config), config)
    before = weights(step)
    first = run(step, 0)
    assert {"loss_level_2", "vicreg_image"} <= first.keys()
    for name, weight in weights(step).items():
        if name.endswith("weight"):
            assert not np.array_equal(weight, before[name]), name
    last = run(step, *[0] * 30)
    assert last["loss_level_2"] < 0.8 * first["loss_level_2"]


def test_an_image_level_of_weight_0_costs_nothing(image_config):
    config = image_config(loss={"level_weights": [1, 1, 0]})
    step = Step(HJEPA(config), config)
    assert batch(step, 0)[1].views is None
    assert "image_predictor" not in step.model
    assert [x.shape for x in step.model.encode(np.zeros((1, 32, 32, 3), np.uint8))][2] == (1, 1, 64)


def test_the_image_level_alone_needs_no_predictor_of_masked_cells(image_config):
    config = image_config(loss={"level_weights": [0, 0, 1], "vicreg": 0.2})
    step = Step(HJEPA(config), config)
    assert "predictor" not in step.model
    metrics = run(step, 0)
    assert {key for key in metrics if key.startswith("loss_")} == {"loss_level_2"}


def test_the_target_of_the_image_is_the_mean_over_the_picture(image_config):
    config = image_config()
    model = HJEPA(config)
    images = photographs(2, 32)
    masks = MaskSampler(config)(0, 2)
    pool = tuple(map(mx.array, masks.pool))
    target = model.targets(model.patches(images), mx.array(masks.targets), pool)[-1]
    mean = np.array(model.encode(images)[-1])  # [B, 1, D]
    mean -= mean.mean(-1, keepdims=True)
    np.testing.assert_allclose(
        target, mean / np.sqrt(mean.var(-1, keepdims=True) + 1e-5), atol=1e-4
    )


def test_targets_of_the_image_are_white_after_some_batches():
    rng, D = np.random.default_rng(0), 48
    mix = rng.normal(0, 1, (D, D)) * np.geomspace(1, 0.05, D)
    moments, seen = whitening.start(D), []
    for _ in range(400):
        batch = (rng.normal(0, 1, (64, D)) @ mix + 3).astype(np.float32)
        seen.append(np.array(whitening.whitened(mx.array(batch), moments)))
    values = np.linalg.eigvalsh(np.cov(np.concatenate(seen[-200:]).T))
    assert values.mean() == pytest.approx(1, abs=0.05)
    assert values.max() / np.median(values) < 1.5
    assert np.abs(np.concatenate(seen[-200:]).mean(0)).max() < 0.1


def test_the_inverse_root_is_numpy_s():
    rng = np.random.default_rng(0)
    axes = np.linalg.qr(rng.normal(size=(384, 384)))[0]
    values = np.geomspace(1, 2.6e-5, 384)  # the least that RIDGE leaves
    matrix = (axes * values) @ axes.T
    found = np.array(whitening.inverse_root(mx.array(matrix.astype(np.float32))))
    expected = (axes / np.sqrt(values)) @ axes.T
    assert np.linalg.norm(found - expected) < 0.01 * np.linalg.norm(expected)


def test_the_image_is_predicted_from_the_contexts_alone_where_there_are_no_views(image_config):
    config = image_config(views={"count": 0}, loss={"vicreg": 0.2})
    step = Step(HJEPA(config), config)
    metrics = run(step, 0)
    assert "loss_level_2" in metrics
    assert "vicreg_image" not in metrics
    assert "projector" not in step.model
    assert batch(step, 0)[1].views is None
    with pytest.raises(UsageError, match=r"views\.count=0: the image needs a view"):
        image_config(views={"count": 0}, loss={"level_weights": [0, 0, 1]})


def test_no_step_with_views_is_traced_anew_after_the_block_shapes(image_config):
    config = image_config(compile=True, views={"colour": 0.5, "grey": 0.2, "blur": 0.5})
    step = Step(HJEPA(config), config)
    shapes = len(MaskSampler(config).shapes)
    seen = [run(step, number) and step.traces for number in range(30)]
    assert seen[-1] <= shapes


@pytest.mark.parametrize(("size", "smaller", "grid"), [(32, 16, 2), (48, 32, 4), (48, 20, 2)])
def test_a_smaller_image_has_smaller_views(image_config, size, smaller, grid):
    config = image_config(data={"image_size": size}, views={"size": size // 8 * 4})
    at = config.at_size(smaller)
    assert (at.views.size, at.view_grid) == (4 * grid, grid)
    step = Step(HJEPA(config), config)
    drawn = tuple(map(mx.array, MaskSampler(config)(0, 2).views))
    images = mx.zeros((2, smaller, smaller, 3), mx.uint8)
    assert step.model.views(images, drawn).shape == (2, at.view_grid**2, 48)


def test_three_views_an_image_are_the_mean_of_single_ones(image_config):
    config = image_config(views={"count": 2}, loss={"level_weights": [0, 0, 1]})
    step = Step(HJEPA(config), config)
    images, masks = batch(step, 0)
    whole = step.compute_gradients(images, *as_arrays(masks))
    parts = []
    for number in (0, 1):
        step.moments.update(whitening.start(64))  # as they were
        views = Views(*(field[number::2] for field in masks.views))
        parts.append(step.compute_gradients(images, *as_arrays(masks._replace(views=views))))
    mean = (parts[0][0]["loss"] + parts[1][0]["loss"]) / 2
    assert whole[0]["loss"].item() == pytest.approx(mean.item(), rel=1e-5)
