"""Embeddings of a folder, and their files, read by other programs."""

import json
import os
import shutil
import struct
import sys
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import numpy as np
import pyarrow.parquet as pq
import pytest
import typer
from evaluating import LEVELS, saved
from PIL import Image
from typer.testing import CliRunner

import hjepa_mlx as hj
from hjepa_mlx.cli.embed import embed as command
from hjepa_mlx.config import Config
from hjepa_mlx.embed import Embeddings, embed, save
from hjepa_mlx.eval.features import BATCH

app = typer.Typer()
app.command()(command)


@pytest.fixture(scope="module")
def model(tiny_config: Callable[..., Config]) -> hj.HJEPA:
    model, other = (hj.HJEPA(tiny_config(seed=seed)) for seed in range(2))
    model.context_encoder.update(other.context_encoder.parameters())  # the two encoders differ
    return model


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, np.ndarray]]:
    """A tree of images, and the central square [32, 32, 3] of each that can be read, by name."""
    folder, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    squares = {}
    for number in range(2 * BATCH + 3):
        size = (32, 40) if number % 2 else (50, 32)  # width and height
        name = f"{'inner/deep é/' if number % 3 else ''}{number:03}.png"
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        image = Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))
        image.save(folder / name)
        left, top = (size[0] - 32) // 2, (size[1] - 32) // 2
        squares[name] = np.asarray(image.crop((left, top, left + 32, top + 32)))
    (folder / "04 broken.jpg").write_bytes(b"\xff\xd8 torn")
    (folder / "notes.txt").write_text("no image")
    return folder, dict(sorted(squares.items()))


@pytest.fixture(scope="module")
def embeddings(model: hj.HJEPA, pictures: tuple[Path, dict[str, np.ndarray]]) -> Embeddings:
    return embed(model, pictures[0])


@pytest.mark.parametrize(
    ("encoder", "pooled", "shapes"),
    [
        *((encoder, True, [(64,)] * 3) for encoder in ("target", "context")),
        ("target", False, [(8, 8, 64), (4, 4, 64), (2, 2, 64)]),
    ],
)
def test_embeddings_are_what_the_model_encodes_or_its_mean(
    model: hj.HJEPA, pictures: tuple[Path, dict], encoder: str, pooled: bool, shapes: list[tuple]
) -> None:
    folder, squares = pictures
    got = embed(model, f"{folder}/./", encoder, pooled)
    assert got.paths == list(squares)
    assert list(got.skipped) == ["04 broken.jpg"]
    assert got.about["encoder"] == encoder
    assert list(got.levels) == LEVELS
    assert [array.shape[1:] for array in got.levels.values()] == shapes
    levels = model.encode(np.stack(list(squares.values())), encoder)
    for array, level in zip(got.levels.values(), levels, strict=True):
        assert array.dtype == np.float32
        expected = np.array(level.mean(1) if pooled else level.reshape(array.shape))
        np.testing.assert_allclose(array, expected, atol=1e-5)


def test_an_embedding_does_not_depend_on_the_other_images(
    model: hj.HJEPA, embeddings: Embeddings, pictures: tuple[Path, dict], tmp_path: Path
) -> None:
    place = len(embeddings.paths) - 1  # of the last, incomplete batch
    last, other = (pictures[0] / embeddings.paths[number] for number in (place, 0))
    for folder, before in (("among others", place), ("alone", 0)):
        (tmp_path / folder).mkdir()
        for number in range(before):
            shutil.copy(other, tmp_path / folder / f"{number:03}.png")
        shutil.copy(last, tmp_path / folder / f"{place:03}.png")
    among_others, alone = (embed(model, tmp_path / name) for name in ("among others", "alone"))
    for name in LEVELS:
        expected = embeddings.levels[name][place]
        np.testing.assert_array_equal(among_others.levels[name][place], expected)
        # another place in the batch: some BLAS kernels round differently there
        np.testing.assert_allclose(alone.levels[name][0], expected, rtol=1e-5, atol=1e-6)


def test_images_of_another_shape_come_as_cells_on_their_grid(
    tiny_config: Callable[..., Config],
) -> None:
    levels = {"level_blocks": [3, 3, 3], "level_pool": [1, 2, 3]}
    model = hj.HJEPA(tiny_config(model=levels))
    images = np.random.default_rng(0).integers(0, 256, (2, 32, 48, 3), dtype=np.uint8)
    fine, *coarse = map(np.array, model.encode(images, grid=True))
    assert fine.shape == (2, 8, 12, 64)
    assert [x.shape for x in coarse] == [(2, 4, 6, 64), (2, 3, 4, 64)]
    np.testing.assert_allclose(coarse[0], fine.reshape(2, 4, 2, 6, 2, 64).mean((2, 4)), atol=1e-5)
    np.testing.assert_allclose(coarse[1][:, 2, 1], fine[:, 6:, 3:6].mean((1, 2)), atol=1e-5)
    flat = model.encode(images)[1]
    np.testing.assert_array_equal(np.array(flat).reshape(coarse[0].shape), coarse[0])


def test_pictures_are_cropped_or_resized_to_the_size_asked_for(
    model: hj.HJEPA, tmp_path: Path
) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (40, 64, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "wide.png")
    smooth = np.asarray(Image.fromarray(pixels).resize((32, 32), Image.Resampling.BILINEAR))
    for asked, expected in (
        ({"image_size": 40}, pixels[:, 12:52]),
        ({"image_size": (20, 64)}, pixels[10:30]),
        ({"image_size": (40, 64)}, pixels),
        ({"fit": "whole"}, smooth),
    ):
        got = embed(model, tmp_path, pooled=False, **asked)
        for found, level in zip(
            got.levels.values(), model.encode(expected[None], grid=True), strict=True
        ):
            assert found.shape == level.shape
            near = 0.05 if "fit" in asked else 1e-5  # resized by another program
            assert np.abs(found - np.array(level)).mean() < near
    assert got.about["fit"] == "whole"


