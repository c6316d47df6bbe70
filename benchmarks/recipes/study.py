"""Compare recipes: variants × seeds, trained on equally many images and evaluated alike.

python benchmarks/recipes/data.py data/recipes
python benchmarks/recipes/study.py baseline untrained --data fashion --jobs 2
python benchmarks/recipes/study.py baseline --data fashion --split test
python benchmarks/recipes/study.py chosen small --data pictures --minutes 8  # again, to go on

Each run is kept as JSON in benchmarks/results/recipes/; what is there is not done again, and what
was interrupted goes on. Choices are made on split `validation`. A network has never seen the images
that it is judged on: a split has training images of its own, or one training serves both.

--minutes: runs go on in the order given. When the time is up, training stops and is saved. A run
that would not fit is not begun, judged by the FLOP/s of the one before. A run that has been trained
in time is scored in any case.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from scoring import SCORES, baselines, scores
from variants import DATA_SETS, FOLDERS, ONE_TRAINING, VARIANTS

import hjepa_mlx as hj
from hjepa_mlx.bench.machine import describe
from hjepa_mlx.checkpoint import read_state
from hjepa_mlx.costs import average_gflop
from hjepa_mlx.files import write_json
from hjepa_mlx.runs import differences
from hjepa_mlx.signals import highest, warnings
from hjepa_mlx.state import steps_per_epoch
from hjepa_mlx.train import Interrupted

import mlx.core as mx  # isort: skip  (after hjepa_mlx, which loads OpenBLAS)

RESULTS = Path(__file__).parent.parent / "results" / "recipes"
UNTRAINED = "untrained", "untrained_small"  # shown beside every variant
COSTS = {  # of a run, by column: key and format
    "GFLOP": ("gflop_per_image", ".2f"),
    "TFLOP": ("tflop", ",.0f"),
    "pictures": ("pictures", ",.0f"),
    "seconds": ("seconds", ",.0f"),
}
Result = dict[str, Any]


def config_of(variant: str, data: str, seed: int, split: str, root: Path) -> hj.Config:
    """The variant's recipe on this data set's training images for this split."""
    chosen = VARIANTS[variant]
    overrides = [*DATA_SETS[data], *chosen.overrides]
    part = "" if FOLDERS.get(data, data) in ONE_TRAINING else split
    own = [
        f"name={variant}",
        f"seed={seed}",
        f"data.dir={root / FOLDERS.get(data, data) / split}",
        f"run.dir={root / 'runs' / data / part / f'{variant}-{seed}'}",
    ]
    config = hj.load_config(chosen.recipe, [*overrides, *own])
    config.optim.epochs = round(chosen.share * config.optim.epochs)
    return config


def result_file(variant: str, data: str, seed: int, split: str) -> Path:
    """Where one run's figures are kept."""
    return RESULTS / data / split / f"{variant}-{seed}.json"


def baseline_file(data: str, split: str) -> Path:
    """Where the figures of the images themselves are kept."""
    return RESULTS / FOLDERS.get(data, data) / split / "baselines.json"


def run(
    variant: str, data: str, seed: int, split: str, root: Path, end: float | None = None
) -> None:
    """Train and evaluate one variant with one seed, as far as that is not done yet.

    end: of the training at the latest, on the monotonic clock; Interrupted if there is more to do.
    """
    config = config_of(variant, data, seed, split, root)
    file = result_file(variant, data, seed, split)
    recipe: Result = config.model_dump(exclude={"run", "name"})
    recipe["data"].pop("dir")
    if file.is_file():
        kept: Result = json.loads(file.read_text())["recipe"]
        kept["data"].pop("weights", None)  # a key of earlier versions, auto in all of these
        if differences(kept, recipe):  # keys that came later are off
            raise SystemExit(f"{file} is of another recipe. Delete it, or rename the variant.")
        return
    with stopped_at(end):
        model = trained(variant, config)
    made = hj.Run(str(config.run.dir))
    rows, used = made.metrics, made.config if made.metrics else config
    pictures = rows[-1]["step"] * config.data.batch_size * config.optim.accumulate if rows else 0
    gflop = average_gflop(config, model)
    speed = np.median([row["images_per_second"] for row in rows if "loss" in row] or [1])
    said = {r["step"]: warnings(highest(rows[:n]), r, config.predicted) for n, r in enumerate(rows)}
    result = {
        "recipe": recipe,
        "cost": {
            "gflop_per_image": gflop,
            "seconds": round(pictures / speed),
            "pictures": pictures,
            "tflop": gflop * pictures / 1_000,
        },
        "machine": {**describe(), "precision": used.precision, "compile": used.compile},
        "last_metrics": rows[-1] if rows else {},
        "warnings": {step: words for step, words in said.items() if words},
        "scores": scores(model),
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, result)


