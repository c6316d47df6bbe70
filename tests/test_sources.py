"""Sources: the right images with the right labels, wherever they come from."""

import gzip
import struct
from pathlib import Path

import layouts
import numpy as np
import pytest
from PIL import Image

from hjepa_mlx.data.importers import DEBIAN_FASHION, read_idx
from hjepa_mlx.data.prepare import originals_of
from hjepa_mlx.data.source import open_source
from hjepa_mlx.errors import HJEPAError, UsageError
from hjepa_mlx.recipes import load_config
from hjepa_mlx.sections import Data


def idx(array: np.ndarray) -> bytes:
    """The array as a gzipped IDX file (yann.lecun.com/exdb/mnist)."""
    head = bytes((0, 0, 8, array.ndim)) + struct.pack(f">{array.ndim}I", *array.shape)
    return gzip.compress(head + array.tobytes())


def fashion_files(train: int = 30, test: int = 12) -> dict[str, bytes]:
    """Random pictures in the four files of Fashion-MNIST."""
    rng = np.random.default_rng(0)
    files = {}
    for split, count in (("train", train), ("t10k", test)):
        pictures = rng.integers(0, 256, (count, 28, 28), np.uint8)
        files[f"{split}-images-idx3-ubyte.gz"] = idx(pictures)
        files[f"{split}-labels-idx1-ubyte.gz"] = idx(np.arange(count, dtype=np.uint8) % 10)
    return files


def write(folder: Path, files: dict[str, bytes]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


# IDX files


def test_idx_files_are_read_byte_by_byte(tmp_path):
    raw = bytes.fromhex("00000803 00000002 00000001 00000003 0a0b0c 0d0e0f")
    path = tmp_path / "x.gz"
    path.write_bytes(gzip.compress(raw))
    assert read_idx(path, 3).tolist() == [[[10, 11, 12]], [[13, 14, 15]]]


GOOD = bytes.fromhex("00000801 00000003 010203")
BAD_IDX = {
    "other magic": gzip.compress(b"\1" + GOOD[1:]),
    "other type": gzip.compress(GOOD[:2] + b"\x0d" + GOOD[3:]),
    "other number of axes": gzip.compress(GOOD[:3] + b"\3" + GOOD[4:]),
    "a byte missing": gzip.compress(GOOD[:-1]),
    "a byte too many": gzip.compress(GOOD + b"\0"),
    "half a head": gzip.compress(GOOD[:6]),
    "nothing": gzip.compress(b""),
    "gzip cut short": gzip.compress(GOOD)[:-9],
    "gzip with a damaged checksum": gzip.compress(GOOD)[:-8] + bytes(8),
    "gzip with damaged data": gzip.compress(GOOD)[:10] + b"\xff" * 12,
    "no gzip": GOOD,
    "empty": b"",
}


@pytest.mark.parametrize("content", BAD_IDX.values(), ids=BAD_IDX)
def test_a_damaged_idx_file_is_named(tmp_path, content):
    path = write(tmp_path, {"labels.gz": content}) / "labels.gz"
    with pytest.raises(HJEPAError, match=r"labels\.gz.*delete it and download again"):
        read_idx(path, 1)


def test_fashion_mnist_is_padded_to_32_pixels_and_read_as_three_channels(tmp_path):
    files = fashion_files()
    write(tmp_path / "fashion-mnist", files)
    layouts.prepared(tmp_path, "fashion-mnist")
    source = open_source(Data(name="fashion-mnist", dir=str(tmp_path)), "train")
    pictures = read_idx(tmp_path / "fashion-mnist" / "train-images-idx3-ubyte.gz", 3)
    assert len(source) == 30
    assert source.labels.tolist() == [i % 10 for i in range(30)]
    image = source.read(7)
    assert image.shape == (32, 32, 3)
    for channel in range(3):
        assert np.array_equal(image[2:30, 2:30, channel], pictures[7])
    assert image.sum() == 3 * pictures[7].sum(dtype=int)


@pytest.mark.parametrize(
    ("name", "array"),
    [
        ("train-labels-idx1-ubyte.gz", np.zeros(29, np.uint8)),
        ("train-labels-idx1-ubyte.gz", np.full(30, 10, np.uint8)),
        ("train-images-idx3-ubyte.gz", np.zeros((30, 40, 40), np.uint8)),
    ],
    ids=["too few labels", "an eleventh class", "large images"],
)
def test_files_that_do_not_belong_together_are_refused(tmp_path, name, array):
    write(tmp_path, fashion_files() | {name: idx(array)})
    with pytest.raises(HJEPAError, match=str(tmp_path)):
        originals_of("fashion-mnist", tmp_path)


@pytest.fixture(scope="module")
def debian(tmp_path_factory):
    """Fashion-MNIST as Debian's package dataset-fashion-mnist installs it, prepared."""
    if not DEBIAN_FASHION.is_dir():
        pytest.skip("needs the package dataset-fashion-mnist")
    root = tmp_path_factory.mktemp("debian")
    layouts.prepared(root, "fashion-mnist")
    data = Data(name="fashion-mnist", dir=str(root))
    return {split: open_source(data, split) for split in ("train", "test")}


def test_debians_fashion_mnist_is_found_and_whole(debian):
    for split, count in (("train", 60_000), ("test", 10_000)):
        assert len(debian[split]) == count
        assert np.bincount(debian[split].labels).tolist() == [count // 10] * 10


def test_the_demo_has_ten_classes_and_as_many_images_as_it_says():
    for split, count in (("train", 5500), ("test", 1000)):
        source = open_source(Data(name="demo"), split)
        assert len(source) == len(source.labels) == count
        assert len(source.classes) == 10
        assert set(source.labels) == set(range(10))
        assert source.read(0).shape == (32, 32, 3)


def test_the_demo_is_the_beginning_of_fashion_mnist(debian):
    for split in ("train", "test"):
        demo = open_source(Data(name="demo"), split)
        assert all(np.array_equal(demo.read(i), debian[split].read(i)) for i in range(len(demo)))
        assert np.array_equal(demo.labels, debian[split].labels[: len(demo)])


# Folders


def pictures(*paths: Path) -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4)).save(path)


