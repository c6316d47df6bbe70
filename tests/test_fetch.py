"""`datasets download`: from nothing, or from files that are there, to a data set that trains."""

import hashlib
import shutil
from pathlib import Path

import layouts
import pytest
from commands import advised, works
from layouts import CMC, OTHERS
from servers import good, remote, serving, status
from test_sources import fashion_files
from typer.testing import CliRunner

from hjepa_mlx.cli import app
from hjepa_mlx.data import download, importers, prepared
from hjepa_mlx.data.catalog import CATALOG
from hjepa_mlx.data.fetch import fetch
from hjepa_mlx.data.source import open_source
from hjepa_mlx.errors import HJEPAError
from hjepa_mlx.sections import Data


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


def archive_of(name: str, tmp_path) -> tuple[str, bytes]:
    """The archive of a small CIFAR-10 or STL-10: its name in the catalog, and its bytes."""
    folder = tmp_path / "made"
    if name == "cifar10":
        layouts.cifar10(folder, per_batch=10)
    else:
        layouts.stl10(folder, 10, 10, 10)
    path = layouts.archive(next(folder.iterdir()), tmp_path / CATALOG[name].files[0].name)
    return path.name, path.read_bytes()


@pytest.fixture
def cifar10(published, tmp_path) -> tuple[Path, bytes]:
    """CIFAR-10 is on the server; where its archive comes to lie, and the bytes of that."""
    file, content = archive_of("cifar10", tmp_path)
    published("cifar10", {file: content})
    return tmp_path / "data/cifar10" / file, content


def test_an_archive_is_fetched_once_and_ready_to_train_on(server, cifar10):
    archive, content = cifar10
    root = archive.parent.parent
    assert fetch("cifar10", root) == [archive]
    assert images_of("cifar10", root, "train") == 50
    assert archive.read_bytes() == content
    assert {path.name for path in archive.parent.iterdir()} == {"prepared", archive.name}
    asked = len(server.asked)
    assert fetch("cifar10", root) == []
    shutil.rmtree(archive.parent / "prepared")
    assert fetch("cifar10", root) == [archive]
    assert len(server.asked) == asked


def test_originals_are_kept_and_named_or_removed_if_wished_then_or_later(cifar10):
    archive, content = cifar10
    root = archive.parent.parent
    command = ["datasets", "download", "cifar10", "--data-dir", str(root)]
    ended = CliRunner().invoke(app, command)
    assert f"Not needed any more: {archive} (0.00 GB)" in ended.output
    assert f"Train with: hjepa-mlx train cifar10 --data-dir {root}" in ended.output
    assert archive.is_file()
    for prepare_anew in (False, True):
        if prepare_anew:
            shutil.rmtree(archive.parent / "prepared")
        ended = CliRunner().invoke(app, [*command, "--remove-originals"])
        assert f"Removed: {archive}" in ended.output
        assert not archive.exists()
        assert images_of("cifar10", root, "test") == 10
    archive.write_bytes(content + b"?")
    ended = CliRunner().invoke(app, [*command, "--remove-originals"])
    assert "Removed" not in ended.output
    assert archive.is_file()  # it was prepared from another file


@pytest.mark.parametrize(
    ("lost", "words", "status"),
    [
        ("train/n01558993/*", "left out: unreadable, named in", 0),
        ("val/*/*", "no test image can be read. First: ", 1),
    ],
)
def test_originals_stay_while_an_image_of_theirs_cannot_be_read(tmp_path, lost, words, status):
    folder = tmp_path / "imagenet100"
    layouts.folders(folder, layouts.photos(CMC))
    cut = sorted(folder.glob(lost))
    for path in cut:
        path.write_bytes(path.read_bytes()[:50])
    command = ["datasets", "download", "imagenet100", "--data-dir", str(tmp_path)]
    for _ in range(2):
        ended = CliRunner().invoke(app, [*command, "--remove-originals"])
        assert (words in ended.output, ended.exit_code) == (True, status)
        assert "Removed" not in ended.output
        assert cut
        assert all(path.is_file() for path in cut)


