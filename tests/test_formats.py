"""Every data set in every published layout: the right pictures with the right labels."""

import io
import os
import shutil
import tarfile
from contextlib import closing
from itertools import islice

import layouts
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from layouts import CMC, KAGGLE, OTHERS
from PIL import Image

from hjepa_mlx.config import Data
from hjepa_mlx.data.pipeline import Position, Skipped, evaluation_images, training_batches
from hjepa_mlx.data.sources import open_source
from hjepa_mlx.data.storage import StorageError
from hjepa_mlx.errors import HJEPAError, UsageError


def source(root, name, split, **keys):
    return open_source(Data(name=name, dir=str(root), **keys), split)


def decoded(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)))


def contents(found) -> list[tuple[str, bytes]]:
    """(class, JPEG bytes) of every image, sorted."""
    return sorted(
        (found.classes[found.labels[i]], found.images.read(int(found.rows[i])))
        for i in range(len(found))
    )


# Raw pixels


@pytest.mark.parametrize("inner", ["", "cifar10"])
def test_cifar10_comes_back_pixel_for_pixel(tmp_path, inner):
    made = layouts.cifar10(tmp_path / inner, per_batch=20)
    for split in ("pretrain", "train", "test"):
        images, labels = made["test" if split == "test" else "train"]
        found = source(tmp_path, "cifar10", split)
        assert found.labels.tolist() == labels
        assert all(np.array_equal(found.read(i), image) for i, image in enumerate(images))
        assert len(found) == len(images)
        assert len(found.classes) == 10


def test_stl10_comes_back_pixel_for_pixel_and_is_pretrained_on_the_unlabelled(tmp_path):
    made = layouts.stl10(tmp_path / "stl10", train=20, test=10, unlabeled=30)
    for split, stem in (("pretrain", "unlabeled"), ("train", "train"), ("test", "test")):
        images, labels = made[stem]
        found = source(tmp_path, "stl10", split)
        assert len(found) == len(images)
        assert all(np.array_equal(found.read(i), image) for i, image in enumerate(images))
        assert found.labels.tolist() == ([] if split == "pretrain" else labels)


@pytest.mark.parametrize(
    ("name", "file", "damage"),
    [
        ("cifar10", "cifar-10-batches-bin/data_batch_3.bin", lambda data: data[:-1]),
        ("cifar10", "cifar-10-batches-bin/data_batch_3.bin", lambda data: b"\xff" + data[1:]),
        ("stl10", "stl10_binary/unlabeled_X.bin", lambda data: data[:5000]),
        ("stl10", "stl10_binary/train_y.bin", lambda data: data[:-1]),
        ("stl10", "stl10_binary/train_y.bin", lambda data: b"\x00" + data[1:]),
    ],
)
def test_raw_files_that_are_cut_or_do_not_belong_together_are_refused(tmp_path, name, file, damage):
    getattr(layouts, name)(tmp_path)
    path = tmp_path / file
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(HJEPAError, match=os.path.dirname(file)):
        [source(tmp_path, name, split) for split in ("pretrain", "train")]


# ImageNet

HUNDRED = {
    "folders": layouts.folders,
    "tars": layouts.tars,
    "contest": layouts.kaggle_contest,
    "parquet": layouts.parquet,
}


@pytest.fixture(scope="module", params=HUNDRED)
def hundred(request, tmp_path_factory):
    """CMC's hundred classes in each layout, and what is in them."""
    root = tmp_path_factory.mktemp(request.param)
    made = layouts.photos(CMC)
    HUNDRED[request.param](root / "imagenet100", made)
    return root, made


def test_imagenet100_has_cmcs_order_in_every_layout(hundred):
    root, made = hundred
    for split in ("train", "val"):
        found = source(root, "imagenet100", "test" if split == "val" else split)
        assert found.classes == CMC
        assert contents(found) == sorted((name, data) for name, _, data in made[split])
        for index in (0, 7, len(found) - 1):
            raw = found.images.read(int(found.rows[index]))
            assert np.array_equal(decoded(raw), decoded(found.read(index).tobytes()))
            assert found.label_of(index)


@pytest.mark.parametrize("layout", [layouts.folders, layouts.tars, layouts.kaggle_contest])
def test_imagenet100_is_cut_out_of_an_imagenet1k_beside_it(tmp_path, layout):
    made = layouts.photos(CMC + OTHERS, train=1)
    layout(tmp_path / "imagenet1k", made)
    for split in ("train", "val"):
        expected = sorted((name, data) for name, _, data in made[split] if name in CMC)
        found = source(tmp_path, "imagenet100", "test" if split == "val" else "pretrain")
        assert found.classes == CMC
        assert contents(found) == expected
        whole = source(tmp_path, "imagenet1k", "test" if split == "val" else "pretrain")
        assert whole.classes == tuple(sorted(CMC + OTHERS))
        assert len(whole) == len(expected) + 3


