"""`prepare`: the same bytes whatever happens on the way."""

import json
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from itertools import count
from pathlib import Path

import layouts
import pytest
from layouts import CMC
from PIL import Image
from typer.testing import CliRunner

from hjepa_mlx.cli import app
from hjepa_mlx.data import prepare as module
from hjepa_mlx.data import prepared
from hjepa_mlx.data.images import shrunk
from hjepa_mlx.data.prepare import originals_of, prepare
from hjepa_mlx.data.source import open_source
from hjepa_mlx.data.storage import StorageError
from hjepa_mlx.errors import HJEPAError, UsageError
from hjepa_mlx.files import locked
from hjepa_mlx.sections import Data


def sources(root, name="imagenet100"):
    return {s: open_source(Data(name=name, dir=str(root)), s) for s in ("train", "test")}


def prepare_hundred(root, folder, **options):
    return prepare(
        "imagenet100", originals_of("imagenet100", root), folder, **{"side": 32, **options}
    )


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """CMC's hundred classes in folders: 200 + 100 images of 80x60, one of them no image."""
    root = tmp_path_factory.mktemp("original")
    layouts.folders(root / "imagenet100", layouts.photos(CMC))
    first = sorted((root / "imagenet100/train").rglob("*.JPEG"))[5]
    first.write_text("not a picture")
    return root


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(prepared, "SHARD", 32)


@pytest.fixture(scope="module")
def expected(root, tmp_path_factory):
    """What an undisturbed call with one worker gives."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepared, "SHARD", 32)
        folder = tmp_path_factory.mktemp("expected")
        prepare_hundred(root, folder, workers=1)
    return contents(folder)


def test_any_number_of_workers_gives_the_same_bytes(root, tmp_path, expected):
    made = prepare_hundred(root, tmp_path / "out", workers=3)
    assert contents(tmp_path / "out") == expected
    assert len([name for name in expected if name.endswith(".tar")]) == 7 + 4
    assert made["splits"]["train"]["images"] == 199
    (skipped,) = made["splits"]["train"]["skipped"]
    assert "not an image" in skipped


def test_reading_back_gives_the_same_pictures_in_the_published_order(root, tmp_path):
    folder = tmp_path / "imagenet100" / "prepared"
    prepare_hundred(root, folder)
    before, after = originals_of("imagenet100", root), sources(tmp_path)
    for split, skipped in (("train", 5), ("test", None)):
        old, new = list(before[split].items()), after[split]
        kept = [item for i, item in enumerate(old) if i != skipped]
        assert new.classes == CMC
        assert new.labels.tolist() == [item.label for item in kept]
        for number, item in enumerate(kept[:40]):
            assert new.images.read(int(new.rows[number])) == shrunk(item.read(), 32, 90)
        assert new.name_of(0).endswith(".jpg")
    with tarfile.open(folder / "train-00000.tar") as tar:
        assert all(member.isfile() and member.name.endswith(".jpg") for member in tar)
        assert tar.getnames()[0].split("/")[0] in CMC


class Crash(Exception):
    pass


def failing(after: int, fail) -> Callable:
    """`shrunk`, which calls `fail` once, after so many images."""
    calls = count()

    def fragile(*arguments):
        if next(calls) == after:
            fail()
        return shrunk(*arguments)

    return fragile


def crash():
    raise Crash


@pytest.mark.parametrize("survives", [0, 40, 150, 290])
def test_an_interrupted_call_goes_on_and_keeps_what_was_whole(
    root, tmp_path, expected, monkeypatch, survives
):
    monkeypatch.setattr(module, "shrunk", failing(survives, crash))
    out = tmp_path / "out"
    with pytest.raises(Crash):
        prepare_hundred(root, out, workers=2)
    assert not prepared.complete(out)
    whole = {name: data for name, data in contents(out).items() if name.endswith(".tar")}
    assert all(expected[name] == data for name, data in whole.items())
    times = {name: (out / name).stat().st_mtime_ns for name in whole}
    monkeypatch.setattr(module, "shrunk", shrunk)
    prepare_hundred(root, out, workers=2)
    assert contents(out) == expected
    kept = [name for name in times if (out / name).stat().st_mtime_ns == times[name]]
    assert len(kept) >= len(whole) - 1  # a shard that was not yet recorded is made again


def test_a_disk_that_goes_away_is_no_list_of_unreadable_images(
    root, tmp_path, expected, monkeypatch
):
    shutil.copytree(root, tmp_path / "disk")
    unplug = failing(100, lambda: (tmp_path / "disk").rename(tmp_path / "away"))
    monkeypatch.setattr(module, "shrunk", unplug)
    out = tmp_path / "out"
    with pytest.raises(StorageError, match="cannot be read any more"):
        prepare_hundred(tmp_path / "disk", out, workers=2)
    (tmp_path / "away").rename(tmp_path / "disk")
    made = prepare_hundred(tmp_path / "disk", out, workers=2)
    assert [len(part["skipped"]) for part in made["splits"].values()] == [1, 0]
    tars = {name: data for name, data in expected.items() if name.endswith(".tar")}
    assert {name: data for name, data in contents(out).items() if name in tars} == tars


def test_other_options_or_other_images_are_refused(root, tmp_path):
    out = tmp_path / "out"
    prepare_hundred(root, out)
    before = contents(out)
    prepare_hundred(root, out)
    with pytest.raises(UsageError, match=r"was prepared with short_side=32"):
        prepare_hundred(root, out, side=40)
    layouts.folders(tmp_path / "imagenet100", layouts.photos(CMC, train=1))
    with pytest.raises(UsageError, match="prepared with other images"):
        prepare_hundred(tmp_path, out)
    assert contents(out) == before


def test_the_command_can_be_run_again_and_knows_its_own_output(tmp_path):
    layouts.folders(tmp_path / "imagenet100", layouts.photos(CMC))
    prepare_it = ["datasets", "prepare", "imagenet100", "--data-dir", str(tmp_path)]
    first = CliRunner().invoke(app, prepare_it)
    shutil.rmtree(tmp_path / "imagenet100/train")  # the originals may go
    again = CliRunner().invoke(app, prepare_it)
    assert (first.exit_code, again.exit_code) == (0, 0)
    assert "It is prepared already, with --side 256 --quality 90. Delete" in again.output
    for name in ("imagenet100+stl10", "demo", "folder", "stl1"):
        assert CliRunner().invoke(app, ["datasets", "prepare", name]).exit_code == 2


def test_a_folder_with_other_files_is_left_alone(root, tmp_path):
    for name in ("train-00000.tar", "notes-12345.json"):
        (tmp_path / name).write_text("mine")
    with pytest.raises(UsageError, match="is not empty"):
        prepare_hundred(root, tmp_path)
    assert (tmp_path / "train-00000.tar").read_text() == "mine"
    assert (tmp_path / "notes-12345.json").exists()


def test_a_manifest_of_another_tool_is_left_alone(root, tmp_path):
    (tmp_path / "dataset.json").write_text("[1, 2]")
    with pytest.raises(UsageError, match="is not empty"):
        prepare_hundred(root, tmp_path)
    assert (tmp_path / "dataset.json").read_text() == "[1, 2]"


def test_a_second_call_at_the_same_time_is_refused(root, tmp_path):
    writing = pytest.raises(HJEPAError, match="is being written by another process")
    with locked(tmp_path / ".lock", "x"), writing:
        prepare_hundred(root, tmp_path)


def test_a_small_disk_is_refused(root, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(HJEPAError, match=r"300 prepared images need about 0\.01 GB in"):
        prepare_hundred(root, tmp_path / "out", side=256)
    monkeypatch.undo()
    (tmp_path / "out" / ".DS_Store").write_bytes(b"Finder was here")
    prepare_hundred(root, tmp_path / "out")  # of another size than asked


# So slow after the first two shards that a signal always comes in time
SLOWLY = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background ignores it
import time
from itertools import count
from hjepa_mlx.data import prepare, prepared
prepared.SHARD, prepare.AHEAD = 32, 4
shrunk, calls = prepare.shrunk, count()
def slow(*arguments):
    time.sleep(0.02 if next(calls) < 80 else 0.5)
    return shrunk(*arguments)
prepare.shrunk = slow
from hjepa_mlx.cli import main
main()
"""