def folder(root: Path, split="train", **keys):
    return open_source(Data(name="folder", dir=str(root), **keys), split)


def paths_of(source) -> list[Path]:
    return [Path(source.name_of(index)) for index in range(len(source))]


def names(source) -> list[str]:
    return [path.name for path in paths_of(source)]


@pytest.mark.parametrize("held_out", ["val", "test", "valid", "validation", "Val", "TEST"])
def test_folders_named_train_and_val_are_the_splits(tmp_path, held_out):
    named = "train" if held_out.islower() else "Train"
    pictures(*(tmp_path / named / c / f"{c}{i}.png" for c in ("cat", "dog") for i in range(3)))
    pictures(*(tmp_path / held_out / c / f"{c}v.png" for c in ("cat", "dog")))
    train, test = folder(tmp_path), folder(tmp_path, "test")
    assert names(train) == ["cat0.png", "cat1.png", "cat2.png", "dog0.png", "dog1.png", "dog2.png"]
    assert names(test) == ["catv.png", "dogv.png"]
    assert train.classes == test.classes == ("cat", "dog")
    assert train.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert test.labels.tolist() == [0, 1]


def test_without_splits_a_tenth_is_held_out_the_same_every_time(tmp_path):
    paths = [tmp_path / "ab"[i % 2] / "deeper" / f"{i:02}.jpg" for i in range(60)]
    pictures(*paths)
    train, test = folder(tmp_path), folder(tmp_path, "test")
    assert (len(train), len(test)) == (54, 6)
    assert sorted(paths_of(train) + paths_of(test)) == sorted(paths)
    assert names(train) == names(folder(tmp_path))
    assert names(test) == names(folder(tmp_path, "test"))
    assert [path.parts[-3] for path in paths_of(train)] == ["ab"[label] for label in train.labels]
    assert np.bincount(test.labels).tolist() == [3, 3]


