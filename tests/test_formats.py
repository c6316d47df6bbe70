"""Every data set in every published layout: the right pictures with the right labels."""

import os
import shutil
import tarfile

import layouts
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from layouts import CMC, KAGGLE, OTHERS

from hjepa_mlx.data import prepared
from hjepa_mlx.data.catalog import CATALOG
from hjepa_mlx.data.prepare import originals_of
from hjepa_mlx.data.source import open_source
from hjepa_mlx.errors import HJEPAError
from hjepa_mlx.sections import Data

SPLITS = ("pretrain", "train", "test")
CLASSES = {
    "cifar10": "airplane automobile bird cat deer dog frog horse ship truck",
    "stl10": "airplane bird car cat deer dog horse monkey ship truck",
}


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
@pytest.mark.parametrize(
    ("name", "inner"), [("cifar10", ""), ("cifar10", "cifar10"), ("stl10", "")]
)
def test_raw_images_come_back_pixel_for_pixel(tmp_path, name, inner, packed):
    made = getattr(layouts, name)(tmp_path / inner)
    if packed:
        archived(tmp_path / inner, name)
    layouts.prepared(tmp_path, name)
    made["pretrain"] = (made["unlabeled"][0], []) if name == "stl10" else made["train"]
    for split in SPLITS:
        images, labels = made[split]
        found = source(tmp_path, name, split)
        assert found.labels.tolist() == labels
        assert len(found) == len(images)
        assert all(np.array_equal(found.read(i), image) for i, image in enumerate(images))
    assert " ".join(found.classes) == CLASSES[name]


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
    assert not prepared.complete(tmp_path / name / "prepared")


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


MISSING = {
    f"{layouts.KIT}.tar.gz": (layouts.tars, rf"put {layouts.KIT}.*LOC_val_solution.csv there"),
    "ILSVRC2012_img_val.tar": (layouts.tars, r"ILSVRC2012_img_val\.tar is not beside it"),
    "val": (layouts.folders, "here/val is missing"),
    "data/train-00001-*": (layouts.parquet, "has 2 of 3 parquet files"),
    "val.X": (layouts.kaggle_hundred, r"here/val\.X is missing"),
    "train.X3": (layouts.kaggle_hundred, r"here/train\.X3 is missing"),
}


@pytest.mark.parametrize("file", MISSING)
def test_missing_parts_of_an_imagenet_are_named(tmp_path, file):
    layout, says = MISSING[file]
    layout(tmp_path / "here", layouts.photos(KAGGLE if "X" in file else CMC[:3]))
    (missing,) = (tmp_path / "here").glob(file)
    missing.rename(tmp_path / "away")
    with pytest.raises(HJEPAError, match=says):
        originals_of("imagenet1k", tmp_path / "here")


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


@pytest.mark.parametrize("layout", [layouts.tars, layouts.parquet])
def test_a_cut_archive_is_named(tmp_path, layout):
    layout(tmp_path, layouts.photos(CMC[:4]))
    path = min(path for path in tmp_path.rglob("*train*") if path.is_file())
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
