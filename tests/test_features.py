"""Features: the model's own, in any number of threads, in memory or on disk."""

import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from evaluating import COLOURS, LEVELS, network, pictures
from numpy.testing import assert_allclose, assert_array_equal
from PIL import Image
from sklearn.covariance import OAS
from threadpoolctl import threadpool_limits

import hjepa_mlx as hj
from hjepa_mlx import backend
from hjepa_mlx.config import Config
from hjepa_mlx.data.pipeline import Skipped
from hjepa_mlx.errors import HJEPAError
from hjepa_mlx.eval.features import (
    Encoded,
    Encoder,
    Features,
    drop_equal_channels,
    extract,
    model_features,
    pixels,
    whiten,
)
from hjepa_mlx.eval.whitening import fit


def encoders(model: hj.HJEPA) -> Callable[[], list[Encoder]]:
    return lambda: [model_features(model, tokens=True)]


def test_features_are_the_means_of_what_the_model_encodes_with_labels_and_indices_aligned(
    tiny_config: Callable[..., Config], tmp_path: Path
) -> None:
    folder = pictures(tmp_path / "train", 50)
    pictures(tmp_path / "val", 1)
    broken = folder / "green" / "017.png"
    broken.write_bytes(broken.read_bytes()[:200])
    model = network(tiny_config, name="folder", dir=str(tmp_path))
    source = hj.open_source(model.config.data, "train")
    keep, skipped = np.random.default_rng(0).random(len(source)) < 0.3, Skipped()
    (found,) = extract(encoders(model), source, model.config, skipped, keep)
    assert list(skipped) == [str(broken)]
    paths = sorted(path for path in folder.rglob("*.png") if path != broken)
    assert [source.name_of(int(i)) for i in found.indices] == list(map(str, paths))
    assert [sorted(COLOURS)[label] for label in found.labels] == [p.parent.name for p in paths]
    images = np.stack([np.asarray(Image.open(path)) for path in paths])
    assert len(found) == len(images) == 149  # not a multiple of the batch
    assert_array_equal(found.indices[found.token_rows], [i for i in found.indices if keep[i]])
    for number, level in enumerate(map(np.array, model.encode(images))):
        assert_allclose(found.pooled[f"level_{number}"], level.mean(1), atol=1e-5)
        kept = level[found.token_rows]
        deviation = np.sqrt(kept.var(2, keepdims=True) + 1e-5)
        expected = (kept - kept.mean(2, keepdims=True)) / deviation
        assert_allclose(found.tokens[f"level_{number}"], expected, atol=5e-3)
    assert_array_equal(found.token_labels, found.labels[found.token_rows])
    assert list(found.pooled) == LEVELS


@pytest.mark.parametrize("compiled", [False, "auto"])
def test_several_threads_make_the_same_features_as_one(
    tiny_config: Callable[..., Config], monkeypatch: pytest.MonkeyPatch, compiled: Any
) -> None:
    model = network(tiny_config, name="demo", limit=650)
    model.config.compile = compiled
    source = hj.open_source(model.config.data, "train")

    def by(threads: int) -> Features:
        @contextmanager
        def computing_threads() -> Iterator[int]:
            with threadpool_limits(1, "blas"):
                yield threads

        monkeypatch.setattr(backend, "computing_threads", computing_threads)
        return extract(encoders(model), source, model.config, Skipped())[0]

    one = by(1)
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)  # threads that could disturb each other then do
    try:
        found = [by(8) for _ in range(3)]
    finally:
        sys.setswitchinterval(before)
    for several in found:
        assert_array_equal(one.indices, several.indices)
        assert_array_equal(one.labels, several.labels)
        for first, second in ((one.pooled, several.pooled), (one.tokens, several.tokens)):
            assert first.keys() == second.keys()
            assert all(np.array_equal(first[name], second[name]) for name in first)


