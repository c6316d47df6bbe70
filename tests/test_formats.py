"""Every data set in every published layout: the right pictures with the right labels."""

import io
import os
import shutil
import tarfile
import threading
import time
from contextlib import closing
from itertools import islice

import layouts
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from layouts import CMC, KAGGLE, OTHERS
from PIL import Image

import hjepa_mlx as hj
from hjepa_mlx.config import Data
from hjepa_mlx.data import shards
from hjepa_mlx.data.pipeline import Position, Skipped, evaluation_images, training_batches
from hjepa_mlx.data.prepare import prepare
from hjepa_mlx.data.sources import layout as layout_of
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
            assert found.name_of(index)


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


def test_several_are_found_here_whatever_their_weights(both):
    for weights in ("auto", [2.0, 1.0]):
        data = Data(name="imagenet100+stl10", dir=str(both[0]), weights=weights)
        assert layout_of(data.name, data) == "folders + raw pixels"
    assert layout_of("imagenet100+cifar10", data) is None


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
    assert sorted(joined.take(np.arange(5)).pass_order(0, 0)[0]) == [0, 1, 2, 3, 4]


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
        with pytest.raises(UsageError, match=r"needs one weight per data set"):
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
        os.unlink(found.name_of(3))
        drain(batches, 100)
        assert [os.path.basename(n) for n in skipped.reasons] == [
            os.path.basename(found.name_of(3))
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


# Classes, and files that say which class an image has


@pytest.mark.parametrize(
    ("name", "classes"),
    [
        ("cifar10", "airplane automobile bird cat deer dog frog horse ship truck"),
        ("stl10", "airplane bird car cat deer dog horse monkey ship truck"),
    ],
)
def test_classes_are_in_the_publishers_order(tmp_path, name, classes):
    getattr(layouts, name)(tmp_path)
    assert source(tmp_path, name, "train").classes == tuple(classes.split())


def test_the_folder_of_the_data_set_itself_may_be_given(hundred):
    root, made = hundred
    found = source(root / "imagenet100", "imagenet100", "test")
    assert found.classes == CMC
    assert contents(found) == sorted((name, data) for name, _, data in made["val"])


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
        kit = tmp_path / f"{layouts.KIT}.tar.gz"
        with tarfile.open(kit) as tar:
            tar.extractall(tmp_path, filter="data")
        kit.unlink()
    path = tmp_path / file
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(HJEPAError, match=path.name):
        source(tmp_path, "imagenet1k", "test")


@pytest.mark.parametrize("content", [b"text", b"3", bytes(range(256))])
def test_a_damaged_list_of_kaggles_labels_is_named(tmp_path, content):
    layouts.kaggle_hundred(tmp_path, layouts.photos(KAGGLE))
    (tmp_path / "Labels.json").write_bytes(content)
    with pytest.raises(HJEPAError, match=r"Labels\.json"):
        source(tmp_path, "imagenet100", "train")


def test_kaggles_missing_validation_images_are_named(tmp_path):
    layouts.kaggle_hundred(tmp_path, layouts.photos(KAGGLE))
    shutil.rmtree(tmp_path / "val.X")
    with pytest.raises(HJEPAError, match=r"val\.X"):
        source(tmp_path, "imagenet100", "test")


def test_a_parquet_file_whose_labels_are_damaged_is_named(tmp_path):
    layouts.parquet(tmp_path, layouts.photos(CMC))
    path = sorted((tmp_path / "data").glob("train-*"))[1]
    group = pq.read_metadata(path).row_group(0)
    columns = [group.column(i) for i in range(group.num_columns)]
    (labels,) = (column for column in columns if column.path_in_schema == "label")
    data = bytearray(path.read_bytes())
    start = labels.dictionary_page_offset or labels.data_page_offset
    data[start : start + 30] = b"\xff" * 30
    path.write_bytes(data)
    with pytest.raises(HJEPAError, match=path.name) as error:
        source(tmp_path, "imagenet100", "train")
    assert "\n" not in str(error.value)


def test_training_on_a_mix_shows_each_image_at_its_place(both, tiny_config):
    joined = source(both[0], "imagenet100+stl10", "pretrain", weights=[1.0, 2.0])
    whole = {"image_size": 96, "batch_size": 30, "flip": False, "crop_scale": [1.0, 1.0]}
    config = tiny_config(data=whole)
    with closing(training_batches(joined, config, Position(), Skipped())) as batches:
        seen = np.concatenate([batch.images for batch in islice(batches, 10)])
    order, _ = joined.pass_order(config.seed, 0)
    assert len(seen) == len(order) == 300
    assert (order >= 200).sum() == 200
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


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """200 + 100 images in prepared shards of 32."""
    root = tmp_path_factory.mktemp("prepared")
    layouts.folders(root / "original" / "imagenet100", layouts.photos(CMC))
    originals = {s: source(root / "original", "imagenet100", s) for s in ("train", "test")}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "SHARD", 32)
        prepare("imagenet100", originals, root / "made" / "imagenet100" / "shards", side=32)
    return root / "made"


@pytest.mark.parametrize("how", ["gone", "cut", "changed"])
def test_a_shard_that_goes_away_while_training_is_named(tmp_path, tiny_config, prepared, how):
    shutil.copytree(prepared, tmp_path, dirs_exist_ok=True)
    found = source(tmp_path, "imagenet100", "pretrain")
    with closing(training_batches(found, tiny_config(), Position(), Skipped())) as batches:
        next(batches)
        spoil(tmp_path / "imagenet100/shards/train-00001.tar", how)
        with pytest.raises(StorageError, match=r"train-00001\.tar"):
            drain(batches, 200)


def test_a_run_whose_shard_is_cut_is_saved_and_goes_on(tmp_path, tiny_config, prepared, capsys):
    shutil.copytree(prepared, tmp_path, dirs_exist_ok=True)
    shard = tmp_path / "imagenet100/shards/train-00002.tar"
    whole = shard.read_bytes()
    config = tiny_config(
        data={"name": "imagenet100", "dir": str(tmp_path), "batch_size": 20},
        optim={"epochs": 3, "warmup_epochs": 1},
        run={"dir": str(tmp_path / "run"), "checkpoint_minutes": 1e-9, "keep_last": 2},
    )
    checkpoints = tmp_path / "run/checkpoints"

    def cut_after_the_first_checkpoint() -> None:
        while not list(checkpoints.glob("step-*")):
            time.sleep(0.001)
        os.truncate(shard, 100)

    thread = threading.Thread(target=cut_after_the_first_checkpoint, daemon=True)
    thread.start()
    with pytest.raises(HJEPAError, match=r"train-00002\.tar .* saved\. When it is back: hjepa-mlx"):
        hj.train(config)
    thread.join()
    stopped = int((checkpoints / "latest").read_text().removeprefix("step-"))
    assert 1 <= stopped < 30
    shard.write_bytes(whole)
    capsys.readouterr()
    hj.train(config, resume=True)
    assert f"at step {stopped} of 30." in "".join(capsys.readouterr())
    assert (checkpoints / "latest").read_text() == "step-00000030"
