"""A person's own pictures: any labels train, and what is left out is said."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from commands import TINY, picture
from typer.testing import CliRunner

import hjepa_mlx as hj
from hjepa_mlx.cli import app
from hjepa_mlx.data.folder import RECORD
from hjepa_mlx.data.source import open_sources
from hjepa_mlx.embed import embed
from hjepa_mlx.eval.labels import judged
from hjepa_mlx.rng import generator
from hjepa_mlx.sections import Data


def hjepa(*arguments: object):
    return CliRunner().invoke(app, list(map(str, arguments)))


def many(folder: Path, count: int, ending: str = "png", first: int = 20) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        picture(first + number).save(folder / f"{number:02}.{ending}")


def sources(root: Path, **keys):
    opened = open_sources(Data(dir=str(root), **keys))
    return opened["train"], opened["test"]


def names(source) -> list[str]:
    return [os.path.basename(source.name_of(row)) for row in range(len(source))]


def train(tmp_path: Path, root: Path, *more: object):
    (tmp_path / "tiny.yaml").write_text(TINY.replace("epochs: 2", "epochs: 1"))
    return hjepa("train", tmp_path / "tiny.yaml", "--data-dir", root, *more)


# Labels: judged only where they are used

LAYOUTS = {  # folder → pictures; what training says; training and test images that are judged
    "flat train beside labelled val": (
        {"train": 20, "val/cat": 3, "val/dog": 3},
        "No k-NN and no probes: the training images have no labels.",
        (20, 6, 0),
    ),
    "labelled train beside flat val": (
        {"train/cat": 10, "train/dog": 10, "val": 6},
        "No k-NN and no probes: the test images have no labels.",
        (20, 6, 0),
    ),
    "a val that lacks a class": (
        {"train/a": 10, "train/b": 10, "train/c": 10, "val/a": 3, "val/b": 3},
        "No test image is of c.",
        (30, 6, 3),
    ),
    "a val with a class more": (
        {"train/a": 12, "train/b": 12, "val/a": 3, "val/b": 3, "val/c": 3},
        "Evaluation leaves out test images of a class that training lacks: 3 (c).",
        (24, 6, 2),
    ),
    "most test classes lacking": (
        {"train/a": 12, "train/b": 12, "val/a": 3, "val/c": 3, "val/d": 3},
        "No k-NN and no probes: of the 3 classes of the test images, training has 1.",
        (24, 9, 0),
    ),
    "a stray picture": (
        {"a": 20, "b": 20, "": 1},
        "In no class folder: 1 (first: 00.png).",
        (36, 4, 2),
    ),
    "a picture a folder": (
        {f"patient {number}": 1 for number in range(30)},
        "30 folders hold 30 images, too few to be classes: there are no labels.",
        (27, 3, 0),
    ),
    "few pictures": (
        {"a": 6, "b": 6},
        "No k-NN and no probes: k=20 needs at least 20 training images with a label; there are 10.",
        (10, 2, 0),
    ),
    "one class in train": (
        {"train/a": 24, "val/a": 3, "val/b": 3},
        "No k-NN and no probes: all training images have one label.",
        (24, 6, 0),
    ),
}


@pytest.mark.parametrize(("folders", "says", "counts"), LAYOUTS.values(), ids=LAYOUTS)
def test_any_labels_train_and_what_evaluation_leaves_out_is_said(tmp_path, folders, says, counts):
    for name, count in folders.items():
        many(tmp_path / "data" / name, count)
    ended = train(tmp_path, tmp_path / "data", "--run-dir", tmp_path / "run")
    assert ended.exit_code == 0, ended.output
    assert says in ended.stderr
    bank, queries, _ = judged(*sources(tmp_path / "data"))
    assert (len(bank), len(queries), len(bank.classes)) == counts
    if bank.classes:
        assert set(queries.labels) <= set(bank.labels) == set(range(len(bank.classes)))
        for source in (bank, queries):
            folders_of = [Path(source.name_of(row)).parent.name for row in range(len(source))]
            assert folders_of == [source.classes[label] for label in source.labels]


def test_evaluation_says_what_it_left_out_and_gives_what_needs_no_labels(tmp_path):
    many(tmp_path / "data/train", 16)
    many(tmp_path / "data/val/cat", 2)
    many(tmp_path / "data/val/dog", 2)
    ended = train(tmp_path, tmp_path / "data", "--set", "run.final_eval=true",
                  "--run-dir", tmp_path / "run")  # fmt: skip
    assert ended.exit_code == 0, ended.output
    scores = json.loads((tmp_path / "run/eval.json").read_text())
    assert "linear_probe" not in scores
    assert scores["feature_rank"]
    assert scores["protocol"]["left_out"][0] in " ".join(ended.stdout.split())


@pytest.mark.parametrize(("classes", "each", "held"), [(2, 20, 2), (5, 8, 1), (3, 30, 3)])
def test_every_class_has_its_tenth_held_out(tmp_path, classes, each, held):
    for number in range(classes):
        many(tmp_path / f"c{number}", each)
    train_images, test_images = sources(tmp_path)
    assert np.bincount(test_images.labels).tolist() == [held] * classes
    assert np.bincount(train_images.labels).tolist() == [each - held] * classes
    assert train_images.folder.notes == (f"Held out of each class: {held}.",)


def test_without_classes_the_tenth_is_that_of_earlier_versions(tmp_path):
    many(tmp_path, 40)
    held = np.sort(generator(0, "held out").permutation(40)[9::10])
    for listing in (1, 2):
        _, test_images = sources(tmp_path, listing=listing)
        assert names(test_images) == [f"{number:02}.png" for number in held]


def test_a_run_of_an_earlier_version_keeps_its_images_and_its_split(tmp_path):
    for name in "ab":
        many(tmp_path / "data" / name, 20)
    config = hj.load_config("demo", ["data.name=folder", f"data.dir={tmp_path / 'data'}"])
    tree = config.model_dump()
    for key in ("labels", "bits", "listing"):  # as they were written then
        del tree["data"][key]
    (tmp_path / "config.yaml").write_text(json.dumps(tree))
    old = hj.load_config(tmp_path / "config.yaml").data
    assert (old.listing, old.bits) == (1, 16)
    many(tmp_path / "data" / "a", 3, "jpe")  # not looked for then
    held = np.sort(generator(0, "held out").permutation(40)[9::10])
    assert open_sources(old)["test"].rows.tolist() == held.tolist()
    assert len(open_sources(old)["train"]) == 36


def test_labels_come_from_folders_from_a_file_or_from_nowhere(tmp_path):
    root = tmp_path / "data"
    for number in range(12):
        many(root / f"day {number}", 1)
    assert sources(root)[0].classes == ()
    assert len(sources(root, labels="folders")[0].classes) == 12
    for name in ("x", "y"):
        many(root / name, 40)
    assert len(sources(root)[0].classes) == 14
    assert sources(root, labels="none")[0].classes == ()
    rows = [f"x/{n:02}.png,{'odd' if n % 2 else 'even'}" for n in range(40)]
    (tmp_path / "labels.csv").write_text("path,label\n" + "\n".join(rows) + "\nlost.png,odd\n")
    ended = hjepa("datasets", "check", root, "--labels", tmp_path / "labels.csv")
    assert "labels.csv: rows that name no image: 1 (first: lost.png)." in ended.stdout
    assert "labels.csv: images without a label: 52" in ended.stdout
    found, _, _ = judged(*sources(root, labels=str(tmp_path / "labels.csv")))
    assert found.classes == ("even", "odd")
    for row, label in enumerate(found.labels):
        assert int(Path(found.name_of(row)).stem) % 2 == label


@pytest.mark.parametrize(
    ("labels", "says"),
    [
        ("nowhere.csv", "cannot be read: No such file"),
        ("other.csv", "none of its 1 rows names an image"),
        ("narrow.csv", "each row must be path,label; one is '00.png'"),
        ("two.csv", "/00.png has two labels, a and b."),
        ("cut.csv", "is no CSV file"),
        ("folder", "data.labels"),
    ],
)
def test_labels_that_are_none_are_refused_in_one_line(tmp_path, labels, says):
    many(tmp_path / "data", 12)
    (tmp_path / "other.csv").write_text("a.png,1\n")
    (tmp_path / "narrow.csv").write_text("00.png\n")
    (tmp_path / "two.csv").write_text("00.png,a\n01.png,b\n00.png,a\n./00.png,b\n")
    (tmp_path / "cut.csv").write_bytes("00.png,a".encode("utf-16")[:-1])
    labels = tmp_path / labels if labels.endswith("csv") else labels
    ended = hjepa("datasets", "check", tmp_path / "data", "--labels", labels)
    assert ended.exit_code == 2
    assert says in ended.stderr
    assert ended.stderr.count("\n") == 1


def test_labels_of_excel_are_read(tmp_path):
    many(tmp_path / "data", 12)
    rows = [f"{number:02}.png,{'äb'[number % 2]}" for number in range(12)]
    (tmp_path / "utf16.csv").write_text("\r\n".join(["Path,Label", *rows]), "utf-16")
    found, _ = sources(tmp_path / "data", labels=str(tmp_path / "utf16.csv"))
    assert found.classes == ("b", "ä")


# Resuming, places


def test_a_resumed_run_keeps_its_images_when_others_come_and_says_which_are_gone(tmp_path):
    many(tmp_path / "data", 30)
    run = tmp_path / "run"
    assert train(tmp_path, tmp_path / "data", "--run-dir", run).exit_code == 0
    _, test_images = sources(tmp_path / "data")
    many(tmp_path / "data" / "new", 25)
    ended = hjepa("train", run, "--resume")
    assert ended.exit_code == 0, ended.output
    assert "25 .png (came since the run began; " in ended.stderr
    recorded = open_sources(hj.Run(run).config.data, run / RECORD)
    assert names(recorded["test"]) == names(test_images)  # evaluation sees no image trained on
    (tmp_path / "data/00.png").rename(tmp_path / "00.png")
    ended = hjepa("train", run, "--resume")
    assert ended.exit_code == 2
    assert "Gone since the run began: 1 image (first: 00.png). Put them back" in ended.stderr
    said = hjepa("eval", run).stdout
    assert "Gone since the run began" in said
    assert "This data set has no labels" in said
    assert ", 3 an epoch" in hjepa("train", run, "--resume", "--dry-run").stdout  # not of 54 images
    (tmp_path / "00.png").rename(tmp_path / "data/00.png")  # the advice
    assert hjepa("train", run, "--resume").exit_code == 0


def test_a_run_goes_on_where_too_many_images_are_unreadable_for_k_nn(tmp_path):
    for name, count in (("train/a", 10), ("train/b", 10), ("val/a", 3), ("val/b", 3)):
        many(tmp_path / "data" / name, count)
    (tmp_path / "data/train/a/00.png").write_bytes(b"torn")
    ended = train(tmp_path, tmp_path / "data", "--run-dir", tmp_path / "run")
    assert ended.exit_code == 0, ended.output
    assert "No more k-NN: k-NN with k=20 needs" in ended.stderr
    assert hj.Run(tmp_path / "run").latest


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("trained")
    many(root / "A", 12)
    many(root / "B", 12)
    picture().save(root / "c.jpg")
    assert train(root, root / "A", "--run-dir", root / "run").exit_code == 0
    return root


def test_embed_takes_folders_images_and_lists_and_writes_csv(trained, monkeypatch):
    monkeypatch.chdir(trained)
    (trained / "list.txt").write_text("A\n\nc.jpg\nlost.jpg\n")
    for places, count in ((["c.jpg"], 1), (["A", "B", "c.jpg"], 25), (["list.txt"], 13)):
        ended = hjepa("embed", "run", *places, "--out", "f.csv")
        assert ended.exit_code == 0, ended.output
        header, *rows = (trained / "f.csv").read_text().splitlines()
        assert header.startswith("path,level_0_0,level_0_1,")
        assert len(rows) == count
    assert "lost.jpg" in ended.stderr
    assert {row.split(",")[0] for row in rows} == {"c.jpg", *(f"A/{n:02}.png" for n in range(12))}
    model = hj.load("run")
    (row,) = [row for row in rows if row.startswith("A/07")]
    expected = np.concatenate([x[7] for x in embed(model, "A").levels.values()])
    np.testing.assert_allclose(np.array(row.split(",")[1:], float), expected, rtol=1e-4, atol=1e-5)


def test_a_list_trains_as_the_folder_does(trained):
    (trained / "paths.txt").write_text("A\nB/00.png\n")
    listed, _ = sources(trained / "paths.txt")
    assert len(listed) == 12
    ended = hjepa("datasets", "check", trained / "paths.txt")
    assert "copies: 1: " in ended.stdout  # B/00.png is A/00.png
