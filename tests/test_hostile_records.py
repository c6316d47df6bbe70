"""Hostile weights, configs and records: refused in one line, in little memory and time."""

import contextlib
import json
import os
import struct
from pathlib import Path

import mlx.core as mx
import pytest
import servers
from layouts import holes, saved

from hjepa_mlx import checkpoint, recipes, weights
from hjepa_mlx.cli.common import _line_and_status, _plain
from hjepa_mlx.data import download
from hjepa_mlx.data.folder import open_folder
from hjepa_mlx.data.listing import scan
from hjepa_mlx.errors import HJEPAError, UsageError
from hjepa_mlx.files import read, read_json
from hjepa_mlx.sections import Data

# Weights and checkpoints


def safetensors(path: Path, header: object, body: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + body)
    return path


HEADERS = {
    "the same bytes many times": {
        str(n): {"dtype": "U8", "shape": [1000], "data_offsets": [0, 1000]} for n in range(100)
    },
    "a million axes": {"a": {"dtype": "U8", "shape": [1 << 31] * 10**6, "data_offsets": [0, 1000]}},
    "nested": b'{"a":' + b"[" * 100_000,
    "no offsets": {"a": {"dtype": "U8", "shape": [1], "data_offsets": []}},
}


@pytest.mark.parametrize("header", HEADERS.values(), ids=HEADERS)
def test_a_hostile_safetensors_header_is_refused(tmp_path, header):
    with pytest.raises(HJEPAError, match="is damaged"):
        checkpoint.read_safetensors(safetensors(tmp_path / "a.safetensors", header, bytes(1000)))


def test_a_tensor_that_is_larger_than_its_file_is_refused(tmp_path):
    torch = pytest.importorskip("torch")
    torch.save({"blocks.0.norm1.weight": torch.zeros(1).expand(10**12)}, tmp_path / "a.pth")
    with pytest.raises(HJEPAError, match="is damaged"):
        weights.read(tmp_path / "a.pth")


STATE = {
    "format": 1, "step": 8, "epoch": 2.0, "images": 36, "position": [1, 0], "own_parts": {},
    "window": [{"loss": 1.0}], "random_state": [1, 2], "loss_scale": {}, "sha256": {},
}  # fmt: skip


def test_every_key_of_a_checkpoint_s_state_has_its_type(tmp_path):
    def read_with(**changes):
        (tmp_path / "state.json").write_text(json.dumps(STATE | changes))
        return checkpoint.read_state(tmp_path)

    assert read_with()["step"] == 8
    for key in STATE.keys() - {"format"}:
        with pytest.raises(HJEPAError, match=f"state.json cannot be read .*{key}.* Delete that"):
            read_with(**{key: "x"})
    (tmp_path / "state.json").write_bytes(b"[" * 100_000)
    with pytest.raises(HJEPAError, match="nested too deeply"):
        checkpoint.read_state(tmp_path)


def test_a_resumed_optimizer_is_that_of_the_weights(tmp_path, tiny_config):
    from hjepa_mlx.models.hjepa import HJEPA
    from hjepa_mlx.step import Step

    config = tiny_config()
    step = Step(HJEPA(config), config)
    kept = {key: STATE[key] for key in ("epoch", "images", "position", "own_parts", "window")}
    path = checkpoint.save(tmp_path, step, 1, kept, 1)
    checkpoint.restore(path, step)
    mx.save_safetensors(str(path / "optimizer.safetensors"), {"step": mx.zeros(3)})
    state = json.loads((path / "state.json").read_text())
    state["sha256"]["optimizer.safetensors"] = checkpoint.sha256(path / "optimizer.safetensors")
    (path / "state.json").write_text(json.dumps(state))
    with pytest.raises(HJEPAError, match="belongs to other weights"):
        checkpoint.restore(path, step)
    with pytest.raises(HJEPAError, match="has no learning rate"):
        checkpoint.learning_rate(path)


# Configs, lists and records


def test_a_config_of_many_aliases_or_of_deep_nesting_is_no_yaml(tmp_path):
    few = "data: {crop_scale: &a [0.5, 1.0]}\nfinetune: {crop_scale: *a}"
    twice = "".join(f"x{n}: &x{n} [{', '.join([f'*x{n - 1}'] * 9)}]\n" for n in range(1, 10))
    path = tmp_path / "a.yaml"
    path.write_text(few)
    assert recipes.load_config(path).finetune.crop_scale == [0.5, 1.0]
    odd = ("seed: !!bool x", "seed: !!timestamp x", "a: " + "[" * 20_000, "a: 1\n" + "#" * 10**6)
    for text in ("x0: &x0 [1]\n" + twice, *odd):
        path.write_text(text)
        with pytest.raises(HJEPAError, match=r"is not valid YAML|is larger than"):
            recipes.load_config(path)


@pytest.mark.parametrize(
    "override",
    ["data.image_size=100000", "model.depth=100000", "model.dim=1000000", "data.workers=100000",
     "data.image_size=4096", f"name=[{'[1],' * 10_000}]"],
)  # fmt: skip
def test_a_size_beyond_all_measure_is_refused_in_a_short_line(override):
    with pytest.raises(UsageError) as error:
        recipes.load_config("demo", [override])
    assert len(str(error.value)) < 600


def test_the_home_of_nobody_is_a_folder_that_does_not_exist():
    assert recipes.load_config("demo", ["data.dir=~no-such-user/x"]).data.dir.endswith("-user/x")


def test_what_has_no_end_or_many_holes_is_not_read(tmp_path):
    large = holes(tmp_path / "a.txt", 10**11)
    for path in (large, Path("/dev/zero")):
        with pytest.raises(HJEPAError, match="too large for its kind"):
            read(path)
    with pytest.raises(HJEPAError, match="too large for its kind"):
        scan([large])
    large.write_bytes(b"[" * 100_000)
    with pytest.raises(ValueError, match="nested too deeply"):
        read_json(large)


def test_a_damaged_record_of_a_run_s_images_is_named(tmp_path):
    for number in range(12):
        (tmp_path / f"{number}.jpg").write_bytes(saved("JPEG"))
    for text in ("", "[]", '{"train": 5, "test": []}', '{"train": [[]], "test": []}'):
        (tmp_path / "images.json").write_text(text)
        with pytest.raises(HJEPAError, match=r"images\.json is damaged"):
            open_folder(Data(dir=str(tmp_path)), tmp_path / "images.json")


def test_a_message_is_one_line_without_control_characters():
    assert _plain("a\nb\x1b[31mé\udcff ×") == "a\\nb\\x1b[31mé\\udcff ×"
    assert _plain("a" * 10**6 + " is gone. Do this.").endswith("aaa is gone. Do this.")
    assert len(_plain("\0" * 10**6)) < 4000
    assert _line_and_status(MemoryError()) == ("There is too little memory for this.", 1)


def test_a_download_never_grows_larger_than_the_file_should_be(tmp_path, monkeypatch):
    sizes = []

    def md5_of(file):
        sizes.append(os.fstat(file.fileno()).st_size)
        return "another"

    monkeypatch.setattr(download, "md5_of", md5_of)

    def endless(handler, content, start):
        handler.answer(content, length="none", Connection="close")
        with contextlib.suppress(OSError):
            while True:
                handler.wfile.write(bytes(1 << 20))

    with servers.serving() as server:
        server.manners = [endless]
        with pytest.raises(HJEPAError, match="not the right file"):
            download.download(servers.remote(server), tmp_path / "file.bin")
    assert sizes == [len(servers.CONTENT) + 1]
    assert not list(tmp_path.iterdir())
