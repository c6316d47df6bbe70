"""A person's own pictures: every file is used or named."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from commands import picture, pictures
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from test_own_pictures import hjepa, many, sources, train

import hjepa_mlx as hj
from hjepa_mlx.data.folder import RECORD
from hjepa_mlx.data.images import decodable
from hjepa_mlx.data.listing import extensions, scan
from hjepa_mlx.data.source import open_sources
from hjepa_mlx.eval.labels import judged
from hjepa_mlx.finetune import finetune, predict
from hjepa_mlx.sections import Data

# What is handed over is used or named


def test_formats_are_used_or_named_with_what_would_read_them(tmp_path):
    used = {"a.jpe": "JPEG", "b.jfif": "JPEG", "c.png": None, "without suffix": "PNG", "1.2": "GIF"}
    if ".avif" in extensions():
        used["d.avif"] = None
    for name, kind in used.items():
        picture().save(tmp_path / name, kind)
    rest = {
        "clip.MOV": "extract frames",
        "IMG.CR2": "raw",
        "notes.txt": "no picture",
        "README": "no picture",
        "x.dcm": "16-bit PNG",
        "all.zip": "unpack",
        ".x": "hidden",
    }
    for name in rest:
        (tmp_path / name).write_bytes(b"something else")
    found = scan([tmp_path])
    assert sorted(found.names) == sorted(used)
    assert {os.path.basename(path) for path in found.left_out} == set(rest)
    ended = hjepa("datasets", "check", tmp_path)
    assert all(part in ended.stdout for pair in rest.items() for part in pair)
    assert "unreadable: 0 of" in ended.stdout


SIDES = """
import sys
from hjepa_mlx.bench.fit import _short_sides
from hjepa_mlx.data.source import pictures
print(_short_sides(pictures(sys.argv[1:])[0]))
"""


def test_heic_is_read_with_its_extra_and_named_without(tmp_path, monkeypatch):
    heif = pytest.importorskip("pillow_heif")
    image = Image.new("RGB", (64, 48), (200, 30, 30))
    heif.from_pillow(image).save(tmp_path / "IMG_1.HEIC", quality=90)
    source = open_sources(Data(dir=str(tmp_path)))["train"]
    pixels = np.frombuffer(source.read(0)[-64 * 48 * 3 :], np.uint8).reshape(48, 64, 3)
    assert np.abs(pixels.astype(int) - (200, 30, 30)).max() < 12
    alone = [sys.executable, "-c", SIDES, str(tmp_path)]  # where nothing has read HEIC before
    assert subprocess.run(alone, capture_output=True, text=True, check=True).stdout == "[48]\n"
    monkeypatch.setattr("hjepa_mlx.data.listing.find_spec", lambda name: None)
    ended = hjepa("datasets", "check", tmp_path)
    assert ended.exit_code == 2
    assert "pip install 'hjepa-mlx[heic]' reads it" in ended.stderr


def test_pictures_of_a_run_are_never_data(tmp_path):
    many(tmp_path / "a", 3)
    run, viz = tmp_path / "runs/one", tmp_path / "a/drawn"
    for folder in (run / "viz", viz):
        many(folder, 2)
    (run / "config.yaml").write_text("")
    (run / "metrics.jsonl").write_text("")
    for name in ("report.html", "pca.png", "similarity.png"):
        shutil.copy(tmp_path / "a/00.png", viz / name)
    found = scan([tmp_path])
    assert sorted(found.names) == ["a/00.png", "a/01.png", "a/02.png"]
    assert set(found.left_out) == {str(run), str(viz)}


def test_files_beside_the_splits_are_named(tmp_path):
    for name in ("train/a", "train/b", "val/a", "val/b", "test/a"):
        many(tmp_path / name, 3)
    train_images, test_images = sources(tmp_path)
    assert (len(train_images), len(test_images)) == (6, 6)
    assert "beside the folders of the splits; 00.png, …" in train_images.folder.notes[0]


KINDS = {  # ending → how it is written
    "jpg": "JPEG", "JPEG": "JPEG", "png": "PNG", "gif": "GIF", "tif": "TIFF", "bmp": "BMP",
    "webp": "WEBP", "": "PNG", "txt": None, "mov": None, "json": None, "7": None,
}  # fmt: skip
FILES = st.tuples(
    st.lists(st.sampled_from(["train", "val", "a", "b", ".hidden", "ü 1", "run"]), max_size=3),
    st.text(st.characters(codec="utf-8", exclude_characters="/\0", exclude_categories=["Cs"]),
            min_size=1, max_size=8),
    st.sampled_from(list(KINDS)),
    st.sampled_from(["RGB", "L", "P"]),
    st.integers(1, 40),
)  # fmt: skip


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(FILES, min_size=1, max_size=12), st.sampled_from(["auto", "folders", "none"]))
def test_of_any_folder_each_file_is_used_or_named(tmp_path_factory, files, labels):
    root = tmp_path_factory.mktemp("any")
    for folders, name, ending, mode, side in files:
        path = root.joinpath(*folders, f"{name}.{ending}" if ending else name)
        if path.name in (".", "..") or len(os.fsencode(path.name)) > 200:
            continue
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if kind := KINDS[ending]:
                mode = "RGB" if kind == "JPEG" else mode
                Image.new(mode, (side, 41 - side)).save(path, kind)
            else:
                path.write_text("no picture")
        except (FileExistsError, NotADirectoryError, IsADirectoryError):
            continue  # a name is a file and a folder
    every = [os.path.join(folder, one) for folder, _, inside in os.walk(root) for one in inside]
    used, left_out = used_and_named(root, labels)
    named = [p for p in every if any(p == out or p.startswith(out + os.sep) for out in left_out)]
    assert sorted(used + named) == sorted(every)


def used_and_named(root: Path, labels: str) -> tuple[list[str], list[str]]:
    """Images that are trained or tested on, and paths of all else that the listing names."""
    try:
        opened = open_sources(Data(dir=str(root), labels=labels))
    except hj.HJEPAError:
        ended = hjepa("datasets", "check", root)
        assert ended.exit_code == 2
        assert "There are no images" in ended.stderr
        every = [os.path.join(folder, one) for folder, _, inside in os.walk(root) for one in inside]
        assert not every or "Left out: " in ended.stderr
        return [], every
    both = opened["train"], opened["test"]
    judged(*both)
    used = [source.name_of(row) for source in both for row in range(len(source))]
    return used, list(opened["train"].folder.listing.left_out)


@pytest.mark.skipif(sys.platform == "darwin", reason="its file names are Unicode")
def test_names_that_are_no_unicode_are_used_and_named(tmp_path):
    for name in (b"caf\xe9.png", b"th\xe9.txt"):
        picture().save(os.fsencode(tmp_path) + b"/" + name, "PNG")
    many(tmp_path / "more", 30)
    ended = train(tmp_path / "more", tmp_path, "--run-dir", tmp_path / "run")
    assert ended.exit_code == 0, ended.output
    assert "th\\udce9.txt" in ended.stderr
    assert len(json.loads((tmp_path / "run" / RECORD).read_text())["train"]) == 28


@pytest.mark.parametrize("bits", [10, 12, 16])
def test_deep_greys_use_the_range_that_the_data_set_uses(tmp_path, bits):
    rng = np.random.default_rng(0)
    levels = rng.integers(0, 2**bits, (30, 24, 24)).astype(np.uint16)
    for number, image in enumerate(levels):
        Image.fromarray(image).save(tmp_path / f"{number:02}.png")
    source, _ = sources(tmp_path)
    assert source.bits == bits
    row = int(source.rows[3])
    pixels = np.frombuffer(source.read(3)[-24 * 24 * 3 :], np.uint8).reshape(24, 24, 3)
    assert np.array_equal(pixels[..., 1], levels[row] >> (bits - 8))
    ended = train(tmp_path, tmp_path, "--run-dir", tmp_path / "run")
    assert ended.exit_code == 0, ended.output
    assert hj.Run(tmp_path / "run").config.data.bits == bits  # so that eval and embed see the same
    assert (f"data.bits={bits}" in ended.stderr) == (bits < 16)
    dark = decodable((tmp_path / "03.png").read_bytes())[-24 * 24 * 3 :]  # as all 16 bits
    assert dark.max() == levels[3].max() >> 8


def test_the_range_of_deep_greys_is_that_of_all_classes_also_when_predicting(tmp_path):
    rng = np.random.default_rng(0)
    for name, high, count in (("dark", 900, 300), ("light", 4000, 20)):
        (tmp_path / "deep" / name).mkdir(parents=True)
        for number in range(count):
            image = rng.integers(high // 2, high, (24, 24)).astype(np.uint16)
            Image.fromarray(image).save(tmp_path / "deep" / name / f"{number:03}.png")
    ended = hjepa(
        "datasets",
        "prepare",
        "folder",
        "--data-dir",
        tmp_path / "deep",
        "--out",
        tmp_path / "small",
    )
    assert ended.exit_code == 0, ended.output
    for folder in ("deep", "small"):
        config = hj.load_config("demo", ["data.name=folder", f"data.dir={tmp_path / folder}"])
        config.finetune.epochs = 0
        classifier, _ = finetune(hj.HJEPA(config), config)
        assert classifier.config.data.bits == 12
        dark = str(tmp_path / "deep" / "dark")  # none there is lighter
        _, probabilities, _ = predict(classifier, [dark])
        assert (probabilities.argmax(1) == 0).mean() > 0.9


# Checks


def test_check_says_what_is_there_and_what_is_wrong(tmp_path):
    many(tmp_path / "a", 12)
    many(tmp_path / "b", 12, first=60)
    shutil.copy(tmp_path / "a/03.png", tmp_path / "a/copy.png")
    smooth = picture(20).resize((60, 48), Image.Resampling.BICUBIC, (0, 0, 6, 5))
    smooth.save(tmp_path / "a/smooth.png")
    smooth.resize((90, 72), Image.Resampling.BICUBIC).save(tmp_path / "b/like.png")
    picture(99).convert("L").save(tmp_path / "b/grey.png")
    (tmp_path / "a/torn.jpg").write_bytes(b"torn")
    for command in ("check", "verify"):
        ended = hjepa("datasets", command, tmp_path, "--json", tmp_path / "found.json")
        assert ended.exit_code == 0, ended.output
        found = {one["what"]: one for one in json.loads((tmp_path / "found.json").read_text())}
        words = {what.removeprefix("folder: "): one["found"] for what, one in found.items()}
        assert words["formats"] == "PNG 28"
        assert words["colour"] == "RGB 27, L 1"
        assert words["copies"].startswith("1: ")
        assert "like.png" in words["others that look alike"]
        unreadable = found["folder pretrain: unreadable"]["found"]
        assert "torn.jpg" in unreadable
        assert unreadable.endswith("Training leaves them out")
        assert all(one["right"] is not False for one in found.values())
    for path in (tmp_path / "a").iterdir():
        path.write_bytes(b"torn")
    shutil.rmtree(tmp_path / "b")
    assert hjepa("datasets", "check", tmp_path).exit_code == 1


def test_what_is_no_file_is_left_out_and_not_waited_for(tmp_path):
    made = tmp_path / "made"
    pictures(made, 12)
    os.mkfifo(made / "pipe.png")
    (made / "lost.png").symlink_to(tmp_path / "nowhere.png")
    found = scan([made])
    assert len(found.paths) == 12
    assert {Path(path).name for path in found.left_out} == {"pipe.png", "lost.png"}