def recorded(folder: Path) -> list[str]:
    try:
        begun = json.loads((folder / prepared.MANIFEST).read_text())["begun"]
    except FileNotFoundError:
        return []
    return [file["file"] for part in begun.values() for file in part["files"]]


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_a_call_that_is_ended_keeps_whole_shards_and_the_next_one_makes_the_rest(
    root, tmp_path, expected, how
):
    arguments = ["datasets", "prepare", "imagenet100", "--data-dir", str(root), "--side", "32"]
    out = tmp_path / "out"
    running = subprocess.Popen(
        [sys.executable, "-c", SLOWLY, *arguments, "--out", str(out), "--workers", "2"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    while len(recorded(out)) < 2:
        assert running.poll() is None
        time.sleep(0.001)
    running.send_signal(how)
    _, said = running.communicate(timeout=200)
    if how == signal.SIGINT:
        assert running.returncode == 130
        assert said.splitlines()[-1] == "hjepa-mlx: stopped."
        assert not list(out.glob("*.part"))
    assert not prepared.complete(out)
    whole = recorded(out)
    assert "train-00001.tar" in whole
    assert {*whole} < {name for name in expected if name.endswith(".tar")}
    times = {name: (out / name).stat().st_mtime_ns for name in whole}
    prepare_hundred(root, out, workers=2)
    assert {name: data for name, data in contents(out).items() if ".part" not in name} == expected
    assert {name: (out / name).stat().st_mtime_ns for name in whole} == times


def test_the_options_of_the_command_are_those_of_what_it_makes(root, tmp_path):
    given = ["--side", "20", "--quality", "40", "--workers", "1", "--out", str(tmp_path / "out")]
    ended = CliRunner().invoke(
        app, ["datasets", "prepare", "imagenet100", "--data-dir", str(root), *given]
    )
    assert ended.exit_code == 0, ended.output
    assert "train: 199 images, 1 left out" in ended.output
    made = prepared.manifest(tmp_path / "out")
    assert (made["short_side"], made["jpeg_quality"]) == (20, 40)
    with tarfile.open(tmp_path / "out" / made["splits"]["test"]["files"][0]["file"]) as tar:
        assert {min(Image.open(tar.extractfile(m)).size) for m in tar} == {20}
