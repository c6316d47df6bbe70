"""`datasets verify`: each check is right for a right data set, and wrong for a wrong one."""

import json

import layouts
import pytest
from layouts import CMC, KAGGLE, OTHERS
from typer.testing import CliRunner

from hjepa_mlx.cli import app
from hjepa_mlx.data.catalog import CATALOG, class_list
from hjepa_mlx.data.verify import Check, verify
from hjepa_mlx.sections import Data


def hjepa(*arguments: object):
    return CliRunner().invoke(app, ["datasets", *map(str, arguments)])


def checks(name: str, root) -> dict[str, Check]:
    return {
        check.what.removeprefix(name).lstrip(": "): check
        for check in verify(Data(name=name, dir=str(root)))
    }


def wrong(name: str, root) -> set[str]:
    return {what for what, check in checks(name, root).items() if check.right is False}


@pytest.fixture
def published(monkeypatch):
    """Says that a data set was published with these counts."""

    def set_counts(name: str, **splits: int) -> None:
        row = CATALOG[name].model_copy(update={"splits": splits})
        monkeypatch.setitem(CATALOG, name, row)

    return set_counts


@pytest.fixture
def hundred(tmp_path, published):
    """A right ImageNet-100 of 200 + 100 images, prepared."""
    layouts.folders(tmp_path / "imagenet100", layouts.photos(CMC))
    layouts.prepared(tmp_path, "imagenet100", side=32)
    published("imagenet100", pretrain=200, train=200, test=100)
    return tmp_path


HUNDRED = {"pretrain": 200, "train": 200, "test": 100}
SETS = {
    "cifar10": (lambda root: layouts.cifar10(root, 10), {"pretrain": 50, "train": 50, "test": 10}),
    "stl10": (
        lambda root: layouts.stl10(root, 10, 8, 20),
        {"pretrain": 20, "train": 10, "test": 8},
    ),
    "imagenet100": (lambda root: layouts.parquet(root, layouts.photos(CMC)), HUNDRED),
}


@pytest.mark.parametrize("name", SETS)
def test_a_right_data_set_is_right_and_a_small_one_is_not_the_published_one(
    tmp_path, published, name
):
    make, splits = SETS[name]
    make(tmp_path / name)
    layouts.prepared(tmp_path, name)
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
    assert found["files"].found == "2 as recorded"


@pytest.mark.parametrize("file", ["test-00000.tar", "train-images.npy", "test-labels.npy"])
def test_a_changed_byte_is_found_and_named(hundred, file):
    name = "imagenet100" if file.endswith("tar") else "cifar10"
    if name == "cifar10":
        layouts.cifar10(hundred / name, 10)
        layouts.prepared(hundred, name)
    path = hundred / name / "prepared" / file
    data = bytearray(path.read_bytes())
    data[600 if name == "imagenet100" else 128] ^= 1
    path.write_bytes(data)
    assert "files" in wrong(name, hundred)
    assert f"{path} has changed" in checks(name, hundred)["files"].found


def test_unreadable_images_are_counted_and_named(tmp_path):
    layouts.folders(tmp_path, layouts.photos(CMC[:20], train=5))
    for number, path in enumerate(sorted((tmp_path / "train").rglob("*.JPEG"))[:7]):
        path.write_bytes([b"", b"text", path.read_bytes()[:500]][number % 3])
    check = checks("folder", tmp_path)["pretrain: unreadable"]
    assert not check.right
    assert check.found.startswith("7 of 100: ")
    assert check.found.count(".JPEG") == 5


def test_an_unreadable_image_inside_a_shard_is_named(hundred):
    path = hundred / "imagenet100/prepared/train-00000.tar"
    data = bytearray(path.read_bytes())
    data[512:700] = bytes(188)
    path.write_bytes(data)
    check = checks("imagenet100", hundred)["pretrain: unreadable"]
    assert not check.right
    assert check.found.startswith(f"1 of 200: {path}:n")


def test_the_lists_called_imagenet100_are_told_apart(tmp_path):
    layouts.kaggle_hundred(tmp_path / "k" / "imagenet100", layouts.photos(KAGGLE))
    layouts.prepared(tmp_path / "k", "imagenet100")
    check = checks("imagenet100", tmp_path / "k")["classes"]
    assert check.right
    assert check.found.startswith("Kaggle's ImageNet-100: scores do not compare")
    assert "published: 130,000" in checks("imagenet100", tmp_path / "k")["pretrain"].found
    layouts.folders(tmp_path / "o" / "imagenet100", layouts.photos(CMC[:50] + OTHERS))
    layouts.prepared(tmp_path / "o", "imagenet100")
    check = checks("imagenet100", tmp_path / "o")["classes"]
    assert not check.right
    assert check.found == "an unknown list of 53 classes"


def test_the_two_lists_are_those_of_their_publishers():
    cmc, kaggle = class_list("cmc"), class_list("kaggle")
    assert (cmc[0], cmc[1], cmc[99]) == ("n02869837", "n01749939", "n02090622")
    assert (kaggle[0], kaggle[99]) == ("n01968897", "n01514668")
    assert len(set(cmc)) == len(set(kaggle)) == 100
    assert len(set(cmc) & set(kaggle)) == 8


def test_test_images_that_are_trained_on_are_found(tmp_path):
    made = layouts.photos(CMC[:9])
    owner, trained, data = made["train"][11]
    place = [name for name, _, _ in made["val"]].index(owner)
    tested = made["val"][place][1]
    made["val"][place] = (owner, tested, data)
    layouts.folders(tmp_path, made)
    assert not wrong("folder", tmp_path)  # one may train on them all the same
    found = checks("folder", tmp_path)["test images that are also trained on"].found
    assert found.startswith("1: ")
    assert tested in found
    assert trained in found


def test_pixels_of_a_test_image_that_are_trained_on_are_found(tmp_path):
    layouts.stl10(tmp_path, 10, 8, 40)
    record = 3 * 96 * 96
    test, unlabeled = (tmp_path / "stl10_binary" / f"{s}_X.bin" for s in ("test", "unlabeled"))
    pixels = test.read_bytes()
    with open(unlabeled, "r+b") as file:
        file.seek(21 * record)
        file.write(pixels[4 * record : 5 * record])
    folder = layouts.prepared(tmp_path, "stl10")
    check = checks("stl10", tmp_path)["test images that are also trained on"]
    assert not check.right
    assert check.found == f"1: {folder}/test-images.npy[4] is {folder}/pretrain-images.npy[21]"


def test_missing_data_is_an_error_with_the_command(tmp_path):
    ended = hjepa("verify", "stl10", "--data-dir", tmp_path)
    assert ended.exit_code == 1
    assert "hjepa-mlx datasets download stl10" in ended.output


def test_verify_of_several_checks_each_and_json_says_the_same(tmp_path):
    layouts.stl10(tmp_path / "stl10", 10, 8, 20)
    layouts.cifar10(tmp_path / "cifar10", 10)
    for name in ("stl10", "cifar10"):
        layouts.prepared(tmp_path, name)
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


def test_a_folder_of_ones_own_pictures_is_no_imagenet(tmp_path):
    (tmp_path / "train" / "cats").mkdir(parents=True)
    rows = json.loads(hjepa("list", "--data-dir", tmp_path, "--json", "-").output)["datasets"]
    here = {row["name"]: row["here"]["layout"] for row in rows}
    assert here["imagenet100"] is here["imagenet1k"] is None
