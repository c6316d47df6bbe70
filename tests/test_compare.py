"""Runs side by side: real small runs, and scores as `hjepa-mlx eval` writes them."""

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pytest
import typer
from PIL import Image
from rich.console import Console
from typer.testing import CliRunner

import hjepa_mlx as hj
from hjepa_mlx.cli.compare import compare as command
from hjepa_mlx.compare import Comparison, _images, compare
from hjepa_mlx.config import Config
from hjepa_mlx.sections import Earlier

app = typer.Typer()
app.command()(command)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_config: Callable[..., Config]) -> Path:
    """A folder with a run `first`: 3 steps of 16 images, evaluated."""
    place, rng = tmp_path_factory.mktemp("compare"), np.random.default_rng(0)
    for number in range(60):
        path = place / f"images/{number % 2}/{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(path)
    config = tiny_config(
        data={"name": "folder", "dir": str(place / "images"), "batch_size": 16},
        optim={"epochs": 1, "warmup_epochs": 0.5},
        run={"dir": str(place / "runs/first"), "log_every": 1},
    )
    run = hj.train(config)
    hj.evaluate(hj.load(run.path)).save(run.path / "eval.json")
    return place / "runs"


@pytest.fixture
def runs(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "runs"))


def another(
    runs: Path, name: str, scores: dict | None, changes: dict[str, Any] | None = None
) -> Path:
    """A copy of the first run with `changes` of its config and with other scores, or none."""
    path = Path(shutil.copytree(runs / "first", runs / name))
    config = hj.Run(path).config
    for key, value in (changes or {}).items():
        section, _, last = key.rpartition(".")
        setattr(getattr(config, section) if section else config, last, value)
    (path / "config.yaml").write_text(config.to_yaml())
    (path / "eval.json").unlink()
    if scores is not None:
        (path / "eval.json").write_text(json.dumps(scores))
    return path


def scored(knn: float, interval: list[float] | None = None, **protocol: Any) -> dict[str, Any]:
    intervals = {"confidence_95": {"knn": {"level_0": interval}}} if interval else {}
    return {
        "knn": {"level_0": knn},
        "feature_rank": {"all_levels": 9.0, "level_0": 3.0},
        "protocol": {"data": "demo", "query_images": 10, "skipped_images": int(knn), **protocol},
        **intervals,
    }


def printed(comparison: Comparison, width: int) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(comparison, soft_wrap=True)
    text = console.file.getvalue()
    return "\n".join(line.rstrip() for line in text.splitlines())


def cells(text: str, label: str) -> list[str]:
    """What the table has in the first row of this label."""
    line = next(line for line in text.splitlines() if line.startswith(label))
    return [cell.strip() for cell in line.removeprefix(label).split("  ") if cell.strip()]


def test_only_keys_that_differ_are_shown(runs: Path) -> None:
    changes = {"seed": 7, "optim.lr": 0.002, "run.dir": None}
    second = another(runs, "second", None, changes)
    found = compare([runs / "first", second])
    assert found.data["configuration"] == {"seed": [0, 7], "optim.lr": [0.001, 0.002]}
    assert cells(printed(found, 80), "optim.lr") == ["0.001", "0.002"]
    same = compare([runs / "first", another(runs, "third", None)])
    assert same.data["configuration"] == {}
    assert "The configurations are the same." in printed(same, 80)


def test_scores_on_other_folders_of_images_are_not_ranked(runs: Path) -> None:
    first = another(runs, "here", scored(50.0))
    second = another(runs, "there", scored(60.0), {"data.dir": "/elsewhere"})
    found = compare([first, second])
    assert found.data["configuration"]["data.dir"][1] == "/elsewhere"
    assert found.data["best"] == {}
    assert "Scores are not comparable: the runs' image folders differ." in found.data["notes"]


def test_scores_of_an_earlier_checkpoint_are_named(runs: Path) -> None:
    early = another(runs, "early", scored(50.0) | {"trained": {"step": 2}})
    now = another(runs, "now", scored(50.0) | {"trained": {"step": 3}})
    notes = compare([early, now]).data["notes"]
    assert f"{early} was evaluated at step 2, not since: hjepa-mlx eval {early}" in notes
    assert not any(str(now) in note for note in notes)


def test_ranks_are_not_ranked_nor_attentive_probes_of_other_banks(runs: Path) -> None:
    probes = ({"attentive_probe": {"level_0": value}} for value in (50.0, 60.0))
    paths = [
        another(runs, f"bank-{bank}", scored(50.0 + bank, attentive_bank_images=bank) | probe)
        for bank, probe in enumerate(probes)
    ]
    assert compare(paths).data["best"] == {"knn": {"level_0": [1]}}


def test_training_is_told_by_log_and_checkpoint(runs: Path) -> None:
    second = another(runs, "second", None, {"optim.epochs": 4})
    log = (second / "metrics.jsonl").read_text().splitlines()[:-1]  # saved after the last line
    (second / "metrics.jsonl").write_text("\n".join(log))
    training = compare([runs / "first", second]).data["training"]
    rows = [json.loads(line) for line in log]
    assert training["steps"] == [3, 3]
    assert training["epochs"] == [1, 1]
    assert training["images"] == [48, 48]
    assert training["finished"] == [True, False]
    assert training["loss"][1] == rows[-1]["loss"] != training["loss"][0]
    speeds = [row["images_per_second"] for row in rows if "loss" in row]
    assert training["images_per_second"][1] == median(speeds)