def test_the_command_that_a_missing_data_set_names_gets_it(cifar10):
    train = f"train cifar10 --dry-run --set data.batch_size=8 --data-dir {cifar10[0].parent.parent}"
    get = advised(train, r"Get it \(.* GB\) with: hjepa-mlx (datasets \S+ cifar10 --data-dir \S+)")
    works(get[1])
    assert "50 images, 6 an epoch" in works(train)


def test_a_file_that_is_gone_from_the_web_can_be_put_where_the_error_says(server, cifar10):
    archive, content = cifar10
    server.manners = [status(404)]
    command = f"datasets download cifar10 --data-dir {archive.parent.parent}"
    place = advised(command, r"from elsewhere, put it into (\S+) and run the command again")
    (Path(place[1]) / archive.name).write_bytes(content)
    works(command)


@pytest.mark.parametrize("cut", ["cifar-10-binary.tar.gz", "data_batch_1.bin", "train-labels"])
def test_a_cut_original_is_deleted_and_downloaded_again(published, cifar10, tmp_path, cut):
    name = "fashion-mnist" if cut == "train-labels" else "cifar10"
    files = fashion_files() if name == "fashion-mnist" else {cifar10[0].name: cifar10[1]}
    published(name, files)
    folder = tmp_path / "data" / name
    if cut.endswith(".bin"):
        shutil.copytree(tmp_path / "made", folder)
    else:
        folder.mkdir(parents=True)
        for file, content in files.items():
            (folder / file).write_bytes(content)
    (path,) = folder.rglob(f"{cut}*")
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
    command = f"datasets prepare {name} --data-dir {tmp_path}/data"
    advice = advised(command, r"hjepa-mlx: (\S+) is .*[Dd]elete it and download (it )?again")
    Path(advice[1]).unlink()
    works(command.replace("prepare", "download"))


def test_debians_files_are_used_and_never_removed(server, published, tmp_path, monkeypatch):
    files = fashion_files()
    published("fashion-mnist", {name: content + b"?" for name, content in files.items()})
    debian = tmp_path / "debian"
    debian.mkdir()
    for name, content in files.items():
        (debian / name).write_bytes(content)
    monkeypatch.setattr(importers, "DEBIAN_FASHION", debian)
    for earlier in (False, True):
        assert fetch("fashion-mnist", tmp_path / "data", earlier) == []
    assert server.asked == []
    assert images_of("fashion-mnist", tmp_path / "data", "test") == 12


@pytest.mark.parametrize("beside", ["", "cifar-10-batches-bin/data_batch_1.bin"])
def test_an_archive_placed_by_hand_is_checked_and_used(server, cifar10, beside):
    archive, content = cifar10
    (archive.parent / beside).parent.mkdir(parents=True)
    archive.parent.mkdir(exist_ok=True)
    if beside:
        (archive.parent / beside).write_bytes(b"a folder that is not whole is passed over")
    archive.write_bytes(content[:-1])
    with pytest.raises(HJEPAError, match=r"not the published .*Move it away"):
        fetch("cifar10", archive.parent.parent)
    archive.write_bytes(content)
    assert fetch("cifar10", archive.parent.parent) == [archive]
    assert server.asked == []


@pytest.mark.parametrize("name", ["cifar10", "stl10"])
def test_what_was_unpacked_by_hand_is_not_downloaded(server, published, tmp_path, name):
    published(name, dict([archive_of(name, tmp_path)]))
    (tmp_path / "made").rename(tmp_path / name)
    assert len(fetch(name, tmp_path)) == (6 if name == "cifar10" else 5)
    assert server.asked == []
    assert images_of(name, tmp_path, "test") == 10


def test_the_hundred_classes_of_an_imagenet1k_that_is_here_are_not_downloaded(server, tmp_path):
    for place in ("imagenet1k", "."):  # beside it, or in its place
        layouts.folders(tmp_path / place, layouts.photos(CMC if place != "." else CMC + OTHERS))
        assert fetch("imagenet100", tmp_path, earlier=True) == []
        assert images_of("imagenet100", tmp_path, "test") == 100
        shutil.rmtree(tmp_path / "imagenet100")
        shutil.rmtree(tmp_path / "imagenet1k", ignore_errors=True)


