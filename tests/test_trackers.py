"""Trackers get every logged row, and never stop a run."""

import io
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

import hjepa_mlx as hj
from hjepa_mlx import trackers
from hjepa_mlx.config import Config
from hjepa_mlx.runs import Run


def logged(config: Config, folder: Path, rows: list[dict[str, Any]]) -> str:
    """Log rows of a run with this config; returns what was said."""
    folder.mkdir()
    run, said = Run(folder), io.StringIO()
    run.store(config)
    with trackers.logging(run, Console(file=said, width=200), run.config.run.trackers) as log:
        for row in rows:
            log(row)
    assert run.metrics == rows
    return said.getvalue()


ROWS = [{"step": step, "loss": 1 / (step + 1), "own_parts": {}, "nothing": None} for step in (0, 7)]


def test_tensorboard_reads_back_every_row(tiny_config, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert logged(tiny_config(run={"trackers": ["tensorboard"]}), tmp_path / "run", ROWS) == ""
    events = EventAccumulator(str(tmp_path / "run/tensorboard")).Reload()
    tensors = events.Tensors("loss")
    assert [(event.step, event.tensor_proto.float_val[0]) for event in tensors] == [
        (0, 1.0),
        (7, 0.125),
    ]


def test_wandb_gets_every_row_and_the_same_run_when_resumed(
    tiny_config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started, got = [], []

    def init(**options: Any) -> SimpleNamespace:
        started.append((options["id"], options["config"]["seed"]))
        log = lambda numbers, step: got.append((step, numbers["loss"]))  # noqa: E731
        return SimpleNamespace(log=log, finish=lambda: got.append("finished"))

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    config = tiny_config(run={"trackers": ["wandb"]})
    logged(config, tmp_path / "run", ROWS)
    with trackers.logging(Run(tmp_path / "run"), Console(file=io.StringIO()), ["wandb"]):
        pass
    assert got == [(0, 1.0), (7, 0.125), "finished", "finished"]
    assert started[0] == started[1]


@pytest.mark.parametrize("when", ["init", "log", "finish"])
def test_a_tracker_that_fails_is_left_out_and_said(
    when: str, tiny_config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def answer(name: str, result: Any = None) -> Any:
        def call(*_: Any, **__: Any) -> Any:
            calls.append(name)
            if name == when:
                raise ConnectionError("no network")
            return result

        return call

    run = SimpleNamespace(log=answer("log"), finish=answer("finish"))
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=answer("init", run)))
    said = logged(tiny_config(run={"trackers": ["wandb"]}), tmp_path / "run", ROWS)
    assert said.splitlines() == [
        "wandb failed and is left out: no network. metrics.jsonl has every row."
    ]
    assert calls.count(when) == 1


def test_a_missing_tracker_is_named_with_its_extra_before_anything_is_made(
    tiny_config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    data = {"name": "demo", "limit": 40}
    run = {"trackers": ["wandb"], "dir": str(tmp_path / "run")}
    with pytest.raises(hj.HJEPAError, match=r"wandb needs: pip install 'hjepa-mlx\[wandb\]'"):
        hj.train(tiny_config(data=data, run=run))
    assert not (tmp_path / "run").exists()
