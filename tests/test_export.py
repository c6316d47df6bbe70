"""Encoders for other codes: equal features there and back (torch, timm, …: extra parity)."""

import json
import re

import mlx.core as mx
import numpy as np
import pytest
import yaml
from commands import assert_one_line, hjepa
from test_init import encoder, images, randomised

import hjepa_mlx as hj
from hjepa_mlx import pretrained
from hjepa_mlx.errors import HJEPAError
from hjepa_mlx.export import export

foreign_warnings = pytest.mark.filterwarnings("ignore")  # torch, timm and coremltools have theirs


def furthest(ours, theirs):
    return max(np.abs(np.array(a) - np.array(b)).max() for a, b in zip(ours, theirs, strict=True))


def test_an_export_opens_as_a_network_and_tells_where_it_comes_from(prepared, tmp_path):
    ended = hjepa(prepared, f"export run --to safetensors --out {tmp_path}/out --json -")
    assert ended.returncode == 0, ended.stderr
    told = json.loads(ended.stdout)
    assert told["files"].keys() == {"README.md", "config.yaml", "model.safetensors"}
    assert told["difference"] == 0.0
    model, again = hj.load(prepared / "run"), hj.load(tmp_path / "out")
    assert furthest(model.encode(images(32)), again.encode(images(32))) == 0.0
    _, metadata, text = (tmp_path / "out/README.md").read_text().split("---\n", 2)
    assert yaml.safe_load(metadata)["license"] == "unknown"
    for fact in (
        "64 wide, 3 blocks",
        "8 steps, 2 epochs",
        "the trainer's own",
        "sin-cos table of 8×8",
    ):
        assert fact in text
    assert str(prepared) not in "".join(p.read_text() for p in (tmp_path / "out").glob("*.[my]*"))
    arrays = mx.load(str(tmp_path / "out/model.safetensors"))
    del arrays["blocks.1.mlp.fc1.bias"]
    mx.save_safetensors(str(tmp_path / "out/model.safetensors"), arrays)
    with pytest.raises(HJEPAError, match=r"not a whole export: .*1\.mlp\.fc1\.bias"):
        hj.load(tmp_path / "out")
    started = hjepa(prepared, f"train tiny.yaml --init {tmp_path}/out --dry-run")
    assert re.search(r"target_encoder.blocks 0–2 +35  loaded", started.stdout)
    assert re.search(r"target_encoder.blocks 1–1 +1  starts as new", started.stdout)


def test_scores_are_on_the_card_only_if_they_are_of_this_step(tiny_config):
    from hjepa_mlx.export import shareable
    from hjepa_mlx.export.card import card
    from hjepa_mlx.models.hjepa import Origin

    model = hj.HJEPA(tiny_config(data={"name": "stl10"}))
    model.origin = Origin("run", 8, 2.0)
    scores = {"linear_probe": {"level_0": 71.25}, "knn": {"level_0": 62.5}}
    scores |= {"trained": {"step": 8}, "protocol": {"data": "stl10"}}
    text = card(model, "timm", "context", scores, "mit")
    assert "| level 0 | 62.5 | 71.2 |" in text
    assert "license: mit" in text
    model.config.data.labels = "/home/me/labels.csv"
    assert "/home/me" not in shareable(model.config).to_yaml()
    assert "Cite Coates" in text
    assert "62.5" not in card(model, "timm", "context", scores | {"trained": {"step": 7}})


def test_what_cannot_be_exported_is_said_in_one_line(prepared, tmp_path):
    command = f"export run --out {tmp_path}/out --to"
    assert_one_line(hjepa(prepared, f"{command} keras"), "No format 'keras'", "timm, transformers")
    assert_one_line(hjepa(prepared, f"{command} timm --encoder best"), "No encoder 'best'")
    assert_one_line(hjepa(prepared, f"export run --to timm --out {tmp_path}"), "exists already")
    assert_one_line(hjepa(prepared, "export pictures --to timm"), "is not a run")
    assert not list(tmp_path.iterdir())


