"""`datasets download`: from nothing, or from files that are there, to a data set that trains."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import layouts
import pytest
from layouts import CMC
from servers import good, remote, serving, status, web_page
from test_sources import fashion_files
from typer.testing import CliRunner

from hjepa_mlx.cli import app
from hjepa_mlx.config import Data
from hjepa_mlx.data import download, importers, prepared
from hjepa_mlx.data.catalog import CATALOG
from hjepa_mlx.data.fetch import fetch
from hjepa_mlx.data.source import open_source
from hjepa_mlx.errors import HJEPAError


def images_of(name: str, root: Path, split: str) -> int:
    return len(open_source(Data(name=name, dir=str(root)), split))


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(download, "PAUSE", 0.0)
    monkeypatch.setattr(importers, "DEBIAN_FASHION", Path("/nowhere"))
    with serving() as running:
        yield running


@pytest.fixture
def published(server, monkeypatch):
    """Makes the catalog's files those of the local server."""

    def publish(name: str, files: dict[str, bytes]) -> None:
        server.files |= files
        remotes = tuple(remote(server, content, file) for file, content in files.items())
        row = CATALOG[name].model_copy(update={"files": remotes})
        monkeypatch.setitem(CATALOG, name, row)

    return publish


def archive_of(name: str, tmp_path) -> dict[str, bytes]:
    """The archive of a small CIFAR-10 or STL-10, as the catalog names it."""
    folder = tmp_path / "made"
    if name == "cifar10":
        layouts.cifar10(folder, per_batch=10)
    else:
        layouts.stl10(folder, 10, 10, 10)
    inner = next(folder.iterdir())
    path = layouts.archive(inner, tmp_path / CATALOG[name].files[0].name)
    return {path.name: path.read_bytes()}


@pytest.mark.parametrize("name", ["cifar10", "stl10"])
def test_an_archive_is_fetched_and_ready_to_train_on(server, published, tmp_path, name):
    files = archive_of(name, tmp_path)
    published(name, files)
    root = tmp_path / "data"
    (archive,) = fetch(name, root)
    source = open_source(Data(name=name, dir=str(root)), "train")
    assert len(source) == (50 if name == "cifar10" else 10)
    assert archive.read_bytes() == next(iter(files.values()))
    assert {p.name for p in (root / name).iterdir()} == {"prepared", archive.name}
    asked = len(server.asked)
    assert fetch(name, root) == []
    shutil.rmtree(root / name / "prepared")
    assert fetch(name, root) == [archive]
    assert len(server.asked) == asked


def test_originals_are_kept_and_named_or_removed_if_wished(server, published, tmp_path):
    files = archive_of("cifar10", tmp_path)
    published("cifar10", files)
    archive = tmp_path / "data/cifar10" / next(iter(files))
    command = ["datasets", "download", "cifar10", "--data-dir", str(tmp_path / "data")]
    ended = CliRunner().invoke(app, command)
    assert f"Not needed any more: {archive} (0.00 GB)" in ended.output
    assert f"Train with: hjepa-mlx train cifar10 --data-dir {tmp_path}/data" in ended.output
    assert archive.is_file()
    shutil.rmtree(tmp_path / "data/cifar10/prepared")
    ended = CliRunner().invoke(app, [*command, "--remove-originals"])
    assert f"Removed: {archive}" in ended.output
    assert not archive.exists()
    assert len(open_source(Data(name="cifar10", dir=str(tmp_path / "data")), "test")) == 10


def test_debians_files_are_used_and_never_removed(server, published, tmp_path, monkeypatch):
    files = fashion_files()
    published("fashion-mnist", {name: content + b"?" for name, content in files.items()})
    debian = tmp_path / "debian"
    debian.mkdir()
    for name, content in files.items():
        (debian / name).write_bytes(content)
    monkeypatch.setattr(importers, "DEBIAN_FASHION", debian)
    assert fetch("fashion-mnist", tmp_path / "data") == []
    assert server.asked == []
    assert len(open_source(Data(name="fashion-mnist", dir=str(tmp_path / "data")), "test")) == 12


def test_an_archive_placed_by_hand_is_checked_and_used(server, published, tmp_path):
    files = archive_of("cifar10", tmp_path)
    published("cifar10", files)
    ((file, content),) = files.items()
    place = tmp_path / "data" / "cifar10"
    place.mkdir(parents=True)
    (place / file).write_bytes(content[:-1])
    with pytest.raises(HJEPAError, match=r"not the published .*Move it away"):
        fetch("cifar10", tmp_path / "data")
    (place / file).write_bytes(content)
    fetch("cifar10", tmp_path / "data")
    assert server.asked == []
    assert len(open_source(Data(name="cifar10", dir=str(tmp_path / "data")), "test")) == 10


