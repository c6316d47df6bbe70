"""Weights of timm, transformers and I-JEPA here: the same features (extra: parity)."""

import numpy as np
import pytest
from test_export import foreign_warnings
from test_init import encoder, images, randomised

import hjepa_mlx as hj
from hjepa_mlx import pretrained, weights
from hjepa_mlx.errors import HJEPAError


def randomised_torch(torch, network):
    torch.manual_seed(0)
    for name, parameter in network.named_parameters():
        scale = "norm" in name and name.endswith("weight")
        torch.nn.init.normal_(parameter, 1.0 if scale else 0.0, 0.05)
    return network.eval()


def ours_from(place, size=224):
    small = ["model.size=small", f"data.image_size={size}", f"model.init={place}"]
    return pretrained.start(hj.load_config("imagenet100", small))[0]


def normalised(model, pictures):
    own = model.config.model
    x = (pictures / 255 - np.array(own.image_mean)) / np.array(own.image_std)
    return x.transpose(0, 3, 1, 2).astype(np.float32)


def difference(model, expected, part="target"):
    pictures = images(model.config.data.image_size)
    found = getattr(model, f"{part}_encoder")(model.patches(pictures))[0]
    return float(np.abs(np.array(found) - expected).max())


@pytest.mark.parity
@foreign_warnings
@pytest.mark.parametrize("token", [False, True])
@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
def test_timm_s_vit_small_gives_its_features_here(tmp_path, record_property, token, suffix):
    """With a class token: what timm's own network gives without it, which is how it is read."""
    torch, timm = pytest.importorskip("torch"), pytest.importorskip("timm")
    from safetensors.torch import save_file

    name, how = "vit_small_patch16_224", {"global_pool": "", "num_classes": 0, "init_values": 0.1}
    network = randomised_torch(torch, timm.create_model(name, class_token=token, **how))
    state, path = network.state_dict(), tmp_path / f"vit.{suffix}"
    if suffix == "pth":
        torch.save({"model": state, "epoch": 3}, path)
    else:
        save_file(state, path)
    if token:
        without = timm.create_model(name, class_token=False, **how).eval()
        state["pos_embed"] = state["pos_embed"][:, 1:]
        del state["cls_token"]
        without.load_state_dict(state)
        network = without
    model = ours_from(path)
    assert model.config.model.positions == "learned"
    x = torch.from_numpy(normalised(model, images(224)))
    with torch.no_grad():
        expected = network.forward_features(x).numpy()
    record_property("difference", difference(model, expected))
    assert difference(model, expected) < 1e-5


@pytest.mark.parity
@foreign_warnings
@pytest.mark.parametrize("fixed", [False, True])
def test_transformers_ijepa_gives_its_features_here(tmp_path, record_property, fixed):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    config = transformers.IJepaConfig(
        hidden_size=384, num_attention_heads=6, intermediate_size=1536, layer_norm_eps=1e-6
    )
    network = randomised_torch(torch, transformers.IJepaModel(config))
    if fixed:  # as published
        table = np.array(hj.HJEPA(hj.load_config("imagenet100")).target_encoder.positions(14))
        network.embeddings.position_embeddings.data = torch.from_numpy(table)[None]
    network.save_pretrained(tmp_path / "saved")
    torch.save(network.state_dict(), tmp_path / "state.bin")  # other names from version 5 on
    x = None
    for place in (tmp_path / "saved", tmp_path / "state.bin"):
        model = ours_from(place)
        assert model.config.model.positions == ("sincos" if fixed else "learned")
        x = torch.from_numpy(normalised(model, images(224)))
        with torch.no_grad():
            expected = network(x).last_hidden_state.numpy()
        record_property("difference", difference(model, expected))
        assert difference(model, expected) < 1e-5
    config.num_attention_heads = 12
    config.save_pretrained(tmp_path / "saved")
    with pytest.raises(HJEPAError, match=r"has 12 attention heads: set model\.heads=12"):
        ours_from(tmp_path / "saved")


@pytest.mark.parity
@foreign_warnings
def test_i_jepa_s_own_checkpoint_gives_each_encoder_its_weights(tiny_config, tmp_path):
    torch = pytest.importorskip("torch")
    parent = randomised(hj.HJEPA(tiny_config()))
    table = np.array(parent.target_encoder.positions(8))[None]

    def theirs(part):
        w = {**encoder(parent, f"{part}_encoder."), "pos_embed": table}
        kernel = w["patch_embed.proj.weight"].reshape(-1, 4, 4, 3).transpose(0, 3, 1, 2)
        w["patch_embed.proj.weight"] = kernel
        return {f"module.{name}": torch.tensor(np.array(x)) for name, x in w.items()}

    content = {
        "encoder": theirs("context"),
        "target_encoder": theirs("target"),
        "predictor": {"module.predictor_embed.weight": torch.zeros(8, 64)},
        "opt": {"state": {0: {"exp_avg": torch.zeros(3)}}},
        "epoch": 300,
    }
    torch.save(content, tmp_path / "jepa-latest.pth.tar")
    model, lines = pretrained.start(
        tiny_config(model={"init": str(tmp_path / "jepa-latest.pth.tar")})
    )
    for part in ("context_encoder.", "target_encoder."):
        for name, array in encoder(parent, part).items():
            np.testing.assert_array_equal(encoder(model, part)[name], array)
    assert any("predictor.predictor_embed" in line and "left out" in line for line in lines)


class Evil:
    def __reduce__(self):
        return print, ("This must not run.",)


@pytest.mark.parity
@foreign_warnings
def test_a_pickle_that_would_run_code_is_refused_by_name(tmp_path, capsys):
    torch = pytest.importorskip("torch")
    torch.save({"model": {"pos_embed": torch.zeros(3)}, "hook": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(HJEPAError, match=r"evil.pth is refused: opening it would run \S*print"):
        weights.read(tmp_path / "evil.pth")
    assert "must not run" not in capsys.readouterr().out
    torch.save({"model": {"pos_embed": torch.zeros(3)}}, tmp_path / "cut.pth")
    whole = (tmp_path / "cut.pth").read_bytes()
    torch.save([1, {2: 3}], tmp_path / "list.pth")
    other = (tmp_path / "list.pth").read_bytes()
    for content in (whole[: len(whole) // 2], b"", b"<html>", other):
        (tmp_path / "cut.pth").write_bytes(content)
        with pytest.raises(HJEPAError, match=r"cut\.pth is damaged"):
            weights.read(tmp_path / "cut.pth")


@pytest.mark.parity
@foreign_warnings
def test_a_patch_embedding_is_resampled_as_timm_does_it(record_property):
    torch = pytest.importorskip("torch")
    timm = pytest.importorskip("timm")
    w = np.random.default_rng(0).normal(0, 1, (8, 16 * 16 * 3)).astype(np.float32)
    kernel = torch.from_numpy(w.reshape(8, 16, 16, 3).transpose(0, 3, 1, 2).copy())
    worst = 0.0
    for patch in (8, 14, 20, 32):
        theirs = timm.layers.resample_patch_embed(kernel, [patch, patch], interpolation="bilinear")
        expected = theirs.numpy().transpose(0, 2, 3, 1).reshape(8, -1)
        found = pretrained.resampled(w, patch)
        worst = max(worst, float(np.abs(found - expected).max() / np.abs(expected).max()))
    record_property("worst", worst)
    assert worst < 1e-5
