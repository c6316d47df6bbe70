"""Starting from other weights: what is taken, stretched, left out and refused."""

import json
import re

import mlx.core as mx
import numpy as np
import numpy_reference as reference
import pytest
from commands import NEW, assert_one_line, hjepa
from evaluating import saved as saved_run
from mlx.utils import tree_flatten, tree_unflatten

import hjepa_mlx as hj
from hjepa_mlx import pretrained, weights
from hjepa_mlx.errors import HJEPAError, UsageError
from hjepa_mlx.finetune import Classifier, save
from hjepa_mlx.models.vit import stretched


def randomised(model):
    """The model with weights large enough for every one to be seen in its features."""
    rng = np.random.default_rng(0)
    drawn = {
        name: rng.normal(float("norm" in name and name.endswith("weight")), 0.1, weight.shape)
        for name, weight in tree_flatten(model.parameters())
    }
    model.update(tree_unflatten([(n, mx.array(x.astype(np.float32))) for n, x in drawn.items()]))
    return model


def encoder(model, part="target_encoder."):
    flat = dict(tree_flatten(model.parameters()))
    return {n.removeprefix(part): np.array(w) for n, w in flat.items() if n.startswith(part)}


def saved(path, arrays):
    mx.save_safetensors(str(path), {name: mx.array(x) for name, x in arrays.items()})
    return path


def images(size, count=2):
    return np.random.default_rng(1).integers(0, 256, (count, size, size, 3), np.uint8)


def own_table(config):
    return reference.positions(config.grid, config.grid, config.model.dim)