def test_only_a_lone_folder_train_is_a_split_without_a_test_folder_beside_it(tmp_path):
    pictures(*(tmp_path / "voc" / c / f"{i}.png" for c in ("bird", "train") for i in range(10)))
    assert folder(tmp_path / "voc").classes == ("bird", "train")
    assert len(folder(tmp_path / "voc")) == 18
    pictures(*(tmp_path / "lone" / "train" / c / f"{i}.png" for c in "ab" for i in range(10)))
    assert folder(tmp_path / "lone").classes == ("a", "b")


def test_a_dataset_json_of_another_tool_does_not_make_a_folder_prepared(tmp_path):
    pictures(*(tmp_path / c / f"{i}.png" for c in "ab" for i in range(10)))
    (tmp_path / "dataset.json").write_text('{"labels": [["a/0.png", 0]]}')
    assert len(folder(tmp_path)) == 18


def test_images_outside_of_subfolders_or_in_one_only_have_no_label(tmp_path):
    pictures(*(tmp_path / "flat" / f"{i}.png" for i in range(10)))
    pictures(*(tmp_path / "single" / "cat" / f"{i}.png" for i in range(10)))
    pictures(*(tmp_path / "both" / c / f"{i}.png" for c in "ab" for i in range(9)))
    pictures(tmp_path / "both" / "outside.png")
    for name in ("flat", "single"):
        source = folder(tmp_path / name)
        assert source.classes == ()
        assert len(source.labels) == 0
    source = folder(tmp_path / "both")
    assert source.classes == ("a", "b")
    assert [names(source)[row] for row in np.flatnonzero(source.labels < 0)] == ["outside.png"]


def test_only_image_files_count_and_hidden_ones_do_not(tmp_path):
    pictures(tmp_path / "one.png", tmp_path / "TWO.JPG", tmp_path / "three.Tiff")
    write(tmp_path, {"._one.png": b"macOS", ".hidden.jpg": b"", "notes.txt": b"", "png": b""})
    found = names(folder(tmp_path)) + names(folder(tmp_path, "test"))
    assert sorted(found) == ["TWO.JPG", "one.png", "three.Tiff"]


def test_hidden_folders_and_links_that_lead_back_do_not_count(tmp_path):
    pictures(*(tmp_path / c / f"{i}.png" for c in ("cat", "dog", ".Trashes") for i in range(5)))
    (tmp_path / "cat" / "again").symlink_to(tmp_path)
    found = names(folder(tmp_path)) + names(folder(tmp_path, "test"))
    assert len(found) == 10
    assert folder(tmp_path).classes == ("cat", "dog")


def test_limit_takes_the_same_images_every_time_and_only_for_training(tmp_path):
    pictures(*(tmp_path / "ab"[i % 2] / f"{i:02}.png" for i in range(40)))
    limited = folder(tmp_path, limit=12)
    assert len(limited) == len(limited.labels) == 12
    assert names(limited) == names(folder(tmp_path, limit=12))
    assert set(names(limited)) < set(names(folder(tmp_path)))
    assert [path.parts[-2] for path in paths_of(limited)] == [
        "ab"[label] for label in limited.labels
    ]
    assert len(set(limited.labels)) == 2
    assert names(folder(tmp_path, "test", limit=1)) == names(folder(tmp_path, "test"))
    assert names(folder(tmp_path, limit=1000)) == names(folder(tmp_path))


def test_limit_takes_images_of_every_class_of_the_demo():
    first, again = (open_source(Data(name="demo", limit=200), "train") for _ in range(2))
    assert np.array_equal(first.rows, again.rows)
    assert set(first.labels) == set(range(10))


def test_an_unknown_data_set_is_refused_with_the_nearest_name():
    with pytest.raises(UsageError, match="mean 'fashion-mnist'"):
        open_source(Data(name="fashionmnist"), "train")


def test_a_split_that_there_is_not_is_refused():
    with pytest.raises(UsageError, match=r"No split 'val'\. There are: pretrain, train, test"):
        open_source(Data(name="demo"), "val")


def test_a_folder_stays_the_same_from_wherever_it_is_looked_at(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = load_config("demo", ["data.name=folder", "data.dir=pictures"])
    assert config.data.dir == str(tmp_path / "pictures")
