"""The pipeline: the right pictures in the right order, on any number of threads."""

import gc
import os
import subprocess
import sys
import threading
import time
from contextlib import closing
from itertools import islice

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from layouts import difference, smooth
from PIL import Image

from hjepa_mlx.data import pipeline
from hjepa_mlx.data.pipeline import (
    CROP_NUMBERS,
    Position,
    Skipped,
    evaluation_images,
    random_box,
    training_batches,
)
from hjepa_mlx.data.source import Source, make_source
from hjepa_mlx.data.storage import Files, Pixels
from hjepa_mlx.errors import HJEPAError


def in_files(folder):
    return make_source("files", Files(folder, sorted(map(str, folder.iterdir()))))


def in_memory(images):
    return make_source("memory", Pixels(images, "memory"))


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """21 images of different sizes and formats, and two that cannot be read."""
    folder = tmp_path_factory.mktemp("mixed")
    for number in range(21):
        image = Image.fromarray(smooth(30 + number, 60 - number))
        image.save(folder / f"{number:02}.{('jpg', 'png', 'webp')[number % 3]}")
    (folder / "05-text.jpg").write_text("Not a picture.")
    # Whole to the eye of `decodable`; only mlx-data's decoder finds the Huffman table damaged.
    data = bytearray((folder / "00.jpg").read_bytes())
    table = data.index(b"\xff\xc4")
    data[table + 5 : table + 21] = b"\xff" * 16
    (folder / "11-damaged.jpg").write_bytes(data)
    return in_files(folder)


@pytest.fixture(scope="module")
def numbered():
    """50 images, each of one grey that is its number: no crop can hide which it is."""
    images = np.broadcast_to(np.arange(50, dtype=np.uint8)[:, None, None, None], (50, 32, 32, 1))
    return in_memory(images)


def take(source, config, count, start=Position(), skipped=None):
    """The first `count` batches from `start`."""
    batches = training_batches(source, config, start, Skipped() if skipped is None else skipped)
    with closing(batches):
        return list(islice(batches, count))


def pictures(batches) -> np.ndarray:
    return np.stack([batch.images for batch in batches])


def order(source, config, count) -> np.ndarray:
    return pictures(take(source, config, count))[..., 0, 0, 0].ravel()


def test_images_are_resized_as_pil_does_it(tmp_path, tiny_config):
    sides = [(80, 100), (129, 64), (32, 32), (20, 24), (500, 300)]
    paths = [tmp_path / f"{height}.png" for height, _ in sides]
    for path, (height, width) in zip(paths, sides, strict=True):
        noise = np.random.default_rng(height).integers(0, 64, (height, width, 3))
        Image.fromarray((smooth(height, width) * 0.75 + noise).astype(np.uint8)).save(path)
    source = make_source("sides", Files(tmp_path, list(map(str, paths))))
    for index, image in evaluation_images(source, tiny_config(), Skipped()):
        height, width = sides[index]
        side = min(height, width)
        top, left = (height - side) // 2, (width - side) // 2
        square = Image.open(paths[index]).crop((left, top, left + side, top + side))
        expected = np.asarray(square.resize((32, 32), Image.Resampling.BILINEAR))
        assert difference(image, expected).mean() < 1, sides[index]
    assert index == len(sides) - 1


def test_unreadable_images_are_left_out_and_named(mixed, tiny_config):
    for skipped in (Skipped(), Skipped()):
        indices = [index for index, _ in evaluation_images(mixed, tiny_config(), skipped)]
        names = [os.path.basename(name) for name in skipped]
        assert sorted(names) == ["05-text.jpg", "11-damaged.jpg"]
        left = {os.path.basename(mixed.name_of(i)) for i in set(range(23)) - set(indices)}
        assert left == set(names)
        assert indices == sorted(indices)


def test_batches_do_not_depend_on_the_number_of_workers(mixed, tiny_config):
    one, two, four = (take(mixed, tiny_config(data={"workers": n}), 12) for n in (1, 2, 4))
    assert [b.next for b in one] == [b.next for b in two] == [b.next for b in four]
    assert np.array_equal(pictures(one), pictures(two))
    assert np.array_equal(pictures(one), pictures(four))


def test_every_pass_shows_other_crops_and_the_same_seed_shows_the_same(tiny_config):
    source = in_memory(np.stack([smooth(40, 40)] * 20))
    crops = pictures(take(source, tiny_config(), 10))
    assert len({crop.tobytes() for crop in crops.reshape(40, -1)}) == 40
    assert np.array_equal(crops, pictures(take(source, tiny_config(), 10)))
    assert not np.array_equal(crops, pictures(take(source, tiny_config(seed=1), 10)))


