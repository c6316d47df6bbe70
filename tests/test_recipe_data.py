"""The data that recipes are compared on, and what is asked of a patch's features."""

import io
import json
import sys
import tarfile

import numpy as np
import pytest
from PIL import Image
from test_study import FOLDER, SPLITS

import hjepa_mlx as hj


@pytest.fixture(autouse=True)
def recipes(monkeypatch):
    """The folder's modules, imported anew."""
    monkeypatch.syspath_prepend(FOLDER)
    for name in ("variants", "scoring", "study", "data"):
        monkeypatch.delitem(sys.modules, name, raising=False)


def test_photographs_are_cut_so_that_training_never_sees_what_is_judged(tmp_path, monkeypatch):
    import data

    x = np.linspace(0, 255, 1200).astype(np.uint8)  # brightness says where a crop is from
    picture = np.repeat(np.repeat(x[None, :, None], 800, 0), 3, 2)
    wallpapers = tmp_path / "wallpapers"
    (wallpapers / "mate/nature").mkdir(parents=True)
    Image.fromarray(picture).save(wallpapers / "one_by_me.jpg", quality=95)
    Image.fromarray(picture[:, ::-1]).save(wallpapers / "mate/nature/two.jpg", quality=95)
    monkeypatch.setattr(data, "WALLPAPERS", wallpapers)
    assert data.photographs(tmp_path) == 2

    def shades(name, split, of):
        files = sorted((tmp_path / "photographs" / name / split / of).glob("*.png"))
        pixels = np.stack([np.asarray(Image.open(file)) for file in files])
        assert pixels.shape[1:] == (64, 64, 3)
        return len(files), pixels.min(), pixels.max()

    for of, upper in (("one_by_me", False), ("two", True)):
        for name in ("test", "validation"):
            learnt, low, high = shades(name, "train", of)
            judged, judged_low, judged_high = shades(name, "test", of)
            assert (low >= judged_high - 2) if upper else (high <= judged_low + 2)
            if name == "test":
                assert (learnt, judged) == (120, 60)
        assert judged_low >= 125 if upper else judged_high <= 130  # in the learnt half


def emoji_packages(root, monkeypatch, data, codes):
    """Packages of emoji that are discs, a class a hue; returns a picture's colour by code point."""
    shades = {}
    for vendor in data.EMOJI:
        rows, path = [], root / f"emoji-datasource-{vendor}-16.0.0.tgz"
        with tarfile.open(path, "w:gz") as tar:

            def add(name, content):
                info = tarfile.TarInfo(f"package/{name}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))

            for number in range(codes):
                kind, code = ("red", "green", "country-flag")[number % 3], f"1F{number:03}"
                colour = np.zeros((64, 64, 4), np.uint8)
                colour[8:56, 8:56] = [0, 0, 100 + number, 255]
                colour[8:56, 8:56, number % 3 % 2] = 200 + len(shades) % 50
                shades[tuple(colour[32, 32, :3])] = code
                file = io.BytesIO()
                Image.fromarray(colour).save(file, "PNG")
                add(f"img/{vendor}/64/{code}.png", file.getvalue())
                rows.append({"unified": code, "subcategory": kind, "image": f"{code}.png"})
            add("emoji.json", json.dumps(rows).encode())
        monkeypatch.setitem(data.EMOJI, vendor, data.sha256(path))
    return shades


def test_pictures_hold_code_points_out_and_their_figures_are_exact(tmp_path, monkeypatch):
    import data
    import scoring
    import study

    shades = emoji_packages(tmp_path, monkeypatch, data, 36)
    rng = np.random.default_rng(0)
    for folder in ("mate/nature", "clips"):
        (tmp_path / folder).mkdir(parents=True)
    ground = rng.integers(0, 256, (600, 900, 3), np.uint8)
    Image.fromarray(ground).save(tmp_path / "mate/nature/one.jpg")
    for name in ("a", "same"):  # clip art, transparent but for a corner
        art = np.zeros((50, 100, 4), np.uint8)
        art[:10, :10] = 255, 0, 255, 255
        Image.fromarray(art).save(tmp_path / "clips" / f"{name}.png")
    monkeypatch.setattr(data, "WALLPAPERS", tmp_path)
    monkeypatch.setattr(data, "CLIP_ART", tmp_path / "clips")
    monkeypatch.setattr(data, "FIGURES", 40)
    data.pictures(tmp_path)

    codes, seen = {}, set()
    for split in SPLITS:
        config = study.config_of("untrained", "pictures", 0, split, tmp_path)
        sources = {k: hj.open_source(config.data, k) for k in ("pretrain", "train", "test")}
        assert sources["train"].classes == ("green", "red")
        assert len(sources["pretrain"].labels) == 0
        for kind, source in sources.items():
            middles = [tuple(source.read(i)[32, 32]) for i in range(len(source))]
            codes[split, kind] = {shades.get(middle) for middle in middles} - {None}
        assert len(sources["test"]) == 3 * len(codes[split, "test"])
        assert len(sources["pretrain"]) == 3 * len(codes[split, "pretrain"]) + 1 + data.CROPS
        seen |= codes[split, "train"] | codes[split, "pretrain"]
    held_out = [codes[split, "test"] for split in SPLITS]
    assert [len(one) for one in held_out] == [3, 3]
    assert not held_out[0] & held_out[1]
    assert not (held_out[0] | held_out[1]) & seen

    images, share, _ = scoring.figures(config, "test")
    assert images.shape == (40, 32, 32, 3)
    grey = np.load(tmp_path / "pictures/test/test-figures.npy")[..., 3] / 255
    assert np.allclose(share.ravel(), grey.reshape(40, 8, 8, 8, 8).mean((2, 4)).ravel(), atol=5e-3)
    blue = scoring.local_scores(config, lambda images: [scoring._patches(images, 4)])
    assert blue[0]["figure"] > 30  # even discs on noise are told from it by their pixels


def test_the_direction_of_edges_is_read_from_the_structure_tensor():
    import scoring

    images = np.zeros((3, 32, 32, 3), np.uint8)
    images[0, :, ::4] = 255  # upright stripes: the slope points along x
    images[1, ::4] = 255
    directions, edged = scoring.structure(images, 8)
    assert directions.shape == (3 * 16, 2)
    assert np.allclose(directions[:16], (1, 0), atol=0.01)
    assert np.allclose(directions[16:32], (-1, 0), atol=0.01)
    assert edged.tolist() == [True] * 32 + [False] * 16


def test_each_patch_gets_the_features_of_the_cell_it_lies_in():
    import scoring

    cells = np.arange(4.0)[None, :, None]  # 2×2 cells of 3 patches a side on a grid of 5
    places = scoring._of_patches(cells, 5, 3).reshape(5, 5)
    assert places[:3, :3].tolist() == [[0] * 3] * 3
    assert places[3:, 3:].tolist() == [[3] * 2] * 2
    assert places[0, 4] == 1


def test_a_ridge_finds_what_is_linear_and_nothing_in_noise():
    import scoring

    x = np.random.default_rng(0).normal(size=(4_000, 8))
    y = x[:, :2] @ [[1.0, 2.0], [0.5, 0.0]] + 3
    assert scoring.ridge(x[:2000], y[:2000], x[2000:], y[2000:]) > 99.9
    assert abs(scoring.ridge(x[:2000, 2:], y[:2000], x[2000:, 2:], y[2000:])) < 2