def test_kaggles_hundred_keep_the_order_of_their_own_list(tmp_path):
    made = layouts.photos(KAGGLE)
    layouts.kaggle_hundred(tmp_path / "imagenet100", made)
    for split in ("train", "val"):
        found = source(tmp_path, "imagenet100", "test" if split == "val" else "train")
        assert found.classes == KAGGLE
        assert contents(found) == sorted((name, data) for name, _, data in made[split])


def test_the_extracted_development_kit_serves_as_well(tmp_path):
    made = layouts.photos(CMC[:5])
    layouts.tars(tmp_path, made)
    kit = tmp_path / f"{layouts.KIT}.tar.gz"
    with tarfile.open(kit) as tar:
        tar.extractall(tmp_path, filter="data")
    kit.unlink()
    found = source(tmp_path, "imagenet1k", "test")
    assert contents(found) == sorted((name, data) for name, _, data in made["val"])


def test_what_is_missing_of_an_imagenet_is_named(tmp_path):
    made = layouts.photos(CMC[:3])
    layouts.tars(tmp_path / "tars", made)
    (tmp_path / "tars" / f"{layouts.KIT}.tar.gz").unlink()
    assert len(source(tmp_path / "tars", "imagenet1k", "train")) == 6
    with pytest.raises(HJEPAError, match=rf"put {layouts.KIT}.*LOC_val_solution.csv there"):
        source(tmp_path / "tars", "imagenet1k", "test")
    (tmp_path / "tars/ILSVRC2012_img_val.tar").unlink()
    with pytest.raises(HJEPAError, match=r"ILSVRC2012_img_val\.tar is not beside it"):
        source(tmp_path / "tars", "imagenet1k", "test")
    layouts.folders(tmp_path / "folders", {"train": made["train"]})
    with pytest.raises(HJEPAError, match="val/ is not beside it"):
        source(tmp_path / "folders", "imagenet1k", "test")
    layouts.parquet(tmp_path / "parquet", made)
    next((tmp_path / "parquet/data").glob("train-00001-*")).unlink()
    with pytest.raises(HJEPAError, match="has 2 of 3 parquet files"):
        source(tmp_path / "parquet", "imagenet100", "train")


def test_a_hundred_cannot_be_chosen_out_of_classes_named_in_words(tmp_path):
    made = layouts.photos(CMC)
    layouts.parquet(tmp_path / "imagenet100", made, words=[f"word {n}" for n in range(1000)])
    with pytest.raises(HJEPAError, match="not named by WordNet ids"):
        source(tmp_path, "imagenet100", "train")


def test_a_foreign_parquet_file_is_named(tmp_path):
    table = pa.table({"picture": [b"x"], "label": [0]})
    pq.write_table(table, tmp_path / "train-00000-of-00001.parquet")
    with pytest.raises(HJEPAError, match=r"train-00000.*with columns image and label") as error:
        source(tmp_path, "imagenet100", "train")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("layout", "file"),
    [
        (layouts.tars, "ILSVRC2012_img_train.tar"),
        (layouts.parquet, "data/train-00000-of-00003-0123456789abcdef.parquet"),
    ],
)
def test_a_cut_archive_is_named(tmp_path, layout, file):
    layout(tmp_path, layouts.photos(CMC[:4]))
    path = tmp_path / file
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(HJEPAError, match=path.name):
        source(tmp_path, "imagenet100", "train")


@pytest.mark.parametrize(
    "name", ["cifar10", "stl10", "imagenet100", "imagenet1k", "imagenet100+stl10"]
)
def test_without_the_data_one_line_says_how_to_get_it(tmp_path, name):
    first = name.split("+")[0]
    with pytest.raises(HJEPAError) as error:
        source(tmp_path, name, "pretrain")
    command = f"hjepa-mlx datasets download {first} --data-dir {tmp_path}"
    assert str(error.value).endswith(command)


# Several data sets at once


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """ImageNet-100 in folders (200 images) and STL-10 (100 unlabelled)."""
    root = tmp_path_factory.mktemp("both")
    photos = layouts.photos(CMC)
    layouts.folders(root / "imagenet100", photos)
    return root, photos, layouts.stl10(root / "stl10", unlabeled=100)["unlabeled"][0]


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


def test_evaluation_of_several_is_on_the_first(both):
    root, photos, _ = both
    found = source(root, "imagenet100+stl10", "test")
    assert found.classes == CMC
    assert len(found) == len(photos["val"])


@pytest.mark.parametrize("weights", [[1.0, 1.0], [2.0, 1.0], [1.0, 5.0], [0.01, 1.0]])
def test_the_mix_of_every_pass_is_that_of_the_weights(both, weights):
    joined = source(both[0], "imagenet100+stl10", "pretrain", weights=weights)
    for number in range(3):
        order, rows = joined.pass_order(0, number)
        assert sorted(rows) == list(range(len(order)))
        share = weights[0] / sum(weights)
        assert (order < 200).sum() == max(1, round(300 * share))
        for part, size in ((order[order < 200], 200), (order[order >= 200] - 200, 100)):
            times = np.bincount(part, minlength=size)
            assert times.max() - times.min() <= 1


