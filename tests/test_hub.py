"""ImageNet-100 from Hugging Face, which is a local server here."""

import hashlib
import json
import os
import re
import subprocess
import sys

import layouts
import pytest
from layouts import CMC
from servers import serving, status, web_page

from hjepa_mlx.data.source import open_source
from hjepa_mlx.sections import Data


@pytest.fixture
def server():
    with serving() as running:
        yield running


class Hub:
    """What huggingface_hub asks of a server, for one repository."""

    def __init__(self, server, files: dict[str, bytes]) -> None:
        self.files, self.served, self.instead = files, dict(files), None
        self.base = "api/datasets/clane9/imagenet-100"
        server.hub = self

    def entry(self, name: str) -> dict:
        content = self.files[name]
        digest = hashlib.sha256(content).hexdigest()
        lfs = {"sha256": digest, "oid": digest, "size": len(content), "pointerSize": 130}
        return {"rfilename": name, "size": len(content), "blobId": "0" * 40, "lfs": lfs}

    def answer(self, handler, content, start) -> None:
        if self.instead:
            self.instead(handler, content, start)
            return
        path = handler.path.lstrip("/").split("?")[0]
        siblings = [self.entry(name) for name in self.files]
        name = path.partition("/resolve/")[2].partition("/")[2]
        if path.startswith(f"{self.base}/tree/"):
            tree = [
                {"type": "file", "path": e["rfilename"], "size": e["size"], "oid": e["blobId"],
                 "lfs": e["lfs"]}
                for e in siblings
            ]  # fmt: skip
            handler.answer(json.dumps(tree).encode(), kind="application/json")
        elif path.startswith(self.base):
            info = {"id": "clane9/imagenet-100", "sha": "a" * 40, "siblings": siblings}
            handler.answer(json.dumps(info).encode(), kind="application/json")
        elif name in self.served:
            entry = self.entry(name)
            more = {"ETag": f'"{entry["lfs"]["sha256"]}"', "X_Repo_Commit": "a" * 40}
            body = self.served[name][start:]
            if start:
                more["Content_Range"] = f"bytes {start}-{len(self.served[name]) - 1}/*"
            handler.answer(body, 206 if start else 200, **more)
        else:
            handler.answer(b"{}", 404, kind="application/json", X_Error_Code="RepoNotFound")


@pytest.fixture
def hub(server, tmp_path):
    """A parquet file a split on a local Hugging Face."""
    made = tmp_path / "made"
    layouts.parquet(made, layouts.photos(CMC), files=1)
    files = {p.relative_to(made).as_posix(): p.read_bytes() for p in made.rglob("*.parquet")}
    return Hub(server, {**files, "README.md": b"card"})


def download_imagenet100(server, tmp_path, first="") -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "hjepa_mlx", "datasets", "download", "imagenet100"]
    place = {"HF_ENDPOINT": server.url, "HF_HOME": str(tmp_path / "cache")}
    place["PYTHONPATH"] = f"{first}:{os.environ.get('PYTHONPATH', '')}"
    return subprocess.run(
        [*command, "--data-dir", tmp_path / "data"],
        env={**os.environ, **place, "HF_HUB_DISABLE_XET": "1"},
        capture_output=True,
        text=True,
    )


def one_line(server, tmp_path, first="", status=1) -> str:
    """Where the download ends with an error: its last line."""
    ended = download_imagenet100(server, tmp_path, first)
    assert ended.returncode == status, ended
    assert "Traceback" not in ended.stderr
    return ended.stderr.splitlines()[-1]


def test_imagenet100_comes_from_the_hub_and_is_checked(hub, server, tmp_path):
    ended = download_imagenet100(server, tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert "non-commercial research" in ended.stdout
    source = open_source(Data(name="imagenet100", dir=str(tmp_path / "data")), "train")
    assert len(source) == 200
    assert source.classes == CMC
    asked = len(server.asked)
    assert download_imagenet100(server, tmp_path).returncode == 0
    assert len(server.asked) == asked


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda data: data[:-1] + b"?", "wrong SHA-256.*Run the command again"),
        (lambda data: data[:-1000], "again"),
    ],
)
def test_a_wrong_or_cut_file_from_the_hub_is_fetched_again(hub, server, tmp_path, damage, says):
    name = next(name for name in hub.files if name.endswith(".parquet"))
    hub.served[name] = damage(hub.files[name])
    assert re.search(says, one_line(server, tmp_path))
    assert not (tmp_path / "data/imagenet100" / name).exists()
    hub.served = hub.files
    assert download_imagenet100(server, tmp_path).returncode == 0
    assert (tmp_path / "data/imagenet100" / name).read_bytes() == hub.files[name]


def test_without_the_hub_s_client_the_extra_that_brings_it_is_named(hub, server, tmp_path):
    missing = tmp_path / "huggingface_hub.py"
    missing.write_text("raise ImportError")
    assert "pip install 'hjepa-mlx[hub]'" in one_line(server, tmp_path, str(tmp_path), 2)
    assert download_imagenet100(server, tmp_path).returncode == 0


def test_a_repository_without_parquet_files_is_named(hub, server, tmp_path):
    hub.files = {"README.md": b"card"}
    assert "clane9/imagenet-100 has no parquet files" in one_line(server, tmp_path)


def test_a_hub_that_is_not_there_is_one_line(tmp_path):
    with serving() as gone:
        pass
    assert re.search(r"clane9/imagenet-100.*failed: .*again", one_line(gone, tmp_path))


@pytest.mark.parametrize("manner", [status(404), status(500), web_page])
def test_a_hub_that_does_not_answer_well_is_one_line(hub, server, tmp_path, manner):
    hub.instead = manner
    assert re.search(r"clane9/imagenet-100.*failed: .*again", one_line(server, tmp_path))