def trained(variant: str, config: hj.Config) -> hj.HJEPA:
    """The variant's network, after what it does of training."""
    network, masks = VARIANTS[variant].network or hj.HJEPA, VARIANTS[variant].sampler
    if not VARIANTS[variant].trained:
        model = network(config)
        mx.eval(model.parameters())  # here: the threads of the evaluation could not
        return model
    folder = Path(str(config.run.dir))
    done = hj.Run(folder)
    if not done.metrics or done.metrics[-1]["epoch"] < config.optim.epochs or not done.latest:
        sampler = masks(config) if masks else None
        begun = (folder / "config.yaml").exists()
        hj.train(config, resume=begun, model=network(config), sampler=sampler)
    return hj.load(folder, network(config))


@contextmanager
def stopped_at(end: float | None) -> Iterator[None]:
    """Have training stop as at a Ctrl-C when the monotonic clock says `end`, while inside."""
    if end is None:
        yield
        return
    stop = threading.Timer(end - time.monotonic(), os.kill, (os.getpid(), signal.SIGINT))
    stop.daemon = True
    stop.start()
    try:
        yield
    finally:
        stop.cancel()


def in_time(
    runs: list[tuple[str, int]], data: str, split: str, root: Path, minutes: float
) -> Iterator[str]:
    """Do what fits into the minutes; yields what did not, in words."""
    end = time.monotonic() + 60 * minutes
    pace, other = 0.0, 0.0  # of the run before: seconds a TFLOP, and seconds beside training
    for variant, seed in runs:
        config = config_of(variant, data, seed, split, root)
        file = result_file(variant, data, seed, split)
        if file.is_file():
            run(variant, data, seed, split, root)
            continue
        begun, work = left_of(variant, config)
        now = time.monotonic()
        needed = work * pace + other
        if now >= end or (not begun and now + needed > end):
            needs = f" It needs about {needed:.0f} s." if needed else ""
            yield f"{variant}, seed {seed}: not begun, {max(0, end - now):.0f} s are left.{needs}"
            continue
        try:
            run(variant, data, seed, split, root, end)
        except (Interrupted, KeyboardInterrupt):
            if time.monotonic() < end:
                raise
            done = 100 * left_of(variant, config)[0]
            yield f"{variant}, seed {seed}: stopped by the clock, {done:.0f} % trained and saved."
            continue
        cost = json.loads(file.read_text())["cost"]
        pace = cost["seconds"] / cost["tflop"] if work else pace
        other = max(0.0, time.monotonic() - now - work * pace)


def left_of(variant: str, config: hj.Config) -> tuple[float, float]:
    """The share of a run that is trained and saved, and the TFLOP that are left."""
    if not VARIANTS[variant].trained:
        return 0.0, 0.0
    saved = hj.Run(str(config.run.dir)).latest
    begun = read_state(saved)["epoch"] / config.optim.epochs if saved else 0.0
    images = len(hj.open_source(config.data, "pretrain"))
    steps = steps_per_epoch(config, images) * config.optim.epochs
    pictures = steps * config.data.batch_size * config.optim.accumulate
    network = VARIANTS[variant].network or hj.HJEPA
    return begun, (1 - begun) * pictures * average_gflop(config, network(config)) / 1_000