def test_an_archive_that_lacks_a_file_is_refused(server, published, tmp_path):
    name, right = archive_of("stl10", tmp_path)
    (tmp_path / "made/stl10_binary/test_y.bin").unlink()
    lacking = layouts.archive(tmp_path / "made/stl10_binary", tmp_path / name).read_bytes()
    published("stl10", {name: lacking})
    with pytest.raises(HJEPAError, match=r"lacks stl10_binary/test_y\.bin"):
        fetch("stl10", tmp_path / "data")
    assert not prepared.find("stl10", tmp_path / "data")
    published("stl10", {name: right})
    (tmp_path / "data/stl10" / name).unlink()
    fetch("stl10", tmp_path / "data")
    assert images_of("stl10", tmp_path / "data", "test") == 10


def test_files_of_fashion_mnist_placed_by_hand_are_checked_and_kept(server, published, tmp_path):
    files = fashion_files()
    published("fashion-mnist", files)
    first, *rest = files
    placed = tmp_path / "fashion-mnist" / first
    placed.parent.mkdir()
    placed.write_bytes(files[first][:-1] + b"?")
    with pytest.raises(HJEPAError, match=rf"{first} has the MD5 .*not the published .*Move it"):
        fetch("fashion-mnist", tmp_path)
    assert placed.read_bytes() == files[first][:-1] + b"?"
    placed.write_bytes(files[first])
    fetch("fashion-mnist", tmp_path)
    assert [path for path, _ in server.asked] == [f"/{name}" for name in rest]


def test_fashion_mnist_goes_on_with_the_file_that_failed(server, published, tmp_path):
    files = fashion_files()
    published("fashion-mnist", files)
    server.manners = [good] * 2 + [status(404)]
    with pytest.raises(HJEPAError, match=list(files)[2]):
        fetch("fashion-mnist", tmp_path)
    assert len(list((tmp_path / "fashion-mnist").glob("[!.]*"))) == 2
    server.asked.clear()
    fetch("fashion-mnist", tmp_path)
    assert [path for path, _ in server.asked] == [f"/{name}" for name in list(files)[2:]]
    assert images_of("fashion-mnist", tmp_path, "train") == 30


def test_a_small_disk_is_refused_before_anything_is_asked(server, published, tmp_path, monkeypatch):
    published("stl10", dict([archive_of("stl10", tmp_path)]))
    usage = shutil.disk_usage(tmp_path)
    free = lambda path: 10**12 if "large" in Path(path).parts else 3_000_000_000  # noqa: E731
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=free(path)))
    advice = "or choose another folder with --data-dir"
    with pytest.raises(HJEPAError, match=rf"STL-10 needs 3\.1\d GB .*3\.00 GB are free.* {advice}"):
        fetch("stl10", tmp_path / "data")
    assert server.asked == []
    with open(tmp_path / "data/stl10/.stl10_binary.tar.gz.part", "wb") as part:
        part.truncate(200_000_000)  # it counts as here already
    with pytest.raises(HJEPAError, match="not the right file"):
        fetch("stl10", tmp_path / "data")
    assert fetch("stl10", tmp_path / "large")


def test_archives_of_imagenet1k_with_the_right_md5_are_taken(tmp_path, monkeypatch):
    layouts.tars(tmp_path / "imagenet1k", layouts.photos(CMC[:2]))
    *tars, kit = (tmp_path / "imagenet1k" / name for name in CATALOG["imagenet1k"].archives)
    md5 = {path.name: hashlib.md5(path.read_bytes()).hexdigest() for path in (*tars, kit)}
    row = CATALOG["imagenet1k"].model_copy(update={"archives": md5})
    monkeypatch.setitem(CATALOG, "imagenet1k", row)
    assert fetch("imagenet1k", tmp_path) == tars
    assert fetch("imagenet1k", tmp_path) == []
    assert fetch("imagenet1k", tmp_path, earlier=True) == tars
    shutil.rmtree(tmp_path / "imagenet1k" / "prepared")
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
