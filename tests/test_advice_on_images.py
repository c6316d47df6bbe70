"""Advice on pictures and data sets is followed, and they are read."""

import shutil
from collections.abc import Callable
from pathlib import Path

import layouts
import numpy as np
import pytest
from commands import advised, do, picture, pictures, works
from layouts import CMC, KAGGLE, OTHERS
from PIL import Image

from hjepa_mlx.data.listing import scan
from hjepa_mlx.data.storage import KnownFile, StorageError

pytestmark = pytest.mark.usefixtures("here")


def resaved(kind: str) -> Callable[[Path], None]:
    """Replaces a file by a picture of this kind."""

    def replace(path: Path) -> None:
        path.unlink()
        image = Image.fromarray(np.zeros((24, 30), np.uint16)) if kind == "tif" else picture()
        image.save(path.with_name(f"resaved.{kind}"))

    return replace


def unpacked(path: Path) -> None:
    shutil.unpack_archive(path, path.parent)
    path.unlink()


def floats(path: Path) -> None:
    Image.fromarray(np.zeros((24, 30), np.float32)).save(path)


def huge(path: Path) -> None:
    picture(300).save(path)


def packed(path: Path) -> None:
    shutil.make_archive(str(path.with_suffix("")), "zip", "pictures/a", "00.jpg")


@pytest.mark.parametrize(
    ("name", "make", "advice", "follow"),
    [
        ("x.tif", floats, "convert it to 8 or 16", resaved("tif")),
        ("x.webp", huge, "save it as RGB JPEG", resaved("jpg")),
        ("x.zip", packed, "unpack it", unpacked),
        ("x.dcm", Path.touch, "convert it to 16-bit PNG", resaved("png")),
        ("x.cr2", Path.touch, "export it as JPEG", resaved("jpg")),
        ("x.mov", Path.touch, "extract frames", resaved("png")),
    ],
)
def test_a_picture_is_read_after_what_is_advised(
    name: str,
    make: Callable[[Path], None],
    advice: str,
    follow: Callable[[Path], None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("hjepa_mlx.data.images.MAX_OTHER", 5000)
    pictures(tmp_path, 10)
    make(tmp_path / name)
    check = f"datasets check {tmp_path}"
    assert advice in do(check)[1]
    follow(tmp_path / name)
    assert advice not in works(check)
    assert len(scan([tmp_path]).paths) == 11


def test_a_file_that_changed_is_read_again_when_it_is_put_back(tmp_path: Path) -> None:
    path, away = tmp_path / "shard.tar", tmp_path / "away"
    path.write_bytes(b"12345")
    known = KnownFile(path)
    path.rename(away)
    path.write_bytes(b"other")
    with pytest.raises(StorageError, match="Put it back"):
        known.read(1, 2)
    away.rename(path)
    assert known.read(1, 2) == b"23"


def lose(path: Path) -> Callable[[], object]:
    """Takes a file or folder away; returns what puts it back."""
    away = path.with_name("away")
    path.rename(away)
    return lambda: away.rename(path)


def cut(path: Path) -> Callable[[], object]:
    """Cuts a file; returns what deletes it and gets it again."""
    content = path.read_bytes()
    path.write_bytes(content[:-10])
    return lambda: (path.unlink(), path.write_bytes(content))


@pytest.mark.parametrize(
    ("layout", "file", "harm", "advice"),
    [
        (layouts.parquet, "data/train-00001*", lose, "has 2 of 3 .* Download the others"),
        (layouts.parquet, "data/train-00001*", cut, "Delete it and download again"),
        (layouts.kaggle_hundred, "train.X3", lose, "Put it there and run again"),
        (layouts.tars, f"{layouts.KIT}*", lose, "which class .*: put ILSVRC2012_devkit.* there"),
    ],
)
def test_an_imagenet100_is_whole_after_what_is_advised(
    layout: Callable, file: str, harm: Callable, advice: str, tmp_path: Path
) -> None:
    folder = tmp_path / "imagenet100"
    classes = KAGGLE if layout is layouts.kaggle_hundred else CMC
    layout(folder, layouts.photos(classes, train=1))
    put_right = harm(next(folder.glob(file)))
    prepare = f"datasets prepare imagenet100 --data-dir {tmp_path}"
    advised(prepare, advice)
    put_right()
    works(prepare)


def test_an_imagenet100_is_cut_out_of_imagenets_own_archives(tmp_path: Path) -> None:
    folder = tmp_path / "imagenet1k"
    words = [f"thing {number}" for number in range(101)]
    layouts.parquet(folder, layouts.photos(CMC[:2]), words=words)
    prepare = f"datasets prepare imagenet100 --data-dir {tmp_path}"
    advised(prepare, "Use ImageNet's own archives")
    shutil.rmtree(folder)
    layouts.tars(folder, layouts.photos(CMC + OTHERS, train=1))
    works(prepare)