def test_images_of_stages_are_those_of_their_batches() -> None:
    config = hj.load_config("demo", ["data.batch_size=32", "optim.accumulate=3"])
    stage = {"step": 20, "epoch": 2.0, "lr": 0.0, "epochs": 2, "batch_size": 16, "image_size": 32}
    for accumulate, first in ((2, 20 * 16 * 2), (None, 20 * 16 * 3)):  # None: as the run has now
        config.run.history = [Earlier(**stage, accumulate=accumulate)]
        assert _images(config, 25) == first + 5 * 32 * 3


def test_a_run_that_has_not_begun_can_be_compared(runs: Path) -> None:
    second = another(runs, "second", None)
    shutil.rmtree(second / "checkpoints")
    (second / "metrics.jsonl").unlink()
    text = printed(compare([runs / "first", second]), 80)
    assert cells(text, "steps") == ["3", "0"]
    assert cells(text, "loss, last logged")[1] == "–"


def test_a_run_without_scores_shows_the_command_that_makes_them(runs: Path) -> None:
    second = another(runs, "a rather long name of a run", None)
    found = compare([runs / "first", second])
    evaluation = json.loads((runs / "first/eval.json").read_text())
    assert found.data["scores"]["knn"]["level_2"] == [evaluation["knn"]["level_2"], None]
    random = evaluation["baselines"]["random_init"]["feature_rank"]["level_1"]
    assert found.data["random_init"]["feature_rank"]["level_1"] == [random, None]
    text = printed(found, 80)
    assert cells(text, "k-NN % level 2") == [f"{evaluation['knn']['level_2']:.1f}", "–"]
    assert f"Not evaluated: hjepa-mlx eval '{second}'" in text  # on one line, to be copied
    assert "*" not in text  # one score alone is not the best of several


@pytest.mark.parametrize(
    ("scores", "marked"),
    [
        ([scored(50.0), scored(51.0), scored(49.0)], ["50.0", "51.0 *", "49.0"]),
        ([scored(51.0), scored(51.0), scored(49.0)], ["51.0 ~", "51.0 ~", "49.0"]),
        ([scored(50.0, [48, 52]), scored(51.0, [49, 53]), scored(45.0, [43, 47])],
         ["50.0 ~", "51.0 ~", "45.0"]),
        ([scored(50.0, [48, 52]), scored(57.0, [55, 59]), None], ["50.0", "57.0 *", "–"]),
    ],
)  # fmt: skip
def test_the_best_is_marked_unless_it_is_within_the_noise(
    runs: Path, scores: list[dict | None], marked: list[str]
) -> None:
    paths = [another(runs, f"run-{place}", each) for place, each in enumerate(scores)]
    text = printed(compare(paths), 80)
    assert cells(text, "k-NN % level 0") == marked
    assert text.index("feature rank level 0") < text.index("feature rank all levels")
    assert "* best; ~ not told apart from the best" in text


def test_scores_of_different_protocols_are_not_ranked(runs: Path) -> None:
    paths = [
        another(runs, f"run-{place}", scored(50.0 + place, query_images=10 + place // 2))
        for place in range(3)
    ]
    assert compare(paths[:2]).data["best"]["knn"] == {"level_0": [1]}
    text = printed(compare(paths), 80)
    assert "Scores are not comparable: query_images (10, 11) differ." in text
    assert "*" not in text


def test_a_narrow_terminal_folds_the_cells_and_loses_none(runs: Path) -> None:
    paths = [another(runs, f"run-{place:03}", scored(50.0 + place)) for place in range(7)]
    text = printed(compare(paths), 80)
    table = text[: text.index("* best")]
    assert max(map(len, table.splitlines())) <= 80
    assert cells(text, "k-NN % level 0") == [*(f"{50 + place}.0" for place in range(6)), "56.0 *"]
    assert table.splitlines()[1].split() == list("0123456")  # the end of each run's name


def test_runs_of_the_same_name_are_told_apart_by_their_paths(runs: Path) -> None:
    copy = shutil.copytree(runs / "first", runs / "x/first")
    assert cells(printed(compare([runs / "first", copy]), 80), "") == ["first", "x/first"]


def test_what_cannot_be_compared_is_refused_in_one_line(runs: Path) -> None:
    first = runs / "first"
    broken = another(runs, "broken", None)
    (broken / "eval.json").write_text("[1, 2")
    for paths, words in (
        ([first], "two or more"),
        ([first, first / "../first"], "twice"),
        ([first, runs], "not a run"),
        ([first, broken], r"broken/eval\.json is damaged.*hjepa-mlx eval"),
    ):
        with pytest.raises(hj.HJEPAError, match=words):
            compare(paths)


def test_the_command_prints_a_table_or_json(runs: Path) -> None:
    paths = [str(runs / "first"), str(another(runs, "second", scored(50.0)))]
    ended = CliRunner().invoke(app, [*paths, "--json", "-"])
    assert json.loads(ended.output) == compare(paths).data
    ended = CliRunner().invoke(app, paths)
    assert "images seen" in ended.output
    ended = CliRunner().invoke(app, paths[:1])
    assert (ended.exit_code, ended.output) == (2, "hjepa-mlx: compare needs two or more runs.\n")


def test_a_loss_of_one_s_own_is_a_difference(runs: Path) -> None:
    path = another(runs, "own", None)
    for state in path.glob("checkpoints/step-*/state.json"):
        parts = {"own_parts": {"loss_fn": "absolute", "sampler": None, "model": None}}
        state.write_text(json.dumps(json.loads(state.read_text()) | parts))
    comparison = compare([runs / "first", path])
    assert comparison.data["configuration"] == {"own loss_fn": [None, "absolute"]}
    assert "The configurations are the same." not in comparison.data["notes"]
