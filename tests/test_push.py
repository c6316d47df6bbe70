"""Runs and exports on Hugging Face, which is a local server here."""

import base64
import json
import re
import shutil
import subprocess
import sys

import pytest
from commands import assert_one_line, hjepa
from servers import serving, status, web_page
from test_hub import Hub


class Models(Hub):
    """What huggingface_hub asks of a server to fill a repository and to read it."""

    def __init__(self, server) -> None:
        super().__init__(server, {})
        self.base, self.asked = "api/models/ann/net", []

    def answer(self, handler, content, start) -> None:
        self.served = self.files
        path = handler.path.lstrip("/").split("?")[0]
        if handler.command != "POST" or self.instead:
            if self.files or self.instead or not path.startswith(self.base):
                super().answer(handler, content, start)
            else:
                handler.answer(b"[]", kind="application/json")
            return
        self.asked.append(path)
        answer = {
            "url": "https://huggingface.co/ann/net",
            "errors": [],
            "warnings": [],
            "commitUrl": "https://huggingface.co/ann/net/commit/a",
            "commitOid": "a" * 40,
        }
        if "/preupload/" in path:
            named = [file["path"] for file in json.loads(handler.body)["files"]]
            file = {"uploadMode": "regular", "shouldIgnore": False, "oid": None}
            answer = {"files": [{**file, "path": name} for name in named]}
        elif "/commit/" in path:
            for line in map(json.loads, handler.body.splitlines()):
                if line["key"] == "file":
                    own = line["value"]
                    self.files[own["path"]] = base64.b64decode(own["content"])
                elif line["key"] == "deletedFile":
                    del self.files[line["value"]["path"]]
        handler.answer(json.dumps(answer).encode(), kind="application/json")


@pytest.fixture
def server(monkeypatch, tmp_path):
    with serving() as running:
        monkeypatch.setenv("HF_ENDPOINT", running.url)
        monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
        monkeypatch.setenv("HF_TOKEN", "hf_test")
        monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
        running.models = Models(running)
        yield running


LOAD = """
import hjepa_mlx as hj, numpy as np
x = np.zeros((1, 32, 32, 3), np.uint8)
pairs = zip(hj.load("hf:ann/net").encode(x), hj.load("run").encode(x))
print(all(bool((a == b).all()) for a, b in pairs))
"""


def test_a_pushed_run_or_export_is_loaded_and_started_from(server, prepared, tmp_path):
    files = server.models.files
    files["checkpoints/step-00000001/state.json"] = b"{}"  # of an earlier push
    pushed = hjepa(prepared, "push run ann/net --licence mit")
    assert pushed.returncode == 0, pushed.stderr
    assert f"{server.url}/ann/net" in pushed.stdout
    place = "checkpoints/step-00000008"
    wanted = {"README.md", "config.yaml", f"{place}/model.safetensors", f"{place}/state.json"}
    assert files.keys() == wanted
    assert b"license: mit" in files["README.md"]
    assert str(prepared).encode() not in b"".join(files.values())
    load = [sys.executable, "-c", LOAD]
    ended = subprocess.run(load, cwd=prepared, capture_output=True, text=True)
    assert ended.stdout == "True\n", ended.stderr
    started = hjepa(prepared, "train tiny.yaml --init hf:ann/net --dry-run")
    assert "init: hf:ann/net" in started.stdout
    assert re.search(r"predictor.blocks 0–0 +12  loaded", started.stdout)
    export = "export hf:ann/net --to safetensors"
    assert_one_line(hjepa(prepared, export), "Say where to write", "--out FOLDER")
    assert hjepa(prepared, f"{export} --out {tmp_path}/got").returncode == 0

    files.clear()
    hjepa(prepared, f"export run --to safetensors --out {tmp_path}/out")
    assert hjepa(prepared, f"push {tmp_path}/out ann/net").returncode == 0
    assert files.keys() == {"README.md", "config.yaml", "model.safetensors"}
    shutil.rmtree(tmp_path / "cache")
    assert subprocess.run(load, cwd=prepared, capture_output=True, text=True).stdout == "True\n"


def test_what_cannot_be_pushed_or_fetched_is_one_line(server, prepared):
    assert_one_line(hjepa(prepared, "push run net"), "'net' is no repository", "USER/NAME")
    assert_one_line(hjepa(prepared, "push pictures ann/net"), "neither a run with a checkpoint")
    init = "train tiny.yaml --dry-run --init hf:ann/net"
    for manner in (status(404), status(500), web_page):
        server.models.instead = manner
        assert_one_line(hjepa(prepared, "push run ann/net"), "Pushing to ann/net failed")
        assert_one_line(hjepa(prepared, init), "Getting hf:ann/net failed")
    server.models.instead = None
    server.models.files["model.safetensors"] = (40 << 30).to_bytes(8, "little")
    assert_one_line(hjepa(prepared, init), "model.safetensors is damaged")
    assert_one_line(hjepa(prepared, "eval hf:ann/net"), "has no config.yaml")
