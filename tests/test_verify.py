"""`datasets verify`, `list` and `combine`: what is said of a data set is true of it."""

import dataclasses
import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import layouts
import pytest
from layouts import CMC, KAGGLE, OTHERS
from typer.testing import CliRunner

from hjepa_mlx import backend
from hjepa_mlx.cli import app
from hjepa_mlx.config import Data
from hjepa_mlx.data import catalog
from hjepa_mlx.data.catalog import CATALOG, class_list
from hjepa_mlx.data.combine import combine
from hjepa_mlx.data.prepare import prepare
from hjepa_mlx.data.sources import open_source
from hjepa_mlx.data.verify import Check, verify
from hjepa_mlx.errors import UsageError
from hjepa_mlx.recipes import load_config


def hjepa(*arguments: object):
    return CliRunner().invoke(app, ["datasets", *map(str, arguments)])


def checks(name: str, root) -> dict[str, Check]:
    return {
        check.what.removeprefix(name).lstrip(": "): check
        for check in verify(Data(name=name, dir=str(root)))
    }


def wrong(name: str, root) -> set[str]:
    return {what for what, check in checks(name, root).items() if not check.right}


@pytest.fixture
def published(monkeypatch):
    """Says that a data set was published with these counts."""

    def set_counts(name: str, **splits: int) -> None:
        row = dataclasses.replace(CATALOG[name], splits=splits)
        monkeypatch.setitem(CATALOG, name, row)

    return set_counts


@pytest.fixture
def hundred(tmp_path, published):
    """A right ImageNet-100 of 200 + 100 images, prepared."""
    layouts.folders(tmp_path / "original" / "imagenet100", layouts.photos(CMC))
    original = Data(name="imagenet100", dir=str(tmp_path / "original"))
    sources = {split: open_source(original, split) for split in ("train", "test")}
    prepare("imagenet100", sources, tmp_path / "imagenet100" / "shards", side=32)
    published("imagenet100", pretrain=200, train=200, test=100)
    return tmp_path


@pytest.mark.parametrize(
    ("name", "layout", "splits"),
    [
        (
            "cifar10",
            lambda root: layouts.cifar10(root, 10),
            {"pretrain": 50, "train": 50, "test": 10},
        ),
        (
            "stl10",
            lambda root: layouts.stl10(root, 10, 8, 20),
            {"pretrain": 20, "train": 10, "test": 8},
        ),
        (
            "imagenet100",
            lambda root: layouts.parquet(root, layouts.photos(CMC)),
            {"pretrain": 200, "train": 200, "test": 100},
        ),
        (
            "imagenet100",
            lambda root: layouts.folders(root, layouts.photos(CMC)),
            {"pretrain": 200, "train": 200, "test": 100},
        ),
    ],
    ids=["cifar10", "stl10", "parquet", "folders"],
)
def test_a_right_data_set_is_right_and_a_small_one_is_not_the_published_one(
    tmp_path, published, name, layout, splits
):
    layout(tmp_path / name)
    stl = {"train"} if name == "stl10" else set()
    assert wrong(name, tmp_path) == {"pretrain", "test"} | stl
    assert hjepa("verify", name, "--data-dir", tmp_path).exit_code == 1
    published(name, **splits)
    assert wrong(name, tmp_path) == set()
    ended = hjepa("verify", name, "--data-dir", tmp_path)
    assert ended.exit_code == 0
    assert "WRONG" not in ended.output


def test_a_prepared_one_is_right_and_says_its_list(hundred):
    found = checks("imagenet100", hundred)
    assert all(check.right for check in found.values()), found
    assert found["classes"].found == "CMC's ImageNet-100"
    assert found["shards"].found == "2 as recorded"


def test_a_changed_byte_in_a_shard_is_found_and_named(hundred):
    path = hundred / "imagenet100/shards/test-00000.tar"
    data = bytearray(path.read_bytes())
    data[600] ^= 1
    path.write_bytes(data)
    assert "shards" in wrong("imagenet100", hundred)
    assert f"{path} has changed" in checks("imagenet100", hundred)["shards"].found


def test_unreadable_images_are_counted_and_named(tmp_path, published):
    layouts.folders(tmp_path / "imagenet100", layouts.photos(CMC))
    published("imagenet100", pretrain=200, train=200, test=100)
    for number, path in enumerate(sorted((tmp_path / "imagenet100/train").rglob("*.JPEG"))[:7]):
        path.write_bytes([b"", b"text", path.read_bytes()[:500]][number % 3])
    check = checks("imagenet100", tmp_path)["pretrain: unreadable"]
    assert not check.right
    assert check.found.startswith("7 of 200: ")
    assert check.found.count(".JPEG") == 5