def side_by_side(runs: list[tuple[str, int]], data: str, split: str, root: Path, jobs: int) -> None:
    """Do what is to be done in processes of one BLAS thread each; their output goes to files."""
    (root / "logs").mkdir(parents=True, exist_ok=True)

    def start(which: tuple[str, int]) -> int:
        variant, seed = which
        command = [sys.executable, __file__, variant, "--data", data, "--seeds", str(seed)]
        command += ["--split", split, "--root", str(root)]
        with open(root / "logs" / f"{data}-{split}-{variant}-{seed}.txt", "w") as log:
            environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}
            return subprocess.run(
                command, stdout=log, stderr=subprocess.STDOUT, env=environment
            ).returncode

    with ThreadPoolExecutor(jobs) as pool:
        failed = [w for w, status in zip(runs, pool.map(start, runs), strict=True) if status]
    if failed:
        raise SystemExit(f"Failed: {failed}; see {root / 'logs'}.")


def table(variants: list[str], data: str, seeds: list[int], split: str) -> Table:
    """Mean and standard deviation over seeds, by encoder and level; baselines first."""
    shown = Table(title=f"{data}, {split}")
    for title in ("variant", "device", "encoder", "level"):
        shown.add_column(title)
    for title in ("seeds", "warned", *COSTS, *SCORES):
        shown.add_column(title.replace("_", " "), justify="right")
    baseline = baseline_file(data, split)
    kept = {"no network": [json.loads(baseline.read_text())]} if baseline.is_file() else {}
    for variant in dict.fromkeys((*UNTRAINED, *variants)):
        files = [result_file(variant, data, seed, split) for seed in seeds]
        kept[variant] = [json.loads(file.read_text()) for file in files if file.is_file()]
    for variant, results in kept.items():
        for encoder, levels in results[0]["scores"].items() if results else ():
            for level in levels:
                of_seeds = [result["scores"][encoder][level] for result in results]
                figures = [
                    with_deviation([one[kind] for one in of_seeds]) if kind in of_seeds[0] else ""
                    for kind in SCORES
                ]
                shown.add_row(variant, *_facts(results, encoder, level), *figures)
    return shown


def _facts(results: list[Result], encoder: str, level: str) -> list[str]:
    """A row's cells before the scores: what it is of, and what it cost."""
    if "cost" not in results[0]:
        return ["", encoder, level, *[""] * (2 + len(COSTS))]
    devices = ", ".join(sorted({result["machine"]["device"] for result in results}))
    warned = sum(bool(result["warnings"]) for result in results)
    costs = [
        f"{np.mean([result['cost'][key] for result in results]):{form}}"
        for key, form in COSTS.values()
    ]
    return [devices, encoder, level, str(len(results)), str(warned), *costs]


def with_deviation(values: list[float]) -> str:
    """Mean and standard deviation."""
    spread = f" ± {np.std(values, ddof=1):.1f}" if len(values) > 1 else ""
    return f"{np.mean(values):.1f}{spread}"


def main() -> None:
    """Do what is missing, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("variants", nargs="+", choices=VARIANTS, metavar="VARIANT")
    parser.add_argument("--data", choices=DATA_SETS, default="fashion")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--split", choices=("validation", "test"), default="validation")
    parser.add_argument("--root", type=Path, default=Path("data/recipes"))
    one = parser.add_mutually_exclusive_group()
    one.add_argument("--jobs", type=int, default=1, help="runs at a time")
    one.add_argument("--minutes", type=float, help="go no further than fits into these")
    asked = parser.parse_args()
    console = Console(width=190)
    runs = [(variant, seed) for variant in asked.variants for seed in asked.seeds]
    if asked.jobs > 1:
        side_by_side(runs, asked.data, asked.split, asked.root, asked.jobs)
    elif asked.minutes:
        for line in in_time(runs, asked.data, asked.split, asked.root, asked.minutes):
            console.print(line)
    else:
        for variant, seed in runs:
            run(variant, asked.data, seed, asked.split, asked.root)
    file = baseline_file(asked.data, asked.split)
    if not file.is_file() and not asked.minutes:  # they take a minute too
        config = config_of(UNTRAINED[0], asked.data, 0, asked.split, asked.root)
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, {"scores": baselines(config)})
    console.print(table(asked.variants, asked.data, asked.seeds, asked.split))


if __name__ == "__main__":
    main()
