"""Several data sets at once, and disks that go away while a run reads from them."""

import io
import os
import shutil
from contextlib import closing
from itertools import islice

import layouts
import numpy as np
import pytest
from layouts import CMC
from PIL import Image

from hjepa_mlx.data import prepared
from hjepa_mlx.data.pipeline import Position, Skipped, evaluation_images, training_batches
from hjepa_mlx.data.source import layout, open_source
from hjepa_mlx.data.storage import StorageError
from hjepa_mlx.errors import UsageError
from hjepa_mlx.sections import Data

SPLITS = ("pretrain", "train", "test")


def source(root, name, split, **keys):
    return open_source(Data(name=name, dir=str(root), **keys), split)


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """ImageNet-100 (200 images) and STL-10 (100 unlabelled), prepared."""
    root = tmp_path_factory.mktemp("both")
    photos = layouts.photos(CMC)
    layouts.folders(root / "imagenet100", photos)
    made = layouts.stl10(root / "stl10", unlabeled=100)
    for name in ("imagenet100", "stl10"):
        layouts.prepared(root, name)
    return root, photos, made["unlabeled"][0]


def test_raw_and_encoded_images_come_through_one_pipeline(both, tiny_config):
    root, photos, raw = both
    joined = source(root, "imagenet100+stl10", "pretrain")
    config = tiny_config(data={"image_size": 96})
    images = dict(evaluation_images(joined, config, Skipped()))
    assert len(images) == len(joined) == 300
    assert all(np.array_equal(images[200 + i], pixels) for i, pixels in enumerate(raw))
    jpeg = photos["train"][0][2]
    square = Image.open(io.BytesIO(jpeg)).crop((10, 0, 70, 60))
    expected = np.asarray(square.resize((96, 96), Image.Resampling.BILINEAR)).astype(int)
    assert min(np.abs(images[i] - expected).mean() for i in range(200)) < 1.5


def test_several_are_found_here(both):
    data = Data(name="imagenet100+stl10", dir=str(both[0]))
    assert layout(data.name, data) == "prepared"
    assert layout("imagenet100+cifar10", data) is None


def test_evaluation_of_several_is_on_the_first(both):
    root, photos, _ = both
    found = source(root, "imagenet100+stl10", "test")
    assert found.classes == CMC
    assert len(found) == len(photos["val"])


def test_names_that_cannot_be_combined_are_refused(both):
    with pytest.raises(UsageError, match="names a data set twice"):
        source(both[0], "stl10+stl10", "pretrain")
    with pytest.raises(UsageError, match="mean 'stl10'"):
        source(both[0], "imagenet100+stl1", "pretrain")


def test_limit_cuts_each_part_in_proportion(both):
    limited = source(both[0], "imagenet100+stl10", "pretrain", limit=30)
    assert len(limited) == 30
    assert (limited.rows < 200).sum() == 20
    assert limited.read(29).dtype == np.uint8


def test_a_fingerprint_tells_other_images_labels_and_limits_apart(both, tmp_path):
    names = ("imagenet100", "stl10", "imagenet100+stl10")
    found = [source(both[0], name, "pretrain") for name in names]
    found += [source(both[0], "stl10", split) for split in ("train", "test")]
    found += [source(both[0], "stl10", "pretrain", limit=limit) for limit in (10, 11)]
    assert len({one.fingerprint for one in found}) == len(found)
    moved = shutil.copytree(both[0], tmp_path / "moved")
    for name, one in zip(names, found, strict=False):
        assert source(moved, name, "pretrain").fingerprint == one.fingerprint
    assert len({source("x", "demo", split).fingerprint for split in SPLITS}) == 2
    layouts.folders(tmp_path / "a", layouts.photos(CMC[:2]))
    before = source(tmp_path / "a", "folder", "train").fingerprint
    (tmp_path / "a").rename(tmp_path / "b")
    assert source(tmp_path / "b", "folder", "train").fingerprint == before
    next((tmp_path / "b/train").rglob("*.JPEG")).write_bytes(b"other")
    assert source(tmp_path / "b", "folder", "train").fingerprint != before