def test_every_pass_shows_each_image_once_in_an_order_of_its_own(numbered, tiny_config):
    config = tiny_config(data={"batch_size": 10})
    first, second = order(numbered, config, 10).reshape(2, 50)
    assert sorted(first) == sorted(second) == list(range(50))
    assert np.array_equal(order(numbered, config, 5), first)
    other = order(numbered, tiny_config(seed=1, data={"batch_size": 10}), 5)
    assert not any(np.array_equal(first, x) for x in (second, other))


def test_the_last_incomplete_batch_of_a_pass_is_dropped(numbered, tiny_config):
    batches = take(numbered, tiny_config(data={"batch_size": 16}), 4)
    assert [batch.next for batch in batches] == [(0, 16), (0, 32), (1, 0), (1, 16)]


def test_batches_go_on_exactly_from_every_position(mixed, tiny_config):
    config = tiny_config()
    batches = take(mixed, config, 12)  # 21 readable images, 4 a batch: more than two passes
    assert {batch.next.number for batch in batches} == {0, 1, 2}
    for done in range(1, 12):
        rest = take(mixed, config, 12 - done, start=batches[done - 1].next)
        assert np.array_equal(pictures(rest), pictures(batches[done:]))
        assert [b.next for b in rest] == [b.next for b in batches[done:]]


def test_an_unreadable_image_is_replaced_from_its_row_of_a_later_batch(mixed, tiny_config):
    order, skipped = mixed.pass_order(tiny_config().seed, 0), Skipped()
    batches = take(mixed, tiny_config(), 5, skipped=skipped)
    for place, number in enumerate(np.concatenate([batch.numbers for batch in batches])):
        same_row = [*order[place::4], *order[place % 4 : place : 4]]
        assert number == next(i for i in same_row if mixed.name_of(i) not in skipped)


def test_a_rank_reads_its_own_rows_only(mixed, tiny_config, monkeypatch):
    whole, order = take(mixed, tiny_config(), 5), mixed.pass_order(tiny_config().seed, 0)
    reads, read = set(), Source.read
    monkeypatch.setattr(Source, "read", lambda self, i: reads.add(i) or read(self, i))
    for rows in (slice(0, 2), slice(2, 4)):
        monkeypatch.setattr(pipeline.world, "rows", lambda count, rows=rows: rows)
        reads.clear()
        assert np.array_equal(pictures(take(mixed, tiny_config(), 5)), pictures(whole)[:, rows])
        assert reads <= {i for place, i in enumerate(order) if place % 4 in range(4)[rows]}


@pytest.mark.parametrize(("images", "says"), [([5, 12] * 2, "none of 4"), ([4, 6], "2 images")])
def test_a_pass_without_a_single_batch_is_an_error(mixed, tiny_config, images, says):
    with pytest.raises(HJEPAError, match=says):
        take(mixed.take(np.array(images)), tiny_config(), 1)


def test_a_pipeline_that_ended_lets_go_of_its_threads(mixed, numbered, tiny_config, monkeypatch):
    monkeypatch.setattr(pipeline, "END_WAIT", 60.0)  # a busy machine's threads end late
    for source in (mixed, numbered):
        take(source, tiny_config(), 12)
        list(evaluation_images(source, tiny_config(), Skipped()))
        next(evaluation_images(source, tiny_config(), Skipped()))
    gc.collect()
    assert not list(pipeline._live)


def test_nothing_is_decoded_any_more_once_a_pipeline_is_left(mixed, tiny_config, monkeypatch):
    reading, read = set(), Source.read

    def slow(source, index):
        reading.add(index)
        time.sleep(0.3)
        return reading.discard(index) or read(source, index)

    monkeypatch.setattr(Source, "read", slow)
    take(mixed, tiny_config(), 1)
    assert not reading


class NeverEnds:
    """A stream whose threads miss that they should end, as happens in mlx-data 0.1.0."""

    def __del__(self) -> None:
        threading.Event().wait()


def test_a_stream_that_never_ends_is_not_waited_for(tiny_config, monkeypatch):
    monkeypatch.setattr(pipeline, "END_WAIT", 0.1)
    source = in_memory(np.zeros((20, 32, 32, 3), np.uint8))
    reader = pipeline._Reader(source, np.arange(20), tiny_config(), None, Skipped())
    reader.begin(range(20))
    reader.streams.append(NeverEnds())
    reader.end(1)
    assert len(reader.streams) == 1
    reader.end()
    assert not reader.streams


