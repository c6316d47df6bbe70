"""The prepared form: it opens, whoever made it, or is refused in one line."""

import json
import os
import shutil

import layouts
import pytest
from layouts import CMC
from test_own_pictures import hjepa

from hjepa_mlx.data import prepared
from hjepa_mlx.data.prepare import originals_of, prepare
from hjepa_mlx.data.source import open_source
from hjepa_mlx.errors import HJEPAError, UsageError
from hjepa_mlx.sections import Data


def sources(root, name, **keys):
    return {s: open_source(Data(name=name, dir=str(root), **keys), s) for s in ("train", "test")}


def test_shards_that_the_first_version_made_still_open(tmp_path):
    layouts.folders(tmp_path / "imagenet100", layouts.photos(CMC))
    new = layouts.prepared(tmp_path, "imagenet100", side=32)
    made = prepared.manifest(new)
    before = {
        split: source.fingerprint for split, source in sources(tmp_path, "imagenet100").items()
    }
    made |= {"format": 1, "sources": made.pop("originals")}
    for split in made["splits"].values():
        split["shards"] = split.pop("files")
    (new / "dataset.json").write_text(json.dumps(made))
    old = new.rename(tmp_path / "imagenet100/shards")
    for where, name in ((tmp_path, "imagenet100"), (old, "imagenet100"), (old, "folder")):
        found = sources(where, name)
        assert {split: source.fingerprint for split, source in found.items()} == before
        assert [len(source) for source in found.values()] == [200, 100]
    with pytest.raises(HJEPAError, match="datasets download stl10"):  # it is not taken for another
        sources(old, "stl10")


def test_splits_of_a_data_set_whose_classes_differ_are_refused_those_of_a_folder_kept(tmp_path):
    made = layouts.photos(CMC, train=2, val=1)
    layouts.folders(tmp_path / "imagenet100", made)
    shutil.rmtree(tmp_path / "imagenet100" / "val" / min(CMC))
    with pytest.raises(UsageError, match=r"different classes: 100 and 99; only"):
        layouts.prepared(tmp_path, "imagenet100")
    root = tmp_path / "imagenet100"
    prepare("folder", originals_of("folder", root), tmp_path / "small", side=32)
    train, test = sources(tmp_path / "small", "folder").values()
    assert train.classes == test.classes == tuple(sorted(CMC))
    assert sorted(set(test.labels)) == list(range(1, 100))


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """ImageNet-100 in several shards, CIFAR-10 in arrays."""
    root = tmp_path_factory.mktemp("both")
    layouts.folders(root / "imagenet100", layouts.photos(CMC))
    layouts.cifar10(root / "cifar10", per_batch=5)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepared, "SHARD", 32)
        for name in ("imagenet100", "cifar10"):
            layouts.prepared(root, name)
    return root


@pytest.mark.parametrize("how", ["cut", "gone"])
@pytest.mark.parametrize(
    "file",
    ["train-00002.tar", "train-00002.npy", "dataset.json", "train-images.npy", "train-labels.npy"],
)
def test_damaged_files_are_named_when_opened(both, tmp_path, file, how):
    name = "cifar10" if file.endswith("s.npy") else "imagenet100"
    path = shutil.copytree(both / name, tmp_path / name) / "prepared" / file
    if how == "gone":
        path.unlink()
    else:
        os.truncate(path, path.stat().st_size // 3)
    gone = "datasets prepare" if (how, file) == ("gone", "dataset.json") else file
    with pytest.raises(HJEPAError, match=gone):
        sources(tmp_path, name)


def test_a_prepared_folder_of_ones_own_pictures_trains_as_folder_does(tmp_path):
    layouts.folders(tmp_path / "mine", layouts.photos(CMC[:3], train=10, val=3))
    mine = sources(tmp_path / "mine", "folder")
    prepare("folder", originals_of("folder", tmp_path / "mine"), tmp_path / "small", side=32)
    small = sources(tmp_path / "small", "folder")
    assert small["train"].classes == mine["train"].classes
    assert small["train"].labels.tolist() == mine["train"].labels.tolist()
    assert len(small["test"]) == 9


def test_a_prepared_folder_has_the_labels_that_were_asked_for_and_no_others(tmp_path):
    layouts.folders(tmp_path / "mine", layouts.photos(CMC[:2], train=10, val=3))
    images = sorted((tmp_path / "mine").rglob("*.JPEG"))
    lines = [f"{image},{'even' if n % 2 == 0 else 'odd'}" for n, image in enumerate(images)]
    (tmp_path / "own.csv").write_text("\n".join(lines))
    command = ["datasets", "prepare", "folder", "--data-dir", tmp_path / "mine"]
    labels = ["--labels", tmp_path / "own.csv"]
    ended = hjepa(*command, "--out", tmp_path / "small", *labels)
    assert ended.exit_code == 0, ended.output
    assert sources(tmp_path / "small", "folder")["train"].classes == ("even", "odd")
    (note,) = sources(tmp_path / "small", "folder", labels="none")["train"].notes
    assert "does nothing here" in note
    assert "of your own pictures" in hjepa("datasets", "prepare", "stl10", *labels).stderr