def test_npz_is_read_without_pickle(embeddings: Embeddings, tmp_path: Path) -> None:
    save(embeddings, tmp_path / "f.npz")
    with np.load(tmp_path / "f.npz", allow_pickle=False) as file:
        assert file["paths"].tolist() == embeddings.paths
        assert json.loads(str(file["about"]))["image_size"] == "32"
        for name in LEVELS:
            np.testing.assert_array_equal(file[name], embeddings.levels[name])


def test_safetensors_are_as_specified(embeddings: Embeddings, tmp_path: Path) -> None:
    save(embeddings, tmp_path / "f.safetensors")
    raw = (tmp_path / "f.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header, data = json.loads(raw[8 : 8 + length]), raw[8 + length :]
    metadata = header.pop("__metadata__")
    assert all(isinstance(value, str) for value in metadata.values())
    assert json.loads(metadata["paths"]) == embeddings.paths
    assert json.loads(metadata["skipped"]).keys() == {"04 broken.jpg"}
    assert max(row["data_offsets"][1] for row in header.values()) == len(data)
    arrays, _ = mx.load(str(tmp_path / "f.safetensors"), return_metadata=True)
    for name, row in header.items():
        array = np.frombuffer(data[slice(*row["data_offsets"])], "<f4").reshape(row["shape"])
        np.testing.assert_array_equal(array, embeddings.levels[name])
        np.testing.assert_array_equal(np.array(arrays[name]), array)


def test_parquet_has_a_row_an_image(embeddings: Embeddings, tmp_path: Path) -> None:
    save(embeddings, tmp_path / "f.parquet")
    table = pq.read_table(tmp_path / "f.parquet")
    assert table["path"].to_pylist() == embeddings.paths
    assert table.schema.metadata[b"encoder"] == b"target"
    for name in LEVELS:
        assert str(table.schema.field(name).type).startswith("fixed_size_list<element: float>[64")
        got = table[name].combine_chunks().flatten().to_numpy().reshape(-1, 64)
        np.testing.assert_array_equal(got, embeddings.levels[name])


@pytest.mark.skipif(sys.platform == "darwin", reason="its file names are Unicode")
def test_a_name_that_is_no_unicode_is_written_in_every_format(
    model: hj.HJEPA, tmp_path: Path
) -> None:
    Image.new("RGB", (32, 32)).save(os.fsencode(tmp_path) + b"/caf\xe9.png", "PNG")
    got = embed(model, tmp_path)
    assert got.paths == ["caf\\xe9.png"]
    for ending in ("npz", "safetensors", "parquet"):
        save(got, tmp_path / f"f.{ending}")


def test_what_cannot_end_well_is_refused_before_it_starts(
    model: hj.HJEPA, pictures: tuple[Path, dict], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, empty = pictures[0], tmp_path / "empty"
    empty.mkdir()
    for asked, words in (
        ({"out": tmp_path / "f.txt"}, r"must end in \.npz, \.safetensors, \.parquet, \.csv"),
        ({"out": tmp_path / "f.csv", "pooled": False}, "one vector per image"),
        ({"out": tmp_path / "no/f.npz"}, "no does not exist or"),
        ({"out": tmp_path / "f.parquet", "pooled": False}, "one vector per image"),
        ({"encoder": "teacher"}, "No encoder 'teacher'. There are: target, context."),
        ({"image_size": 30}, "size 30×30 is not a multiple of the patch size 4"),
        ({"fit": "pad"}, "There are: crop, whole"),
        ({"folder": tmp_path / "none"}, "none does not exist"),
        ({"folder": empty}, "There are no images"),
    ):
        with pytest.raises(hj.HJEPAError, match=words):
            embed(model, **{"folder": folder, **asked})
    with pytest.raises(hj.HJEPAError, match="No encoder 'teacher'"):
        model.encode(np.zeros((1, 32, 32, 3), np.uint8), "teacher")
    (empty / "f.jpg").write_bytes(b"torn")
    with pytest.raises(hj.HJEPAError, match=r"of 1 image, none can be read\. First: .*f\.jpg"):
        embed(model, empty)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(hj.HJEPAError, match=r"0\.00 GB are free"):
        embed(model, folder, out=tmp_path / "f.npz")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(hj.HJEPAError, match=r"pip install 'hjepa-mlx\[hub\]'"):
        embed(model, folder, out=tmp_path / "f.parquet")
    assert list(tmp_path.iterdir()) == [empty]


def test_the_command_says_what_it_made_and_of_what(
    model: hj.HJEPA, embeddings: Embeddings, pictures: tuple[Path, dict], tmp_path: Path
) -> None:
    run, out = saved(model, tmp_path / "run"), tmp_path / "f.npz"
    ended = CliRunner().invoke(app, [run, str(pictures[0]), "--out", str(out)])
    assert ended.exit_code == 0
    skipped, line = ended.output.splitlines()[-2:]
    assert skipped.startswith("Skipped 04 broken.jpg: ")
    assert line.startswith(f"{2 * BATCH + 3} images embedded (1 unreadable")
    assert "level_2 64" in line
    with np.load(out) as file:
        about = json.loads(str(file["about"]))
        np.testing.assert_array_equal(file["level_1"], embeddings.levels["level_1"])
    assert (about["run"], about["step"]) == (run, "7")
