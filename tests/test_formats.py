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
from hjepa_mlx.data import prepared
from hjepa_mlx.data.catalog import CATALOG
from hjepa_mlx.data.pipeline import Position, Skipped, evaluation_images, training_batches
from hjepa_mlx.data.prepare import originals_of
from hjepa_mlx.data.source import layout, open_source
from hjepa_mlx.data.storage import StorageError
from hjepa_mlx.errors import HJEPAError, UsageError

SPLITS = ("pretrain", "train", "test")


def source(root, name, split, **keys):
    return open_source(Data(name=name, dir=str(root), **keys), split)


def drained(root, name, split) -> tuple[tuple[str, ...], list[tuple[str, bytes]]]:
    """Classes of a published split, and (class, JPEG bytes) of every image, sorted."""
    original = originals_of(name, root)[split]
    items = [(original.classes[item.label], item.read()) for item in original.items()]
    return original.classes, sorted(items)


def sorted_photos(made, split) -> list[tuple[str, bytes]]:
    return sorted((name, data) for name, _, data in made["val" if split == "test" else split])


# Raw pixels


def archived(root, name) -> None:
    """Leave only the archive as it is published."""
    (inner,) = root.iterdir()
    layouts.archive(inner, root / CATALOG[name].files[0].name)
    shutil.rmtree(inner)


@pytest.mark.parametrize("packed", [False, True], ids=["unpacked", "archive"])
@pytest.mark.parametrize("inner", ["", "cifar10"])
def test_cifar10_comes_back_pixel_for_pixel(tmp_path, inner, packed):
    made = layouts.cifar10(tmp_path / inner, per_batch=20)
    if packed:
        archived(tmp_path / inner, "cifar10")
    layouts.prepared(tmp_path, "cifar10")
    for split in SPLITS:
        images, labels = made["test" if split == "test" else "train"]
        found = source(tmp_path, "cifar10", split)
        assert found.labels.tolist() == labels
        assert all(np.array_equal(found.read(i), image) for i, image in enumerate(images))
        assert len(found) == len(images)
    assert " ".join(found.classes) == "airplane automobile bird cat deer dog frog horse ship truck"


@pytest.mark.parametrize("packed", [False, True], ids=["unpacked", "archive"])
def test_stl10_comes_back_pixel_for_pixel_and_is_pretrained_on_the_unlabelled(tmp_path, packed):
    made = layouts.stl10(tmp_path / "stl10", train=20, test=10, unlabeled=30)
    if packed:
        archived(tmp_path / "stl10", "stl10")
    layouts.prepared(tmp_path, "stl10")
    for split, stem in (("pretrain", "unlabeled"), ("train", "train"), ("test", "test")):
        images, labels = made[stem]
        found = source(tmp_path, "stl10", split)
        assert len(found) == len(images)
        assert all(np.array_equal(found.read(i), image) for i, image in enumerate(images))
        assert found.labels.tolist() == ([] if split == "pretrain" else labels)
    assert " ".join(found.classes) == "airplane bird car cat deer dog horse monkey ship truck"


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
        layouts.prepared(tmp_path, name)
    assert not (tmp_path / name / "prepared" / prepared.MANIFEST).exists() or not prepared.complete(
        tmp_path / name / "prepared"
    )


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
    for split in ("train", "test"):
        assert drained(root, "imagenet100", split) == (CMC, sorted_photos(made, split))
        assert drained(root / "imagenet100", "imagenet100", split)[0] == CMC


@pytest.mark.parametrize("ready", [False, True], ids=["original", "prepared"])
@pytest.mark.parametrize("layout", [layouts.folders, layouts.tars, layouts.kaggle_contest])
def test_imagenet100_is_cut_out_of_an_imagenet1k_beside_it(tmp_path, layout, ready):
    made = layouts.photos(CMC + OTHERS, train=1)
    layout(tmp_path / "imagenet1k", made)
    assert drained(tmp_path, "imagenet1k", "test")[0] == tuple(sorted(CMC + OTHERS))
    if ready:
        layouts.prepared(tmp_path, "imagenet1k")
    for split in ("train", "test"):
        expected = [(name, data) for name, data in sorted_photos(made, split) if name in CMC]
        assert drained(tmp_path, "imagenet100", split) == (CMC, expected)
        assert originals_of("imagenet100", tmp_path)[split].files == ()  # ImageNet-1K's own