def test_features_too_large_for_memory_are_the_same_features_and_need_the_disk(
    tiny_config: Callable[..., Config], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    model = network(tiny_config, name="demo", limit=150)
    source = hj.open_source(model.config.data, "train")
    (in_memory,) = extract(encoders(model), source, model.config, Skipped())
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr("hjepa_mlx.eval.features.IN_MEMORY", 400)
    (on_disk,) = extract(encoders(model), source, model.config, Skipped())
    assert list(tmp_path.iterdir()) == []  # the files have no names
    for first, second in ((in_memory.pooled, on_disk.pooled), (in_memory.tokens, on_disk.tokens)):
        for name in first:
            assert isinstance(second[name], np.memmap)
            assert_array_equal(first[name], second[name])
    full = shutil.disk_usage(tmp_path)._replace(free=100_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: full)
    large = np.ones((64, 100_000), np.float32)
    made = [lambda images: Encoded({"large": large[: len(images)]}, {})] * 2  # one would fit
    said = rf"Features need 0\.12 GB in {tmp_path}, where 0\.10 GB are free.*--attentive-images\.$"
    with pytest.raises(HJEPAError, match=said):
        extract(lambda: made, source, model.config, Skipped())


@pytest.mark.parametrize(("side", "factor"), [(28, 1), (70, 2), (100, 3)])
def test_the_pixel_baseline_averages_whole_squares(side: int, factor: int) -> None:
    images = np.random.default_rng(0).integers(0, 256, (3, side, side, 3), dtype=np.uint8)
    small = side // factor
    got = pixels(images).pooled["pixels"]
    assert got.dtype == np.uint8
    squares = got.reshape(3, small, small, 3)
    for image, row, column, channel in np.ndindex(squares.shape):
        top, left = row * factor, column * factor
        square = images[image, top : top + factor, left : left + factor, channel]
        assert abs(squares[image, row, column, channel] - square.mean()) <= 0.5


def test_one_channel_of_grey_pixels_is_kept_and_all_of_coloured_ones() -> None:
    grey = np.repeat(np.random.default_rng(0).integers(0, 256, (9, 20, 1)), 3, 2)
    grey = grey.reshape(9, 60).astype(np.uint8)
    coloured = grey.copy()
    coloured[4, 7] ^= 1  # one value of one image
    for train, test, kept in ((grey, grey, 20), (grey, coloured, 60), (coloured, grey, 60)):
        rows = np.arange(9)
        parts = [Features({"pixels": x}, {}, rows, rows, rows) for x in (train, test)]
        drop_equal_channels(*parts)
        for part, whole in zip(parts, (train, test), strict=True):
            expected = whole if kept == 60 else whole.reshape(9, 20, 3)[:, :, 0]
            assert_array_equal(part.pooled["pixels"], expected)


def test_levels_are_whitened_side_by_side_by_the_bank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hjepa_mlx.eval.features.CHUNK", 70)
    rng = np.random.default_rng(0)
    mixed = rng.normal(size=(20, 20)) * np.geomspace(1, 1e-2, 20) + 5

    def made(count: int) -> tuple[Features, np.ndarray]:
        x = (rng.normal(size=(count, 20)) @ mixed).astype(np.float32)
        rows = np.arange(count)
        levels = {"level_0": x[:, :12], "level_1": x[:, 12:]}
        return Features(levels, {}, rows, rows, rows), x

    (bank, x), (queries, asked) = made(300), made(50)
    whiten(bank, queries)
    shrunk = OAS().fit(x.astype(np.float64))
    values, directions = np.linalg.eigh(shrunk.covariance_)
    root = (directions / np.sqrt(values)) @ directions.T
    for part, before in ((bank, x), (queries, asked)):
        assert part.pooled["whitened"].dtype == np.float32
        assert_allclose(part.pooled["whitened"], (before - shrunk.location_) @ root, atol=2e-3)
    assert list(bank.pooled) == ["level_0", "level_1", "whitened"]

    alone = made(300)[0]
    whiten(alone, made(50)[0], without="level_1")
    assert alone.pooled["whitened"].shape == (300, 12)


def test_an_image_level_after_the_block_of_another_only_repeats_it() -> None:
    image = "model.level_pool=[1,1,image]"
    for blocks, level in (("[1,3,3]", "level_2"), ("[1,2,3]", None)):
        assert hj.load_config("demo", [image, f"model.level_blocks={blocks}"]).repeated == level
    assert hj.load_config("demo").repeated is None


def test_what_cannot_be_whitened_is_refused() -> None:
    for x in (np.ones((0, 4)), np.ones(4), np.full((3, 4), np.nan)):
        with pytest.raises(HJEPAError):
            fit(x)


@pytest.mark.parametrize("x", [np.ones((9, 4)), np.zeros((9, 4)), np.eye(9, 4)])
def test_whitening_is_finite_where_features_do_not_vary(x: np.ndarray) -> None:
    found = fit(x.astype(np.float32))(x)
    assert np.isfinite(found).all()
    assert_allclose(found.mean(0), 0, atol=1e-6)