def test_a_folder_that_is_not_whole_is_passed_over_for_the_archive(server, published, tmp_path):
    files = archive_of("cifar10", tmp_path)
    published("cifar10", files)
    ((file, content),) = files.items()
    inner = tmp_path / "data/cifar10/cifar-10-batches-bin"
    inner.mkdir(parents=True)
    (inner.parent / file).write_bytes(content)
    (inner / "data_batch_1.bin").write_bytes(b"of another time")
    assert fetch("cifar10", tmp_path / "data") == [inner.parent / file]
    assert server.asked == []


@pytest.mark.parametrize("name", ["cifar10", "stl10"])
def test_what_was_unpacked_by_hand_is_not_downloaded(server, published, tmp_path, name):
    published(name, archive_of(name, tmp_path))
    (tmp_path / "made").rename(tmp_path / name)
    assert len(fetch(name, tmp_path)) == (6 if name == "cifar10" else 5)
    assert server.asked == []
    assert len(open_source(Data(name=name, dir=str(tmp_path)), "test")) == 10


def test_the_hundred_classes_of_an_imagenet1k_that_is_here_are_not_downloaded(server, tmp_path):
    layouts.folders(tmp_path / "imagenet1k", layouts.photos(CMC))
    assert fetch("imagenet100", tmp_path) == []
    assert len(open_source(Data(name="imagenet100", dir=str(tmp_path)), "test")) == 100


def test_an_archive_that_lacks_a_file_is_refused(server, published, tmp_path):
    right = archive_of("stl10", tmp_path)
    (tmp_path / "made/stl10_binary/test_y.bin").unlink()
    name = next(iter(right))
    lacking = layouts.archive(tmp_path / "made/stl10_binary", tmp_path / name).read_bytes()
    published("stl10", {name: lacking})
    with pytest.raises(HJEPAError, match=r"lacks stl10_binary/test_y\.bin"):
        fetch("stl10", tmp_path / "data")
    assert not prepared.find("stl10", tmp_path / "data")
    published("stl10", right)
    (tmp_path / "data/stl10" / name).unlink()
    fetch("stl10", tmp_path / "data")
    assert len(open_source(Data(name="stl10", dir=str(tmp_path / "data")), "test")) == 10


def test_files_of_fashion_mnist_placed_by_hand_are_checked_and_kept(server, published, tmp_path):
    files = fashion_files()
    published("fashion-mnist", files)
    place = tmp_path / "fashion-mnist"
    place.mkdir()
    first, *rest = files
    (place / first).write_bytes(files[first][:-1] + b"?")
    with pytest.raises(HJEPAError, match=rf"{first} has the MD5 .*not the published .*Move it"):
        fetch("fashion-mnist", tmp_path)
    assert (place / first).read_bytes() == files[first][:-1] + b"?"
    (place / first).write_bytes(files[first])
    fetch("fashion-mnist", tmp_path)
    assert [path for path, _ in server.asked] == [f"/{name}" for name in rest]


@pytest.mark.parametrize("number", [0, 2])
def test_fashion_mnist_goes_on_with_the_file_that_failed(server, published, tmp_path, number):
    files = fashion_files()
    published("fashion-mnist", files)
    server.manners = [good] * number + [status(404)]
    with pytest.raises(HJEPAError, match=list(files)[number]):
        fetch("fashion-mnist", tmp_path)
    assert len(list((tmp_path / "fashion-mnist").glob("[!.]*"))) == number
    server.asked.clear()
    fetch("fashion-mnist", tmp_path)
    assert [path for path, _ in server.asked] == [f"/{name}" for name in list(files)[number:]]
    assert len(open_source(Data(name="fashion-mnist", dir=str(tmp_path)), "train")) == 30


def test_a_small_disk_is_refused_before_anything_is_asked(server, published, tmp_path, monkeypatch):
    published("stl10", {"stl10_binary.tar.gz": b"x"})
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=3_000_000_000))
    with pytest.raises(HJEPAError, match=r"STL-10 needs 3\.12 GB in .*3\.00 GB are free"):
        fetch("stl10", tmp_path)
    assert server.asked == []
    with open(tmp_path / "stl10/.stl10_binary.tar.gz.part", "wb") as part:
        part.truncate(200_000_000)  # it counts as here already
    with pytest.raises(HJEPAError, match="not the right file"):
        fetch("stl10", tmp_path)


