"""`hjepa-mlx eval`: its output, the scores it keeps, its refusals."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from evaluating import network, pictures, saved
from mlx.utils import tree_map
from typer.testing import CliRunner

import hjepa_mlx as hj
from hjepa_mlx import runs
from hjepa_mlx.cli import app
from hjepa_mlx.config import Config
from hjepa_mlx.eval.evaluation import config_for
from hjepa_mlx.recipes import load_config


def invoke(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["eval", *arguments])


FAST = ("--draws", "0", "--attentive-images", "0")


def test_the_command_prints_tables_and_keeps_the_scores(
    tiny_config: Callable[..., Config], tmp_path: Path
) -> None:
    model = network(tiny_config, name="folder", dir=str(pictures(tmp_path / "images", 20)))
    run = saved(model, tmp_path / "run")
    ended = invoke(run, *FAST, "--k", "7", "--json", str(tmp_path / "scores.json"))
    assert ended.exit_code == 0, ended.stderr
    assert "k-NN 7" in ended.stdout
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert scores["protocol"]["k"] == 7
    assert scores["trained"] | {"model": ""} == {
        "run": run, "step": 7, "epochs": 2.5, "images": "folder", "model": "",
        "image_level": None,
    }  # fmt: skip
    kept = hj.Run(run).report
    assert kept is not None
    assert kept.scores == scores
    expected = hj.evaluate(model, protocol=hj.Protocol(7, draws=0, attentive_images=0)).scores
    assert {**scores, "trained": {}} == {**json.loads(json.dumps(expected)), "trained": {}}
    (tmp_path / "run" / "eval.json").unlink()
    invoke(run, *FAST, "--data-dir", str(tmp_path / "images"))  # the run's own
    assert (tmp_path / "run" / "eval.json").exists()
    more = {**scores, "attentive_probe": {"level_0": 50.0}}
    (tmp_path / "run" / "eval.json").write_text(json.dumps(more))
    ended = invoke(run, *FAST)
    assert (
        f"Not kept: {tmp_path / 'run' / 'eval.json'} has the attentive probe too." in ended.stderr
    )
    assert json.loads((tmp_path / "run" / "eval.json").read_text()) == more


def test_the_command_evaluates_elsewhere_without_touching_the_runs_own_scores(
    tiny_config: Callable[..., Config], tmp_path: Path
) -> None:
    run = saved(network(tiny_config, name="demo", limit=50), tmp_path / "run")
    folder = pictures(tmp_path / "images", 20)
    ended = invoke(run, "--data", "folder", "--data-dir", str(folder), *FAST, "--json", "-")
    assert ended.exit_code == 0, ended.stderr
    assert json.loads(ended.stdout)["protocol"]["data"] == "folder"
    ended = invoke(run, "--image-size", "16x24", "--fit", "whole", *FAST, "--json", "-")
    protocol = json.loads(ended.stdout)["protocol"]
    assert (protocol["height"], protocol["width"], protocol["whole"]) == (16, 24, True)
    assert "give pixels, 96 or HEIGHTxWIDTH" in invoke(run, "--image-size", "wide").stderr
    assert not (tmp_path / "run" / "eval.json").exists()


def test_other_data_have_labels_of_their_own(tmp_path: Path) -> None:
    run = load_config("demo", ["data.labels=none", "data.bits=12", "data.limit=50"])
    own = tmp_path / "own.yaml"
    own.write_text("data: {dir: elsewhere, labels: names.csv, bits: 16}")
    found = config_for(run, str(own), None).data
    assert (found.labels, found.bits) == (str(Path("names.csv").absolute()), 16)
    other = config_for(run, "folder", "elsewhere").data
    assert (other.labels, other.bits, other.limit) == ("auto", "auto", None)
    assert config_for(run, None, "moved").data.labels == "none"


def test_scores_are_kept_though_nobody_reads_them(
    tiny_config: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gone(*arguments: Any, **options: Any) -> None:
        raise BrokenPipeError

    run = saved(network(tiny_config, name="demo", limit=50), tmp_path / "run")
    monkeypatch.setattr("rich.console.Console.print", gone)
    assert invoke(run, *FAST).exit_code
    assert "knn" in json.loads((tmp_path / "run" / "eval.json").read_text())


@pytest.fixture(scope="module")
def places(
    tiny_config: Callable[..., Config], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, str]:
    """Runs and image folders with something wrong, by name."""
    root = tmp_path_factory.mktemp("wrong")
    images = pictures(root / "images", 20)
    pictures(root / "few", 4)
    pictures(root / "unlike" / "train", 12)
    pictures(root / "unlike" / "val", 2, ("red", "green"))
    pictures(root / "four", 4, ("red",))
    model = network(tiny_config, name="folder", dir=str(images))
    run = saved(model, root / "run")
    broken = copy.copy(model.target_encoder.parameters())
    model.target_encoder.update(tree_map(lambda w: mx.full(w.shape, float("nan")), broken))
    saved(model, root / "nan")
    model.config.run.dir = str(root / "untrained")
    runs.create(model.config)
    names = ("images", "few", "unlike", "four", "nan", "untrained")
    return {"run": run, **{name: str(root / name) for name in names}}


@pytest.mark.parametrize(
    ("command", "says"),
    [
        ("{images}", "is not a run: it has no config.yaml"),
        ("{untrained}", "has no checkpoint yet"),
        ("{nan}", "The features hold NaN or infinity"),
        ("{run} --draws -1", "draws at least 0"),
        ("{run} --attentive-images 9", "needs at least 10 training images; 0 leaves it out"),
        ("{run} --k 0", "k and temperature must be positive"),
        ("{run} --data-dir {four}", "no image is left for evaluation"),
        ("{run} --data-dir {run}/none", "{run}/none does not exist. Give a folder"),
        ("{run} --data folder", "give --data-dir FOLDER"),
        ("{run} --data imagnet", "No data set or config 'imagnet'"),
        ("{run} --json {run}/none/scores.json", "the folder {run}/none does not exist"),
    ],
)
def test_wrong_use_ends_with_one_line_and_status_2(
    places: dict[str, str], command: str, says: str
) -> None:
    ended = invoke(*command.format(**places).split())
    assert ended.exit_code == 2
    (line,) = ended.stderr.splitlines()
    assert line.startswith("hjepa-mlx: ")
    assert says.format(**places) in line
    assert ended.stdout == ""


@pytest.mark.parametrize(
    ("command", "says"),
    [
        ("{run} --k 55", "k=55 needs at least 55 training images with a label; there are 54"),
        ("{run} --data-dir {few}", "k=20 needs at least 20 training images with a label"),
        ("{run} --data-dir {unlike}", "No test image is of blue."),
    ],
)
def test_what_the_labels_do_not_allow_is_left_out_in_words(
    places: dict[str, str], command: str, says: str
) -> None:
    ended = invoke(*command.format(**places).split(), "--draws", "0", "--attentive-images", "0")
    assert ended.exit_code == 0, ended.output
    assert says in " ".join(ended.stdout.split())