def test_python_is_left_despite_a_stream_that_never_ends():
    code = (
        "import collections, sys, threading, types\nfrom hjepa_mlx.data import pipeline\n"
        "class NeverEnds:\n    def __del__(self): threading.Event().wait()\n"
        "pipeline.END_WAIT, streams = 0.1, collections.deque([NeverEnds()])\n"
        "pipeline._Reader.end(types.SimpleNamespace(streams=streams))\nsys.exit(3)\n"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 3


def test_no_image_is_read_more_often_than_needed(mixed, tiny_config, monkeypatch):
    reads, read = [], Source.read
    monkeypatch.setattr(Source, "read", lambda self, i: reads.append(i) or read(self, i))
    few = mixed.take(np.arange(4))
    assert len(list(evaluation_images(few, tiny_config(data={"batch_size": 32}), Skipped()))) == 4
    assert sorted(reads) == [0, 1, 2, 3]


def test_half_of_the_images_are_mirrored_and_none_without_flip(tiny_config):
    image = smooth(32, 32)
    source = in_memory(np.stack([image] * 400))
    whole = {"batch_size": 400, "crop_scale": [1.0, 1.0]}
    (batch,) = take(source, tiny_config(data=whole), 1)
    as_is = (batch.images == image).all((1, 2, 3))
    mirrored = (batch.images == image[:, ::-1]).all((1, 2, 3))
    assert (as_is ^ mirrored).all()
    assert 160 < mirrored.sum() < 240  # 4 standard deviations
    (batch,) = take(source, tiny_config(data=whole | {"flip": False}), 1)
    assert (batch.images == image).all()


# Random crops


@given(
    st.integers(0, 2**32 - 1),
    st.integers(1, 3000),
    st.integers(1, 3000),
    st.lists(st.floats(0.01, 1), min_size=2, max_size=2).map(sorted),
)
def test_crops_lie_inside_and_keep_to_the_ranges(seed, height, width, scale):
    numbers = np.random.default_rng(seed).random(CROP_NUMBERS, np.float32)
    top, left, h, w = random_box(numbers, height, width, scale)
    assert 0 <= top <= top + h <= height
    assert 0 <= left <= left + w <= width
    assert min(h, w) >= 1
    central = (top, left) == ((height - h) // 2, (width - w) // 2) and (h == height or w == width)
    if not central:  # rounding moves a side by half a pixel
        assert (w - 0.5) / (h + 0.5) <= 4 / 3 + 1e-6
        assert (w + 0.5) / (h - 0.5) >= 3 / 4 - 1e-6
        area = height * width
        assert (h - 0.5) * (w - 0.5) <= scale[1] * area * (1 + 1e-6)
        assert (h + 0.5) * (w + 0.5) >= scale[0] * area * (1 - 1e-6)


def torchvision_box(rng, height, width, scale):
    """RandomResizedCrop.get_params of torchvision 0.20, in numpy."""
    area = height * width
    for _ in range(10):
        target = area * rng.uniform(*scale)
        aspect = np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3)))
        w, h = round(np.sqrt(target * aspect)), round(np.sqrt(target / aspect))
        if 0 < w <= width and 0 < h <= height:
            return rng.integers(0, height - h + 1), rng.integers(0, width - w + 1), h, w
    if width / height < 3 / 4:
        w, h = width, round(width / (3 / 4))
    elif width / height > 4 / 3:
        w, h = round(height * (4 / 3)), height
    else:
        w, h = width, height
    return (height - h) // 2, (width - w) // 2, h, w


@pytest.mark.parametrize(("height", "width"), [(256, 256), (200, 300), (400, 300), (20, 10)])
@pytest.mark.parametrize("low", [0.08, 0.3])
def test_crops_are_distributed_as_torchvisions(height, width, low):
    rng = np.random.default_rng(0)
    numbers = rng.random((10_000, CROP_NUMBERS), np.float32)
    ours = np.array([random_box(row, height, width, [low, 1.0]) for row in numbers])
    theirs = np.array([torchvision_box(rng, height, width, [low, 1.0]) for _ in numbers])
    for statistic in (
        lambda box: (box[:, 2] * box[:, 3]).mean() / (height * width),
        lambda box: np.log(box[:, 3] / box[:, 2]).mean(),
        lambda box: np.log(box[:, 3] / box[:, 2]).std(),
        lambda box: (box[:, 0] + box[:, 2] / 2).mean() / height,
        lambda box: (box[:, 1] + box[:, 3] / 2).std() / width,
    ):
        assert statistic(ours) == pytest.approx(statistic(theirs), abs=0.015)