def test_archives_of_imagenet1k_with_the_right_md5_are_taken(tmp_path, monkeypatch):
    layouts.tars(tmp_path / "imagenet1k", layouts.photos(CMC[:2]))
    archives = {path.name: path for path in (tmp_path / "imagenet1k").iterdir()}
    for name, path in archives.items():
        digest = hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()
        monkeypatch.setitem(IMAGENET_ARCHIVES, name, digest)
    tars = [path for name, path in archives.items() if name.endswith(".tar")]
    assert sorted(fetch("imagenet1k", tmp_path)) == sorted(tars)
    shutil.rmtree(tmp_path / "imagenet1k" / "prepared")
    kit = archives["ILSVRC2012_devkit_t12.tar.gz"]
    kit.write_bytes(kit.read_bytes()[:-1] + b"?")
    with pytest.raises(HJEPAError, match=r"devkit_t12\.tar\.gz has the MD5 .*Move it away"):
        fetch("imagenet1k", tmp_path)
    assert kit.is_file()


def test_imagenet1k_says_how_to_get_it_and_checks_what_was_placed(tmp_path, capsys):
    with pytest.raises(HJEPAError, match=r"lacks ILSVRC2012_img_train\.tar, ILSVRC2012_img_val"):
        fetch("imagenet1k", tmp_path)
    assert "https://image-net.org/download" in capsys.readouterr().out
    layouts.tars(tmp_path / "imagenet1k", layouts.photos(CMC[:2]))
    with pytest.raises(HJEPAError, match=r"img_train\.tar has the MD5 .*not the published 1d675b"):
        fetch("imagenet1k", tmp_path)
    (tmp_path / "imagenet1k" / "ILSVRC2012_img_val.tar").unlink()
    with pytest.raises(HJEPAError, match=r"lacks ILSVRC2012_img_val\.tar\."):
        fetch("imagenet1k", tmp_path)


def test_another_layout_of_imagenet1k_is_enough(tmp_path):
    layouts.kaggle_contest(tmp_path / "imagenet1k", layouts.photos(CMC[:2]))
    inner = tmp_path / "imagenet1k/ILSVRC/Data/CLS-LOC"
    assert fetch("imagenet1k", tmp_path) == [inner / "train", inner / "val"]


# Hugging Face


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


def download_imagenet100(server, tmp_path) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "hjepa_mlx", "datasets", "download", "imagenet100"]
    place = {"HF_ENDPOINT": server.url, "HF_HOME": str(tmp_path / "cache")}
    return subprocess.run(
        [*command, "--data-dir", tmp_path / "data"],
        env={**os.environ, **place, "HF_HUB_DISABLE_XET": "1"},
        capture_output=True,
        text=True,
    )


def last_line(ended: subprocess.CompletedProcess) -> str:
    assert ended.returncode == 1, ended
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
        (lambda data: data[:-1] + b"?", "not the published file .*run the command again"),
        (lambda data: data[:-1000], "again"),
    ],
    ids=["wrong", "cut"],
)
def test_a_wrong_or_cut_file_from_the_hub_is_fetched_again(hub, server, tmp_path, damage, says):
    name = next(name for name in hub.files if name.endswith(".parquet"))
    hub.served[name] = damage(hub.files[name])
    assert re.search(says, last_line(download_imagenet100(server, tmp_path)))
    assert not (tmp_path / "data/imagenet100" / name).exists()
    hub.served = hub.files
    assert download_imagenet100(server, tmp_path).returncode == 0
    assert (tmp_path / "data/imagenet100" / name).read_bytes() == hub.files[name]


def test_a_repository_without_parquet_files_is_named(hub, server, tmp_path):
    hub.files = {"README.md": b"card"}
    line = last_line(download_imagenet100(server, tmp_path))
    assert re.search(r"clane9/imagenet-100 has no parquet files", line)


def test_a_hub_that_is_not_there_is_one_line(tmp_path):
    with serving() as gone:
        pass
    line = last_line(download_imagenet100(gone, tmp_path))
    assert re.search(r"clane9/imagenet-100.*failed: .*again", line)


@pytest.mark.parametrize(
    "manner", [status(404), status(500), web_page], ids=["404", "500", "web page"]
)
def test_a_hub_that_does_not_answer_well_is_one_line(hub, server, tmp_path, manner):
    hub.instead = manner
    line = last_line(download_imagenet100(server, tmp_path))
    assert re.search(r"clane9/imagenet-100.*failed: .*again", line)
    hub.instead = None
    assert download_imagenet100(server, tmp_path).returncode == 0
