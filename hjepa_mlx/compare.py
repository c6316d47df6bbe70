"""Runs side by side: what differs in their configuration, how they trained, what they score."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from shlex import quote
from statistics import median
from typing import Any

from rich.console import Group

from hjepa_mlx.checkpoint import read_state
from hjepa_mlx.config import Config
from hjepa_mlx.errors import UsageError
from hjepa_mlx.recipes import dotted_keys
from hjepa_mlx.runs import Run
from hjepa_mlx.tables import Shown
from hjepa_mlx.tables.compare import MEASURES, TRAINING, comparison

MAY_DIFFER = (
    *("skipped_images", "attentive_bank_images", "attentive_query_images", "features"),
    "few_labels",  # which are not compared
)

Scores = dict[str, dict[str, list[Any]]]  # measure → level → one item a run, None where missing


@dataclass(frozen=True)
class Comparison(Shown):
    """What `compare` found, as plain values; lists have one item per run, in the order of `runs`.

    `best` has for each accuracy the places of the runs that are best in it: several if they cannot
    be told apart, none if scores are not comparable or fewer than two runs have it. (A higher rank
    is not always better.)
    """

    data: dict[str, Any]

    def __rich__(self) -> Group:
        return comparison(self.data)


def compare(runs: Sequence[str | Path | Run]) -> Comparison:
    """Compare two or more runs, or their folders.

    Raises UsageError for a folder that is no run, or that is given twice.
    """
    paths = [run.path if isinstance(run, Run) else Path(run) for run in runs]
    if len(paths) < 2:
        raise UsageError("compare needs two or more runs.")
    places = [path.resolve() for path in paths]
    if twice := [path for path in paths if places.count(path.resolve()) > 1]:
        raise UsageError(f"The same run is given twice: {', '.join(map(str, twice))}.")
    opened = [Run(path) for path in paths]
    states = [read_state(run.latest) if run.latest else None for run in opened]
    training = [_training(run, state) for run, state in zip(opened, states, strict=True)]
    configuration = _configuration(opened) | _own_parts(states)
    evaluations = [run.scores for run in opened]
    scores, intervals = _gather(evaluations), _gather(evaluations, "confidence_95")
    incomparable = _incomparable(opened, [evaluation for evaluation in evaluations if evaluation])
    notes = [] if configuration else ["The configurations are the same."]
    notes += [f"Scores are not comparable: {incomparable}."] if incomparable else []
    for run, state, evaluation in zip(opened, states, evaluations, strict=True):
        command = f"hjepa-mlx eval {quote(str(run.path))}"
        step = evaluation.get("trained", {}).get("step")
        if not evaluation:
            notes.append(f"Not evaluated: {command}")
        elif step is not None and state and state["step"] != step:
            notes.append(f"{run.path} was evaluated at step {step:,}, not since: {command}")
    banks = {e["protocol"].get("attentive_bank_images") for e in evaluations if "protocol" in e}
    unmarked = {"feature_rank"} | ({"attentive_probe"} if len(banks) > 1 else set())
    return Comparison(
        {
            "runs": [str(path) for path in paths],
            "configuration": configuration,
            "training": {key: [row[key] for row in training] for key in TRAINING},
            "scores": scores,
            "confidence_95": intervals,
            "best": {
                measure: {
                    level: _best(values, intervals.get(measure, {}).get(level, [None] * len(runs)))
                    for level, values in levels.items()
                }
                for measure, levels in scores.items()
                if not incomparable and measure not in unmarked
            },
            "random_init": _gather(evaluations, "baselines", "random_init"),
            "notes": notes,
        }
    )


def _configuration(runs: list[Run]) -> dict[str, list[Any]]:
    """Every key in which the runs' configs differ, and its values."""
    trees = [run.config.model_dump() for run in runs]
    values = {
        key: [reduce(lambda tree, part: tree[part], key.split("."), tree) for tree in trees]
        for key in dotted_keys()
        if key != "run.dir"
    }
    return {key: row for key, row in values.items() if any(value != row[0] for value in row)}


def _own_parts(states: list[dict[str, Any] | None]) -> dict[str, list[Any]]:
    """Each kind of part given to `hj.train` in which the runs differ, and its names."""
    parts: list[dict[str, Any]] = [state["own_parts"] if state else {} for state in states]
    values = {kind: [part.get(kind) for part in parts] for kind in ("loss_fn", "sampler", "model")}
    return {f"own {kind}": row for kind, row in values.items() if len(set(row)) > 1}


def _training(run: Run, state: dict[str, Any] | None) -> dict[str, Any]:
    """How far a run came, by its log and its newest checkpoint's state, and how it went."""
    config, logged = run.config, run.metrics
    reached = [*logged[-1:], *([state] if state else [])]
    last = max(reached, key=lambda row: row["step"], default={"step": 0, "epoch": 0.0})
    speeds = [row["images_per_second"] for row in logged if "images_per_second" in row]
    return {
        "steps": last["step"],
        "epochs": last["epoch"],
        "images": _images(config, int(last["step"])),
        "loss": next((row["loss"] for row in reversed(logged) if "loss" in row), None),
        "images_per_second": median(speeds) if speeds else None,
        "finished": last["epoch"] >= config.optim.epochs,
    }


def _images(config: Config, step: int) -> int:
    """How many images a run has seen by a step; each stage has batches of its own."""
    times = config.optim.accumulate
    stages = [(one.step, one.batch_size * (one.accumulate or times)) for one in config.run.history]
    stages = [*stages, (step, config.data.batch_size * times)]
    begun = [0, *(end for end, _ in stages)]
    return sum((end - start) * batch for start, (end, batch) in zip(begun, stages, strict=False))


def _gather(evaluations: list[dict[str, Any]], *inside: str) -> Scores:
    """What each evaluation has of each measure and level, under the keys `inside`."""
    parts = [reduce(lambda part, key: part.get(key, {}), inside, e) for e in evaluations]
    scores: Scores = {}
    for measure in MEASURES:
        found = [part.get(measure, {}) for part in parts]
        levels = {n for each in found for n, v in each.items() if isinstance(v, int | float | list)}
        if levels:
            order = sorted(levels, key=lambda name: (not name.startswith("level_"), name))
            scores[measure] = {level: [each.get(level) for each in found] for level in order}
    return scores


def _best(values: list[float | None], intervals: list[Any]) -> list[int]:
    """The runs whose interval (without one: value) reaches up to that of the best value."""
    known = {
        run: (value, *(interval or (value, value)))
        for run, (value, interval) in enumerate(zip(values, intervals, strict=True))
        if value is not None
    }
    lowest = max(known.values(), default=(0, 0, 0))[1]
    best = [run for run, (_, _, high) in known.items() if high >= lowest]
    return best if len(known) > 1 else []


def _incomparable(runs: list[Run], evaluations: list[dict[str, Any]]) -> str:
    """In words, what tells the evaluations apart: their images, or anything of their protocols."""
    own = [run.config.data for run in runs if run.config.data.name == "folder"]
    folders = {Path(str(data.dir)).resolve() for data in own}
    if len(folders) > 1:
        return "the runs' image folders differ"
    protocols = [evaluation.get("protocol", {}) for evaluation in evaluations]
    differing = []
    for key in protocols[0] if protocols else ():
        values = [protocol.get(key) for protocol in protocols]
        plain = all(isinstance(value, str | int | float) for value in values)
        if plain and key not in MAY_DIFFER and len(set(values)) > 1:
            differing.append(f"{key} ({', '.join(map(str, dict.fromkeys(values)))})")
    return ", ".join(differing) + " differ" if differing else ""