def test_the_lists_called_imagenet100_are_told_apart(tmp_path, published):
    layouts.kaggle_hundred(tmp_path / "k" / "imagenet100", layouts.photos(KAGGLE))
    check = checks("imagenet100", tmp_path / "k")["classes"]
    assert check.right
    assert check.found.startswith("Kaggle's ImageNet-100: scores do not compare")
    assert "published: 130,000" in checks("imagenet100", tmp_path / "k")["pretrain"].found
    layouts.folders(tmp_path / "o" / "imagenet100", layouts.photos(CMC[:50] + OTHERS))
    check = checks("imagenet100", tmp_path / "o")["classes"]
    assert not check.right
    assert check.found == "an unknown list of 53 classes"


def test_the_two_lists_are_those_of_their_publishers():
    cmc, kaggle = class_list("cmc"), class_list("kaggle")
    assert (cmc[0], cmc[1], cmc[99]) == ("n02869837", "n01749939", "n02090622")
    assert (kaggle[0], kaggle[99]) == ("n01968897", "n01514668")
    assert len(set(cmc)) == len(set(kaggle)) == 100
    assert len(set(cmc) & set(kaggle)) == 8


def test_evaluation_images_that_are_trained_on_are_found(tmp_path, published):
    made = layouts.photos(CMC)
    owner, trained, data = made["train"][11]
    place = [name for name, _, _ in made["val"]].index(owner)
    judged = made["val"][place][1]
    made["val"][place] = (owner, judged, data)
    layouts.folders(tmp_path / "imagenet100", made)
    (name,) = wrong("imagenet100", tmp_path) - {"pretrain", "test"}
    assert name == "evaluation images that are also trained on"
    found = checks("imagenet100", tmp_path)[name].found
    assert found.startswith("1: ")
    assert judged in found
    assert trained in found


def test_a_missing_split_is_wrong_and_missing_data_an_error_with_the_command(tmp_path):
    layouts.cifar10(tmp_path, 10)
    (tmp_path / "cifar-10-batches-bin/test_batch.bin").unlink()
    assert "test" in wrong("cifar10", tmp_path)
    ended = hjepa("verify", "stl10", "--data-dir", tmp_path)
    assert ended.exit_code == 1
    assert "hjepa-mlx datasets download stl10" in ended.output


def test_verify_of_several_checks_each_and_json_says_the_same(tmp_path):
    layouts.stl10(tmp_path / "stl10", 10, 8, 20)
    layouts.cifar10(tmp_path / "cifar10", 10)
    file = tmp_path / "report.json"
    ended = hjepa("verify", "stl10+cifar10", "--data-dir", tmp_path, "--json", file)
    assert ended.exit_code == 1
    report = json.loads(file.read_text())
    assert {check["what"].split()[0].rstrip(":") for check in report} == {"stl10", "cifar10"}
    assert [c["what"] for c in report if not c["right"]] == [
        line.split("  ", 1)[1].split(": ")[0]
        for line in ended.output.splitlines()
        if line.startswith("WRONG")
    ]


# list


def test_list_shows_the_promises_and_what_is_here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    layouts.stl10(tmp_path / "stl10", 10, 8, 20)
    layouts.tars(tmp_path / "imagenet1k", layouts.photos(CMC[:2]))
    ended = hjepa("list", "--data-dir", tmp_path, "--json", "-")
    rows = {row["name"]: row for row in json.loads(ended.output)["datasets"]}
    assert list(rows) == list(catalog.CATALOG)
    assert rows["stl10"]["here"]["layout"] == "raw pixels"
    assert rows["imagenet1k"]["here"]["layout"] == "tar archives"
    assert rows["imagenet100+stl10"]["here"]["layout"] == "tar archives + raw pixels"
    assert rows["cifar10"]["here"]["layout"] is None
    assert rows["imagenet100"]["promised"]["hours"] == [10, 15]
    assert not (tmp_path / "imagenet1k/ILSVRC2012_img_train.tar.index.npz").exists()
    text = hjepa("list", "--data-dir", tmp_path).output
    assert "quick experimentation" in text
    assert "7–10 days" in text