@pytest.mark.parametrize(
    ("size", "patch", "levels"), [(32, 4, 3), (48, 4, 1), (32, 8, 2), (64, 16, 1), (20, 2, 3)]
)
def test_features_at_another_size_are_those_of_an_independent_network(
    tiny_config, tmp_path, size, patch, levels
):
    parent = randomised(hj.HJEPA(tiny_config()))  # 32 pixels, patches of 4: a grid of 8
    w = encoder(parent)
    path = saved(tmp_path / "w.safetensors", {**w, "pos_embed": own_table(parent.config)[None]})
    config = tiny_config(
        data={"image_size": size}, model={"patch_size": patch, "levels": levels, "init": str(path)}
    )
    child, _ = pretrained.start(config)
    if patch != 4:
        name = "patch_embed.proj.weight"
        w[name] = reference.resampled(w[name], 4, patch)
    table = reference.positions(size // patch, 8, 64)
    own = config.model
    expected = reference.features(images(size), w, table, 2, own.image_mean, own.image_std)
    found = child.target_encoder(child.patches(images(size)), after=[1, 2, 3])
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(np.array(ours), theirs, atol=2e-5)
    assert config.model.positions == ("sincos" if size // patch == 8 else 8)
    for name, array in encoder(child, "context_encoder.").items():
        np.testing.assert_array_equal(array, encoder(child)[name])


def test_a_learned_table_is_stretched_as_pil_does_it_and_trained_on(tiny_config, tmp_path):
    parent = randomised(hj.HJEPA(tiny_config()))
    table = np.random.default_rng(2).normal(0, 0.3, (64, 64)).astype(np.float32)
    token = {"cls_token": np.ones((1, 1, 64), np.float32)}
    with_token = np.concatenate([np.full((1, 64), 9, np.float32), table])[None]
    path = saved(tmp_path / "w.safetensors", {**encoder(parent), **token, "pos_embed": with_token})
    config = tiny_config(data={"image_size": 48}, model={"init": str(path)})
    model, lines = pretrained.start(config)
    assert config.model.positions == "learned"
    planes = table.reshape(8, 8, 64).transpose(2, 0, 1)
    expected = np.stack([reference.resized(plane, 12) for plane in planes], -1).reshape(144, 64)
    for of in (model.context_encoder, model.target_encoder):
        np.testing.assert_allclose(np.array(of.pos_embed), expected, atol=1e-6)
    smaller = np.array(stretched(mx.array(table), 5)).reshape(5, 5, 64)
    np.testing.assert_allclose(smaller[..., 3], reference.resized(planes[3], 5), atol=1e-6)
    assert any(re.search(r"cls_token +1  left out", line) for line in lines)
    step, sampler = hj.Step(model, config), hj.MaskSampler(config)
    before = np.array(model.context_encoder.pos_embed)
    step([(mx.array(images(48, 4)), sampler(0, 4))], hj.Schedule(1e-3, 0.0, 0.9))
    after = np.array(model.context_encoder.pos_embed)
    assert np.abs(after - before).max() > 1e-4
    followed = 0.9 * before + 0.1 * after
    np.testing.assert_allclose(np.array(model.target_encoder.pos_embed), followed, atol=1e-6)


def test_layer_scale_is_folded_into_the_linear_layers(tiny_config, tmp_path):
    model = randomised(hj.HJEPA(tiny_config()))
    w = encoder(model)
    scales = {
        f"blocks.{n}.ls{k}.gamma": np.full(64, 0.5, np.float32) for n in range(3) for k in "12"
    }
    found = weights.read(saved(tmp_path / "w.safetensors", {**w, **scales}))
    for name, array in found.arrays.items():
        scaled = "attn.proj" in name or "mlp.fc2" in name
        np.testing.assert_array_equal(array, w[name] / 2 if scaled else w[name])


def test_every_weight_is_accounted_for(tiny_config, tmp_path):
    parent = hj.HJEPA(tiny_config(model={"depth": 2, "levels": 1}))
    arrays = dict(tree_flatten(parent.parameters()))
    arrays["head.weight"] = mx.zeros((10, 64))
    mx.save_safetensors(str(tmp_path / "w.safetensors"), arrays)
    model = hj.HJEPA(tiny_config(model={"predictor_dim": 128}))
    outcomes = pretrained.put(weights.read(tmp_path / "w.safetensors"), model)
    ours = {name for name, _ in tree_flatten(model.parameters())}
    assert ours | {"head.weight"} <= {name for name, _ in outcomes}
    told = dict(outcomes)
    assert told["context_encoder.blocks.1.norm1.bias"] == "loaded"
    assert told["context_encoder.blocks.2.norm1.bias"] == "starts as new"
    assert told["predictor.embed.weight"] == "left out: [64, 64] there, [128, 64] here"
    assert told["head.weight"] == "left out: there is no such weight here"


def test_a_classifier_s_encoder_is_a_start(tiny_config, tmp_path):
    classifier = Classifier(tiny_config(), ("a", "b"))
    save(classifier, tmp_path / "head", {})
    model = hj.HJEPA(tiny_config(seed=1))
    outcomes = dict(pretrained.put(weights.read(tmp_path / "head"), model))
    assert outcomes["target_encoder.head.bias"] == "left out: there is no such weight here"
    own = dict(tree_flatten(classifier.encoder.parameters()))
    for name, weight in tree_flatten(model.target_encoder.parameters()):
        np.testing.assert_array_equal(weight, own[name])
    with pytest.raises(UsageError, match="is a classifier"):
        hj.load(tmp_path / "head")


def test_heads_of_other_levels_are_left_out_though_they_would_fit(prepared):
    command = "train tiny.yaml --init run --dry-run --set loss.level_weights="
    why = "left out: it predicts other levels"
    assert why not in hjepa(prepared, f"{command}[1,1,1]").stdout
    assert why in hjepa(prepared, f"{command}[0,0,1]").stdout


def test_the_images_predictor_is_left_out_where_another_block_is_predicted(tiny_config, tmp_path):
    image = {"loss": {"level_weights": [0.0, 1.0, 1.0]}}
    pools = {"level_pool": [1, 1, "image"]}
    run = saved_run(hj.HJEPA(tiny_config(**image, model=pools)), tmp_path / "run")
    for last, out in ((3, False), (2, True)):
        config = tiny_config(**image, model=pools | {"level_blocks": [1, 2, last], "init": run})
        lines = "\n".join(pretrained.start(config)[1])
        assert ("left out: it predicts the image after another block" in lines) == out


def test_a_warm_start_at_another_size_goes_on_where_its_parent_was(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    network = ["size=custom", "dim=64", "depth=2", "heads=1", "level_pool=[1]", "patch_size=8"]
    small = [f"model.{setting}" for setting in network]
    small += ["data.limit=400", "run.log_every=25", "optim.warmup_epochs=0", "compile=false"]

    def loss(name, *settings):
        """The mean loss of a run's last 25 steps."""
        run = hj.train(hj.load_config("demo", [*small, f"run.dir={name}", *settings]))
        return run.metrics[-1]["loss"]

    reached = loss("parent", "optim.epochs=5", "optim.lr=2e-3")
    later = ("data.image_size=48", "optim.epochs=2")  # 50 steps, at the recipe's learning rate
    assert loss("warm", "model.init=parent", *later) <= reached
    assert loss("cold", *later) > 1.1 * reached
    assert hj.load("warm").config.model.positions == 4


HEADER = json.dumps({"x": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}).encode()


def file_of(header, data=bytes(16)):
    return len(header).to_bytes(8, "little") + header + data


BROKEN = {
    "a header of 40 GB": ((40 << 30).to_bytes(8, "little") + b"{}", "42,949,672,960 bytes"),
    "cut short": (file_of(HEADER, bytes(15)), "x is cut short"),
    "another shape": (file_of(HEADER.replace(b"[4]", b"[5]")), "x is cut short or has another"),
    "a negative shape": (file_of(HEADER.replace(b"[4]", b"[-2, -2]")), "x is cut short or"),
    "an unknown type": (file_of(HEADER.replace(b"F32", b"F99")), "no safetensors file"),
    "no JSON": (file_of(b"{{"), "no safetensors file"),
    "a list": (file_of(b"[1]"), "no safetensors file"),
    "deep brackets": (file_of(b"[" * 200_000), "no safetensors file"),
    "nothing": (b"", "no safetensors file"),
    "not a number": (file_of(HEADER, np.array([1, 2, np.nan, 4], "<f4").tobytes()), "not finite"),
}


@pytest.mark.parametrize(("content", "says"), BROKEN.values(), ids=BROKEN)
def test_a_broken_file_is_refused_in_one_line(tmp_path, content, says):
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    for place in (path, tmp_path):
        with pytest.raises(HJEPAError, match=says) as error:
            weights.read(place)
        assert str(path) in str(error.value) or str(tmp_path) in str(error.value)
        assert "\n" not in str(error.value)


def test_places_without_weights_and_networks_that_do_not_fit_are_named(prepared, tmp_path):
    command = f"train tiny.yaml --run-dir {tmp_path}/new --init"
    assert_one_line(hjepa(prepared, f"{command} nowhere"), "nowhere", "Give a run")
    assert_one_line(hjepa(prepared, f"{command} pictures"), "no weights in", "Give a run")
    wide = hjepa(prepared, f"{command} run --set model.dim=32")
    assert_one_line(wide, "Nothing of", "[64, 48] there, [32, 48] here", "model.dim")
    assert_one_line(hjepa(prepared, f"{command} run --set model.heads=2"), "set model.heads=1")
    assert not (tmp_path / "new").exists()


def test_a_run_that_started_from_another_is_resumed_without_it(prepared, tmp_path):
    command = f"train tiny.yaml --run-dir {tmp_path}/new --set data.image_size=48 --init"
    first = hjepa(prepared, f"{command} {NEW}")
    assert first.returncode == 0, first.stderr
    assert re.search(r"positions +1  the sin-cos table of 8², stretched over 12²", first.stderr)
    again = hjepa(prepared, f"train {tmp_path}/new --resume")
    assert again.returncode == 0, again.stderr
    assert "Resuming" in again.stderr
    assert "stretched" not in again.stderr
    assert_one_line(
        hjepa(prepared, f"train {tmp_path}/new --resume --init {tmp_path}"), "model.init"
    )


def test_a_config_of_something_else_beside_a_file_is_left_alone(tiny_config, tmp_path):
    path = saved(tmp_path / "w.safetensors", {"conv1.weight": np.ones((3, 3), np.float32)})
    (tmp_path / "config.yaml").write_text("lr: 3")
    assert weights.read(path).config is None
    with pytest.raises(UsageError, match="Unknown config key 'lr'"):
        weights.read(tmp_path)
    (tmp_path / "config.yaml").write_text(tiny_config().to_yaml())
    assert weights.read(path).config is not None


def test_an_unknown_layout_fits_nothing(tiny_config, tmp_path):
    path = saved(tmp_path / "w.safetensors", {"conv1.weight": np.ones((3, 3), np.float32)})
    with pytest.raises(UsageError, match=r"Nothing of .* fits \(other names\)"):
        pretrained.put(weights.read(path), hj.HJEPA(tiny_config()))