def test_without_weights_each_image_comes_once(both):
    joined = source(both[0], "imagenet100+stl10", "pretrain")
    first, again, second = (joined.pass_order(0, n)[0] for n in (0, 0, 1))
    assert sorted(first) == list(range(300))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, second)
    assert not np.array_equal(first, joined.pass_order(1, 0)[0])


@pytest.mark.parametrize("limit", [64, 65, 67, 299])
def test_a_pass_has_as_many_images_as_its_parts_together(both, limit):
    joined = source(both[0], "imagenet100+stl10", "pretrain", weights=[1.0, 1.0], limit=limit)
    assert sum(joined.shares) == len(joined) == len(joined.pass_order(0, 0)[0])


def test_a_data_set_named_twice_is_refused(both):
    with pytest.raises(UsageError, match="has a data set twice"):
        source(both[0], "stl10+stl10", "pretrain")


def test_limit_cuts_each_part_in_proportion(both):
    limited = source(both[0], "imagenet100+stl10", "pretrain", limit=30)
    assert limited.parts == (20, 10)
    assert len(limited) == 30
    assert limited.read(29).dtype == np.uint8


def test_weights_must_fit_the_names(both):
    for name, weights in (("imagenet100+stl10", [1.0]), ("stl10", [1.0, 2.0])):
        with pytest.raises(UsageError, match=r"needs one weight a data set"):
            source(both[0], name, "pretrain", weights=weights)
    with pytest.raises(UsageError, match="mean 'stl10'"):
        source(both[0], "imagenet100+stl1", "pretrain")


def test_augmentation_of_a_mix_does_not_depend_on_the_number_of_workers(both, tiny_config):
    root = both[0]
    joined = source(root, "imagenet100+stl10", "pretrain", weights=[1.0, 3.0])
    seen = []
    for workers in (1, 2, 4):
        config = tiny_config(data={"workers": workers, "batch_size": 32})
        with closing(training_batches(joined, config, Position(), Skipped())) as batches:
            seen.append(np.stack([batch.images for batch in islice(batches, 12)]))
    assert np.array_equal(seen[0], seen[1])
    assert np.array_equal(seen[0], seen[2])


# A disk that goes away


def drain(batches, count: int) -> None:
    for _ in range(count):
        next(batches)


def spoil(path, how: str) -> None:
    if how == "gone" and path.is_dir():
        shutil.rmtree(path)
    elif how == "gone":
        path.unlink()
    elif how == "cut":
        os.truncate(path, path.stat().st_size // 2)
    else:
        path.write_bytes(path.read_bytes() + b"more")


@pytest.mark.parametrize(
    ("name", "layout", "file"),
    [
        ("stl10", lambda root: layouts.stl10(root), "stl10_binary/unlabeled_X.bin"),
        (
            "imagenet1k",
            lambda root: layouts.tars(root, layouts.photos(CMC)),
            "ILSVRC2012_img_train.tar",
        ),
        (
            "imagenet100",
            lambda root: layouts.parquet(root, layouts.photos(CMC), files=1),
            "data/train-00000-of-00001-0123456789abcdef.parquet",
        ),
    ],
)
@pytest.mark.parametrize("how", ["gone", "cut", "changed"])
def test_a_file_that_goes_away_while_training_is_named(
    tmp_path, tiny_config, name, layout, file, how
):
    layout(tmp_path)
    found = source(tmp_path, name, "pretrain")
    batches = training_batches(found, tiny_config(), Position(), Skipped())
    with closing(batches):
        next(batches)
        spoil(tmp_path / file, how)
        with pytest.raises(StorageError, match=os.path.basename(file)):
            drain(batches, 200)


def test_a_folder_that_goes_away_is_named_but_one_missing_file_is_skipped(tmp_path, tiny_config):
    layouts.folders(tmp_path / "imagenet100", layouts.photos(CMC))
    found = source(tmp_path, "imagenet100", "pretrain")
    skipped = Skipped()
    with closing(training_batches(found, tiny_config(), Position(), skipped)) as batches:
        next(batches)
        os.unlink(found.label_of(3))
        drain(batches, 100)
        assert [os.path.basename(n) for n in skipped.reasons] == [
            os.path.basename(found.label_of(3))
        ]
        spoil(tmp_path / "imagenet100", "gone")
        with pytest.raises(StorageError, match="imagenet100 cannot be read any more"):
            drain(batches, 100)


@pytest.mark.parametrize("emptied", ["train moved", "mount point left empty"])
def test_a_disk_that_leaves_its_folder_behind_is_noticed(tmp_path, tiny_config, emptied):
    layouts.folders(tmp_path / "imagenet100", layouts.photos(CMC))
    found = source(tmp_path, "imagenet100", "pretrain")
    with closing(training_batches(found, tiny_config(), Position(), Skipped())) as batches:
        next(batches)
        if emptied == "train moved":
            (tmp_path / "imagenet100/train").rename(tmp_path / "away")
        else:
            shutil.rmtree(tmp_path / "imagenet100")
            (tmp_path / "imagenet100").mkdir()
        with pytest.raises(StorageError, match="imagenet100 cannot be read any more"):
            drain(batches, 100)