def test_list_shows_hours_of_this_machine_once_a_benchmark_was_kept(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    results = tmp_path / "benchmarks" / "results"
    results.mkdir(parents=True)
    estimates = [{"dataset": "imagenet100", "hours_100_epochs": 12.25}]
    facts = {"machine": {"chip": backend.chip()}, "estimates": estimates}
    (results / "a.json").write_text(json.dumps(facts))
    (results / "b.json").write_text(json.dumps({"images_per_second": 1}))
    rows = json.loads(hjepa("list", "--json", "-").output)["datasets"]
    hours = {row["name"]: row["here"]["hours_100_epochs"] for row in rows}
    assert hours["imagenet100"] == 12.25
    assert hours["stl10"] is None


def test_the_promises_are_those_of_the_founding_comparison():
    promises = {name: row.promise for name, row in CATALOG.items() if row.promise}
    assert {name: promise.hours for name, promise in promises.items()} == {
        "cifar10": (2, 3),
        "stl10": (8, 12),
        "imagenet100": (10, 15),
        "imagenet100+stl10": (18, 24),
        "imagenet1k": (7 * 24, 10 * 24),
    }
    assert CATALOG["imagenet100+stl10"].images == 226_689


# combine


@pytest.mark.parametrize(("weights", "share"), [(None, "44.1% stl10"), ([1.0, 3.0], "75.0% stl10")])
def test_combine_writes_a_recipe_that_can_be_trained(tmp_path, weights, share):
    path = tmp_path / "both.yaml"
    assert share in combine(["imagenet100", "stl10"], path, weights)
    config = load_config(path)
    assert config.data.name == "imagenet100+stl10"
    assert config.data.weights == (weights or "auto")
    assert config.model == load_config("imagenet100").model
    layouts.folders(tmp_path / "imagenet100", layouts.photos(CMC))
    layouts.stl10(tmp_path / "stl10", 10, 8, 100)
    config.data.dir = str(tmp_path)
    source = open_source(config.data, "pretrain")
    assert source.shares == ((75, 225) if weights else ())


def test_the_tools_do_what_the_commands_do(tmp_path):
    tools, path = Path(__file__).parent.parent / "tools", tmp_path / "both.yaml"
    arguments = ["--datasets", "imagenet100", "stl10", "--weights", "1", "3", "--output-config"]
    command = [sys.executable, str(tools / "create_combined_dataset.py"), *arguments, str(path)]
    subprocess.run(command, check=True, capture_output=True)
    data = load_config(path).data
    assert (data.name, data.weights) == ("imagenet100+stl10", [1, 3])
    command = [sys.executable, str(tools / "download_data.py"), "--dataset", "imagenet101"]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 2
    assert "imagenet100" in ended.stderr


def test_combine_refuses_what_cannot_be_combined(tmp_path):
    path = tmp_path / "x.yaml"
    for names in (["stl10"], ["stl10", "stl10"], ["stl10", "folder"], ["stl10", "nope"]):
        with pytest.raises(UsageError):
            combine(names, path)
    with pytest.raises(UsageError, match="one weight per data set"):
        combine(["stl10", "cifar10"], path, [1.0])
    for bad in (tmp_path / "x.txt", tmp_path / "missing" / "x.yaml"):
        with pytest.raises(UsageError, match=r"must be a \.yaml file in a folder that exists"):
            combine(["stl10", "cifar10"], bad)
    with pytest.raises(UsageError):
        combine(["imagenet100+stl10", "stl10"], path)
    with pytest.raises(UsageError):
        combine(["stl10", "cifar10"], path, [float("inf"), 1.0])
    ended = hjepa("combine", "stl10", "cifar10", "--weight", "-1", "--weight", "2", "--out", path)
    assert ended.exit_code == 2
    assert not list(tmp_path.iterdir())


def test_originals_may_be_deleted_after_prepare(hundred):
    (hundred / "imagenet100/checksums.json").write_text('{"data/gone.parquet": "0"}')
    assert wrong("imagenet100", hundred) == set()


def test_a_folder_of_ones_own_pictures_is_no_imagenet(tmp_path):
    (tmp_path / "train" / "cats").mkdir(parents=True)
    rows = json.loads(hjepa("list", "--data-dir", tmp_path, "--json", "-").output)["datasets"]
    here = {row["name"]: row["here"]["layout"] for row in rows}
    assert here["imagenet100"] is here["imagenet1k"] is None


def test_shards_that_were_removed_leave_the_original_to_be_read(hundred):
    layouts.folders(hundred / "imagenet100", layouts.photos(CMC))
    data = Data(name="imagenet100", dir=str(hundred))
    assert "/shards/" in open_source(data, "train").name_of(0)
    shutil.rmtree(hundred / "imagenet100/shards")
    assert "/train/n" in open_source(data, "train").name_of(0)


@pytest.mark.parametrize(
    ("layout", "classes"),
    [(layouts.tars, CMC), (layouts.kaggle_contest, CMC), (layouts.kaggle_hundred, KAGGLE)],
)
def test_every_layout_can_be_all_right(tmp_path, monkeypatch, published, layout, classes):
    layout(tmp_path / "imagenet100", layouts.photos(classes))
    assert wrong("imagenet100", tmp_path) == {"pretrain", "test"}
    published("imagenet100", pretrain=200, train=200, test=100)
    monkeypatch.setattr("hjepa_mlx.data.verify.KAGGLE_IMAGES", 200)
    ended = hjepa("verify", "imagenet100", "--data-dir", tmp_path)
    assert ended.exit_code == 0, ended.output


@pytest.mark.parametrize(
    ("damage", "says"), [("changed", "has changed"), ("missing", "is missing")]
)
def test_a_downloaded_file_that_changed_or_went_is_named(tmp_path, damage, says):
    layouts.stl10(tmp_path / "stl10", 10, 8, 20)
    files = sorted((tmp_path / "stl10/stl10_binary").iterdir())
    digests = {f"stl10_binary/{f.name}": hashlib.sha256(f.read_bytes()).hexdigest() for f in files}
    (tmp_path / "stl10" / "checksums.json").write_text(json.dumps(digests))
    assert checks("stl10", tmp_path)["files"] == Check("stl10 files", True, "6 as recorded")
    path = tmp_path / "stl10/stl10_binary/test_X.bin"
    if damage == "missing":
        path.unlink()
    else:
        data = bytearray(path.read_bytes())
        data[5000] ^= 1
        path.write_bytes(data)
    check = checks("stl10", tmp_path)["files"]
    assert not check.right
    assert check.found == f"{path} {says}"


def test_an_unreadable_image_inside_a_tar_is_named(tmp_path):
    made = layouts.photos(CMC)
    layouts.tars(tmp_path / "imagenet100", made)
    path = tmp_path / "imagenet100/ILSVRC2012_img_train.tar"
    _, name, jpeg = made["train"][17]
    path.write_bytes(path.read_bytes().replace(jpeg, bytes(len(jpeg)), 1))
    check = checks("imagenet100", tmp_path)["pretrain: unreadable"]
    assert not check.right
    assert check.found.startswith(f"1 of 200: {path}:{name} (")


def test_a_class_without_an_evaluation_image_is_noticed(tmp_path, published):
    layouts.folders(tmp_path / "imagenet100", layouts.photos(CMC))
    shutil.rmtree(tmp_path / "imagenet100" / "val" / CMC[3])
    published("imagenet100", pretrain=200, train=200, test=99)
    assert wrong("imagenet100", tmp_path) == {"classes of both splits"}
    found = checks("imagenet100", tmp_path)["classes of both splits"].found
    assert found == "100 for training, 99 for evaluation"


def test_pixels_of_an_evaluation_image_that_are_trained_on_are_found(tmp_path):
    layouts.stl10(tmp_path, 10, 8, 40)
    record = 3 * 96 * 96
    test, unlabeled = (tmp_path / "stl10_binary" / f"{s}_X.bin" for s in ("test", "unlabeled"))
    pixels = test.read_bytes()
    with open(unlabeled, "r+b") as file:
        file.seek(21 * record)
        file.write(pixels[4 * record : 5 * record])
    check = checks("stl10", tmp_path)["evaluation images that are also trained on"]
    assert not check.right
    assert check.found == f"1: {test}[4] is {unlabeled}[21]"


def test_hours_are_those_of_the_newest_benchmark(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    results = tmp_path / "benchmarks" / "results"
    results.mkdir(parents=True)
    for age, (name, hours) in enumerate((("a", 11.75), ("z", 99.0))):
        path = results / f"{name}.json"
        estimates = [{"dataset": "stl10", "hours_100_epochs": hours}]
        facts = {"machine": {"chip": backend.chip()}, "estimates": estimates}
        path.write_text(json.dumps(facts))
        os.utime(path, (1e9 - age, 1e9 - age))
    (results / "broken.json").write_text('{"estimates": [')
    (line,) = (line for line in hjepa("list").output.splitlines() if "quick alternative" in line)
    assert line.split()[-1] == "11.8"


def test_bad_input_of_verify_and_list_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for arguments, says in (
        (("verify", "stl1"), "mean 'stl10'"),
        (("verify", "folder"), "give --data-dir FOLDER"),
        (("verify", "stl10", "--json", "no/such.json"), "folder no does not exist"),
        (("list", "--json", "."), "is a folder"),
    ):
        ended = hjepa(*arguments)
        assert ended.exit_code == 2, arguments
        assert says in ended.output
        assert ended.output.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_combine_names_its_file_and_does_not_write_over_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first = hjepa("combine", "stl10", "cifar10", "--weight", "3", "--weight", "1")
    assert first.exit_code == 0
    assert "Train with: hjepa-mlx train stl10_cifar10.yaml" in first.output
    written = (tmp_path / "stl10_cifar10.yaml").read_bytes()
    data = load_config(tmp_path / "stl10_cifar10.yaml").data
    assert (data.name, data.weights) == ("stl10+cifar10", [3.0, 1.0])
    again = hjepa("combine", "stl10", "cifar10")
    assert again.exit_code == 2
    assert "exists already" in again.output
    assert (tmp_path / "stl10_cifar10.yaml").read_bytes() == written