def test_kaggles_hundred_keep_the_order_of_their_own_list(tmp_path):
    made = layouts.photos(KAGGLE)
    layouts.kaggle_hundred(tmp_path / "imagenet100", made)
    for split in ("train", "test"):
        assert drained(tmp_path, "imagenet100", split) == (KAGGLE, sorted_photos(made, split))


def unpack_kit(root) -> None:
    kit = root / f"{layouts.KIT}.tar.gz"
    with tarfile.open(kit) as tar:
        tar.extractall(root, filter="data")
    kit.unlink()


def test_the_extracted_development_kit_serves_as_well(tmp_path):
    made = layouts.photos(CMC[:5])
    layouts.tars(tmp_path, made)
    unpack_kit(tmp_path)
    assert drained(tmp_path, "imagenet1k", "test")[1] == sorted_photos(made, "test")


def test_missing_parts_of_an_imagenet_are_named(tmp_path):
    made = layouts.photos(CMC[:3])
    layouts.tars(tmp_path / "tars", made)
    (tmp_path / "tars" / f"{layouts.KIT}.tar.gz").unlink()
    with pytest.raises(HJEPAError, match=rf"put {layouts.KIT}.*LOC_val_solution.csv there"):
        originals_of("imagenet1k", tmp_path / "tars")
    (tmp_path / "tars/ILSVRC2012_img_val.tar").unlink()
    with pytest.raises(HJEPAError, match=r"ILSVRC2012_img_val\.tar is not beside it"):
        originals_of("imagenet1k", tmp_path / "tars")
    layouts.folders(tmp_path / "folders", {"train": made["train"]})
    with pytest.raises(HJEPAError, match="val/ is not beside it"):
        originals_of("imagenet1k", tmp_path / "folders")
    layouts.parquet(tmp_path / "parquet", made)
    next((tmp_path / "parquet/data").glob("train-00001-*")).unlink()
    with pytest.raises(HJEPAError, match="has 2 of 3 parquet files"):
        originals_of("imagenet100", tmp_path / "parquet")
    layouts.kaggle_hundred(tmp_path / "kaggle", layouts.photos(KAGGLE))
    shutil.rmtree(tmp_path / "kaggle" / "val.X")
    with pytest.raises(HJEPAError, match=r"val\.X"):
        originals_of("imagenet100", tmp_path / "kaggle")


def test_a_hundred_cannot_be_chosen_out_of_classes_named_in_words(tmp_path):
    made = layouts.photos(CMC)
    layouts.parquet(tmp_path / "imagenet100", made, words=[f"word {n}" for n in range(1000)])
    with pytest.raises(HJEPAError, match="not named by WordNet ids"):
        originals_of("imagenet100", tmp_path)


def test_a_foreign_parquet_file_is_named(tmp_path):
    table = pa.table({"picture": [b"x"], "label": [0]})
    pq.write_table(table, tmp_path / "train-00000-of-00001.parquet")
    with pytest.raises(HJEPAError, match=r"train-00000.*with columns image and label") as error:
        originals_of("imagenet100", tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("column", ["label", "image"])
def test_a_damaged_column_of_a_parquet_file_is_named(tmp_path, column):
    layouts.parquet(tmp_path, layouts.photos(CMC))
    path = sorted((tmp_path / "data").glob("train-*"))[1]
    group = pq.read_metadata(path).row_group(0)
    columns = [group.column(i) for i in range(group.num_columns)]
    part = next(part for part in columns if part.path_in_schema.startswith(column))
    data = bytearray(path.read_bytes())
    start = part.dictionary_page_offset or part.data_page_offset
    data[start : start + 30] = b"\xff" * 30
    path.write_bytes(data)
    with pytest.raises(HJEPAError, match=path.name) as error:
        drained(tmp_path, "imagenet100", "train")
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
        drained(tmp_path, "imagenet100", "train")


@pytest.mark.parametrize(
    "name", ["cifar10", "stl10", "imagenet100", "imagenet1k", "imagenet100+stl10"]
)
def test_without_the_data_one_line_says_how_to_get_it(tmp_path, name):
    first = name.split("+")[0]
    with pytest.raises(HJEPAError) as error:
        source(tmp_path, name, "pretrain")
    command = f"hjepa-mlx datasets download {first} --data-dir {tmp_path}"
    assert str(error.value).endswith(command)


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("cifar10", lambda root: layouts.cifar10(root, 5)),
        ("imagenet100", lambda root: layouts.parquet(root, layouts.photos(CMC[:3]))),
        ("imagenet1k", lambda root: layouts.tars(root, layouts.photos(CMC[:3]))),
    ],
)
def test_originals_are_not_trained_on_but_one_line_says_how_to_prepare_them(tmp_path, name, make):
    make(tmp_path / name)
    with pytest.raises(HJEPAError) as error:
        source(tmp_path, name, "pretrain")
    assert str(error.value).endswith(
        f"Run: hjepa-mlx datasets prepare {name} --data-dir {tmp_path}"
    )