def test_a_library_that_is_missing_is_named_with_its_extra(tiny_config, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "timm", None)
    with pytest.raises(HJEPAError, match=r"needs timm: pip install 'hjepa-mlx\[export\]'"):
        export(hj.HJEPA(tiny_config()), "timm", tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_features_that_differ_leave_no_export(tiny_config, tmp_path, monkeypatch):
    model = randomised(hj.HJEPA(tiny_config()))
    read = pretrained.put

    def spoil(found, other, whole):
        read(found, other, whole)
        other.target_encoder.norm.bias = other.target_encoder.norm.bias + 0.01

    monkeypatch.setattr(pretrained, "put", spoil)
    with pytest.raises(HJEPAError, match=r"its features differ by 1\.0e-02"):
        export(model, "safetensors", tmp_path / "out")
    assert not list(tmp_path.iterdir())


CASES = {
    "sin-cos": {},
    "stretched": {"model": {"positions": 5}},
    "learned": {"model": {"positions": "learned"}},
    "two levels after the last block": {
        "model": {"levels": 2, "level_blocks": [3, 3], "level_pool": [1, 4]},
        "data": {"image_size": 40},
    },
}


@pytest.mark.parity
@foreign_warnings
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("to", ["timm", "transformers", "safetensors"])
def test_an_encoder_comes_back_as_it_went(tiny_config, tmp_path, record_property, to, case):
    if to != "safetensors":
        pytest.importorskip(to)
    model = randomised(hj.HJEPA(tiny_config(**CASES[case])))
    for part in ("target", "context"):
        there = export(model, to, tmp_path / part, part)
        record_property(f"{part}, {to} against MLX", there.difference)
        assert there.difference < 1e-5
        size = model.config.data.image_size
        back = hj.load(tmp_path / part)
        difference = furthest(model.encode(images(size), part), back.encode(images(size)))
        record_property(f"{part}, back from {to}", float(difference))
        assert difference < 1e-5


@pytest.mark.parity
@foreign_warnings
@pytest.mark.parametrize("to", ["onnx", "coreml"])
def test_an_encoder_is_converted(tiny_config, tmp_path, record_property, to):
    pytest.importorskip({"onnx": "onnxscript", "coreml": "coremltools"}[to])
    model = randomised(hj.HJEPA(tiny_config()))
    there = export(model, to, tmp_path / "out")
    record_property("difference", there.difference)
    assert there.difference < 1e-5
    if to == "onnx":
        import onnxruntime

        session = onnxruntime.InferenceSession(str(tmp_path / "out/model.onnx"))
        x = images(32, 3).transpose(0, 3, 1, 2).astype(np.float32)  # another batch size
        found = session.run(None, {"images": x})
        assert furthest(model.encode(images(32, 3)), found) < 1e-5


@pytest.mark.parity
@foreign_warnings
def test_the_five_lines_of_the_card_give_our_features(tiny_config, tmp_path):
    torch = pytest.importorskip("torch")
    pytest.importorskip("timm")
    from PIL import Image

    model = randomised(hj.HJEPA(tiny_config()))
    picture = Image.fromarray(images(32, 1)[0])
    expected = np.array(model.target_encoder(model.patches(images(32, 1)))[0])
    for to in ("timm", "transformers"):
        export(model, to, tmp_path / to)
        code = (tmp_path / to / "README.md").read_text().split("```python\n")[1].split("```")[0]
        code = code.replace("FOLDER", str(tmp_path / to))
        assert len(code.splitlines()) == 5
        names = {"picture": picture}
        with torch.no_grad():
            exec(code, names)
        found = np.array(names["features"])
        np.testing.assert_allclose(found, expected, atol=1e-4)


def test_mlx_reads_what_bfloat16_files_hold(tiny_config, tmp_path):
    model = randomised(hj.HJEPA(tiny_config()))
    arrays = {name: mx.array(x).astype(mx.bfloat16) for name, x in encoder(model).items()}
    arrays["pos_embed"] = model.target_encoder.positions(8).astype(mx.bfloat16)
    mx.save_safetensors(str(tmp_path / "w.safetensors"), arrays)
    config = tiny_config(model={"init": str(tmp_path / "w.safetensors")})
    found, _ = pretrained.start(config)
    assert config.model.positions == "sincos"  # though rounded
    for name, array in encoder(found).items():
        np.testing.assert_allclose(array, encoder(model)[name], rtol=2**-8)