def test_training_on_a_mix_shows_each_image_at_its_place(both, tiny_config):
    joined = source(both[0], "imagenet100+stl10", "pretrain")
    whole = {"image_size": 96, "batch_size": 30, "flip": False, "crop_scale": [1.0, 1.0]}
    config = tiny_config(data=whole)
    with closing(training_batches(joined, config, Position(), Skipped())) as batches:
        seen = np.concatenate([batch.images for batch in islice(batches, 10)])
    order = joined.pass_order(config.seed, 0)
    assert len(seen) == len(order) == 300
    differences = []
    for image, index in zip(seen, order, strict=True):
        if index >= 200:
            assert np.array_equal(image, both[2][index - 200])
        else:
            jpeg = joined.images.read(int(joined.rows[index]))
            expected = Image.open(io.BytesIO(jpeg)).resize((96, 96), Image.Resampling.BILINEAR)
            differences.append(np.abs(image - np.asarray(expected).astype(int)).mean())
    assert max(differences) < 5  # a crop of the whole may lack one of its 80 columns
    assert np.mean(differences) < 0.5


# A disk that goes away


def drain(batches, count: int) -> None:
    for _ in range(count):
        next(batches)


def spoil(path, how: str) -> None:
    if how == "gone":
        path.unlink()
    elif how == "cut":
        os.truncate(path, path.stat().st_size // 2)
    else:
        path.write_bytes(path.read_bytes() + b"more")


@pytest.fixture(scope="module")
def ready(tmp_path_factory):
    """STL-10's 200 images in an array; ImageNet-100's 200 + 100 in shards of 32."""
    root = tmp_path_factory.mktemp("ready")
    layouts.folders(root / "imagenet100", layouts.photos(CMC))
    layouts.stl10(root / "stl10")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepared, "SHARD", 32)
        for name in ("imagenet100", "stl10"):
            layouts.prepared(root, name, side=32)
    return root


@pytest.mark.parametrize(
    ("name", "file"),
    [("stl10", "pretrain-images.npy"), ("imagenet100", "train-00001.tar")],
)
@pytest.mark.parametrize("how", ["gone", "cut", "changed"])
def test_a_file_that_goes_away_while_training_is_named(
    ready, tmp_path, tiny_config, name, file, how
):
    shutil.copytree(ready / name, tmp_path / name)
    found = source(tmp_path, name, "pretrain")
    with closing(training_batches(found, tiny_config(), Position(), Skipped())) as batches:
        next(batches)
        spoil(tmp_path / name / "prepared" / file, how)
        with pytest.raises(StorageError, match=file):
            drain(batches, 200)


def test_one_missing_file_of_a_folder_is_skipped(tmp_path, tiny_config):
    layouts.folders(tmp_path / "mine", layouts.photos(CMC))
    found = source(tmp_path / "mine", "folder", "pretrain")
    skipped = Skipped()
    with closing(training_batches(found, tiny_config(), Position(), skipped)) as batches:
        next(batches)
        os.unlink(found.name_of(3))
        drain(batches, 100)
        assert list(skipped) == [found.name_of(3)]


@pytest.mark.parametrize("emptied", ["gone", "train moved", "mount point left empty"])
def test_a_folder_that_goes_away_is_named(tmp_path, tiny_config, emptied):
    layouts.folders(tmp_path / "mine", layouts.photos(CMC))
    found = source(tmp_path / "mine", "folder", "pretrain")
    with closing(training_batches(found, tiny_config(), Position(), Skipped())) as batches:
        next(batches)
        if emptied == "train moved":
            (tmp_path / "mine/train").rename(tmp_path / "away")
        else:
            shutil.rmtree(tmp_path / "mine")
            if emptied != "gone":
                (tmp_path / "mine").mkdir()
        with pytest.raises(StorageError, match="mine/train cannot be read any more"):
            drain(batches, 100)
