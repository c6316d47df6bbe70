"""Weights in long arrays: nothing is lost or mixed up, and a model's own parts are trained too."""

from math import prod

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from test_step import VALUES, batch

import hjepa_mlx as hj
from hjepa_mlx.flat import ROW, Layout
from hjepa_mlx.step import Step


class WithScale(hj.HJEPA):
    """H-JEPA with a module and a number of its own."""

    def __init__(self, config):
        super().__init__(config)
        self.scale = mx.ones(1)
        self.extra = nn.Linear(64, 64)

    def predict(self, *inputs):
        predictions, context = super().predict(*inputs)
        return [self.extra(self.scale * part) for part in predictions], context


def named(parts):
    return dict(tree_flatten(parts))


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("most", [20_000, 10**9])
def test_weights_come_back_as_they_were_joined(tiny_config, monkeypatch, most, stacked):
    monkeypatch.setattr("hjepa_mlx.flat.MOST", most)
    monkeypatch.setattr("hjepa_mlx.flat.backend.on_gpu", lambda: False)
    parts = hj.HJEPA(tiny_config()).parameters()
    layout = Layout(parts, stacked)
    joined = layout.join(parts)
    kinds = joined["context_encoder"].keys()
    assert any(kind.endswith(" 1") for kind in kinds) == (most < 10**9)
    assert any(kind.startswith("stack") for kind in kinds) == stacked
    for part, arrays in joined.items():
        total = {True: 0, False: 0}
        for _, weight in tree_flatten(parts[part]):
            total[weight.ndim > 1] += weight.size
        assert arrays["vectors"].shape == (total[False],)
        for kind in arrays.keys() - {"vectors"}:
            sizes = [prod(shape) for shape in layout.shapes[part][kind].values()]
            total[True] -= sum(sizes)
            assert sum(sizes) <= most + max(sizes)
            if kind.startswith("stack"):
                (shape,) = {*layout.shapes[part][kind].values()}
                assert arrays[kind].shape == (len(sizes), *shape[::-1])
                continue
            assert arrays[kind].shape == (-(-sum(sizes) // ROW), ROW)
            assert not np.array(arrays[kind]).ravel()[sum(sizes) :].any()
        assert total[True] == 0
    expected = named(parts)
    found = named(layout.split(joined))
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        np.testing.assert_array_equal(found[name], weight, err_msg=name)


def test_a_model_s_own_parts_are_trained_and_frozen_ones_are_not(tiny_config):
    config = tiny_config(optim={"grad_clip": 0.0})
    model = WithScale(config)
    model.context_encoder.patch_embed.freeze()
    before = {name: np.array(weight) for name, weight in named(model.parameters()).items()}
    step = Step(model, config)
    for number in range(2):
        step([batch(step, number)], VALUES)
    moved = {name for name, w in named(model.parameters()).items() if (before[name] != w).any()}
    still = before.keys() - moved
    assert {"scale", "extra.weight", "extra.bias", "predictor.mask_token"} <= moved
    assert still == {
        f"{part}_encoder.patch_embed.proj.{kind}"
        for part in ("context", "target")
        for kind in ("weight", "bias")
    }


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_frozen_and_lone_parts_of_the_context_encoder_do_not_stop_training(
    tiny_config, precision, compiled
):
    config = tiny_config(precision=precision, compile=compiled)
    dtypes = []

    class Watched(hj.HJEPA):
        def predict(self, *inputs):
            predictions, context = super().predict(*inputs)
            dtypes.append(context.dtype)
            return predictions, context

    for part in ("patch_embed", "whole", "lone"):
        model = Watched(config)
        frozen = model.context_encoder
        if part == "lone":
            model.context_encoder.lone = nn.BatchNorm(4)
        else:
            (frozen if part == "whole" else frozen.patch_embed).freeze()
        step = Step(model, config)
        before = np.array(model.target_encoder.blocks[0].mlp.fc1.weight)
        for number in range(2):
            metrics = step([batch(step, number)], VALUES)
        assert np.isfinite(metrics["loss"].item())
        moved = (np.array(model.target_encoder.blocks[0].mlp.fc1.weight) != before).any()
        assert moved == (part != "whole")
    assert set(dtypes) == {getattr(mx, precision)}


@pytest.mark.parametrize("part", ["predictor", "context_encoder"])
def test_weights_changed_from_outside_count_once_they_are_adopted(tiny_config, part):
    step = Step(hj.HJEPA(tiny_config()), tiny_config())
    step.model[part].norm.weight = 2 * step.model[part].norm.weight
    step.adopt()
    step([batch(step, 0)], VALUES._replace(lr=0.0, momentum=1.0))
    assert (np.array(step.model[part].norm.weight) == 2).all()