# Several data sets at once


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


def test_each_image_comes_once_a_pass(both):
    joined = source(both[0], "imagenet100+stl10", "pretrain")
    first, again, second = (joined.pass_order(0, n) for n in (0, 0, 1))
    assert sorted(first) == list(range(300))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, second)
    assert not np.array_equal(first, joined.pass_order(1, 0))


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
    if how == "gone" and path.is_dir():
        shutil.rmtree(path)
    elif how == "gone":
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


def test_a_folder_that_goes_away_is_named_but_one_missing_file_is_skipped(tmp_path, tiny_config):
    layouts.folders(tmp_path / "mine", layouts.photos(CMC))
    found = source(tmp_path / "mine", "folder", "pretrain")
    skipped = Skipped()
    with closing(training_batches(found, tiny_config(), Position(), skipped)) as batches:
        next(batches)
        os.unlink(found.name_of(3))
        drain(batches, 100)
        assert list(skipped.reasons) == [found.name_of(3)]
        spoil(tmp_path / "mine", "gone")
        with pytest.raises(StorageError, match="mine/train cannot be read any more"):
            drain(batches, 100)


@pytest.mark.parametrize("emptied", ["train moved", "mount point left empty"])
def test_a_disk_that_leaves_its_folder_behind_is_noticed(tmp_path, tiny_config, emptied):
    layouts.folders(tmp_path / "mine", layouts.photos(CMC))
    found = source(tmp_path / "mine", "folder", "pretrain")
    with closing(training_batches(found, tiny_config(), Position(), Skipped())) as batches:
        next(batches)
        if emptied == "train moved":
            (tmp_path / "mine/train").rename(tmp_path / "away")
        else:
            shutil.rmtree(tmp_path / "mine")
            (tmp_path / "mine").mkdir()
        with pytest.raises(StorageError, match="mine/train cannot be read any more"):
            drain(batches, 100)


# Files that say which class an image has


CSV = "LOC_val_solution.csv"
TRUTH = f"{layouts.KIT}/data/ILSVRC2012_validation_ground_truth.txt"
META = f"{layouts.KIT}/data/meta.mat"
DAMAGED_TRUTH = {
    "a table with other columns": (CSV, lambda data: b"a,b\n1,2\n"),
    "a table without a class": (
        CSV,
        lambda data: b"ImageId,PredictionString\nILSVRC2012_val_00000001,\n",
    ),
    "a table cut in a row": (CSV, lambda data: data[:-45]),
    "a table that is no text": (CSV, lambda data: bytes(range(256))),
    "ground truth that is no number": (TRUTH, lambda data: b"x\n" + data),
    "ground truth of no class": (TRUTH, lambda data: b"99\n" + data[2:]),
    "ground truth of an inner node": (TRUTH, lambda data: b"6\n" + data[2:]),
    "meta.mat in half": (META, lambda data: data[: len(data) // 2]),
    "meta.mat that is text": (META, lambda data: b"text"),
    "meta.mat that is empty": (META, lambda data: b""),
}


@pytest.mark.parametrize(("file", "damage"), DAMAGED_TRUTH.values(), ids=DAMAGED_TRUTH)
def test_damaged_ground_truth_is_named(tmp_path, file, damage):
    made = layouts.photos(CMC[:5])
    if file == CSV:
        layouts.kaggle_contest(tmp_path, made)
    else:
        layouts.tars(tmp_path, made)
        unpack_kit(tmp_path)
    path = tmp_path / file
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(HJEPAError, match=path.name):
        originals_of("imagenet1k", tmp_path)


@pytest.mark.parametrize("content", [b"text", b"3", bytes(range(256))])
def test_a_damaged_list_of_kaggles_labels_is_named(tmp_path, content):
    layouts.kaggle_hundred(tmp_path, layouts.photos(KAGGLE))
    (tmp_path / "Labels.json").write_bytes(content)
    with pytest.raises(HJEPAError, match=r"Labels\.json"):
        originals_of("imagenet100", tmp_path)
