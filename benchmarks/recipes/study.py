"""Compare recipes: variants × seeds, trained on equally many images and evaluated alike.

python benchmarks/recipes/data.py data/recipes
python benchmarks/recipes/study.py baseline untrained --data fashion --jobs 2
python benchmarks/recipes/study.py baseline --data fashion --split test

Each run is kept as JSON in benchmarks/results/recipes/; what is there is not done again, and what
was interrupted goes on. Choices are made on split `validation`, made of training images.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from variants import DATA_SETS, VARIANTS

import hjepa_mlx as hj
from hjepa_mlx.bench.costs import costs
from hjepa_mlx.data.pipeline import Skipped
from hjepa_mlx.eval.evaluation import config_for
from hjepa_mlx.eval.features import extract, model_features
from hjepa_mlx.eval.protocols import Protocol, level_scores
from hjepa_mlx.files import atomic_write

RESULTS = Path(__file__).parent.parent / "results" / "recipes"
SCORES = ("knn", "linear_probe", "feature_rank")
Result = dict[str, Any]


def config_of(variant: str, data: str, seed: int, root: Path) -> hj.Config:
    """The variant's recipe on this data set."""
    chosen = VARIANTS[variant]
    overrides = [*DATA_SETS[data].overrides, *chosen.overrides]
    own = [f"name={variant}", f"seed={seed}", f"data.dir={root / data / 'test'}"]
    return hj.load_config(chosen.recipe, [*overrides, *own])


def result_file(variant: str, data: str, seed: int) -> Path:
    """Where one run's figures are kept."""
    return RESULTS / data / f"{variant}-{seed}.json"


def run(variant: str, data: str, seed: int, split: str, root: Path) -> None:
    """Train and evaluate one variant with one seed, as far as that is not done yet."""
    config, file = config_of(variant, data, seed, root), result_file(variant, data, seed)
    recipe = config.model_dump(exclude={"run", "name"})
    recipe["data"].pop("dir")
    result: Result = json.loads(file.read_text()) if file.is_file() else {"recipe": recipe}
    if result["recipe"] != recipe:
        raise SystemExit(f"{file} is of another recipe: delete it, or give the variant a new name.")
    if split in result:
        return
    config.run.dir = str(root / "runs" / data / f"{variant}-{seed}")
    begun = time.monotonic()
    model = trained(variant, config)
    if "cost" not in result:
        result["cost"] = {
            "gflop_per_image": costs(config, model).gflop,
            "seconds": round(time.monotonic() - begun),
        }
        rows = hj.Run(config.run.dir).metrics if VARIANTS[variant].trained else []
        result["last_metrics"] = rows[-1] if rows else {}
    result[split] = scores(model, str(root / data / split))
    file.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(file) as out:
        out.write(json.dumps(result, indent=1).encode())


def trained(variant: str, config: hj.Config) -> hj.HJEPA:
    """The variant's network, after what it does of training."""
    network = VARIANTS[variant].network or hj.HJEPA
    if not VARIANTS[variant].trained:
        return network(config)
    folder = Path(str(config.run.dir))
    done = hj.Run(folder)
    if not done.metrics or done.metrics[-1]["epoch"] < config.optim.epochs or not done.latest:
        hj.train(config, resume=folder.exists(), model=network(config))
    return hj.load(folder)


def scores(model: hj.HJEPA, folder: str) -> Result:
    """k-NN, linear probe and effective rank of target and context encoder, by level."""
    config = config_for(model.config, None, folder)
    learnt_from, judged_on = (
        extract(
            lambda: [model_features(model, "target"), model_features(model, "context")],
            hj.open_source(config.data, split),
            config,
            Skipped(),
        )
        for split in ("train", "test")
    )
    found: Result = {}
    for encoder, train, test in zip(("target", "context"), learnt_from, judged_on, strict=True):
        for name in train.by_name:
            every = level_scores(train, test, name, Protocol(), few=False)
            found.setdefault(encoder, {})[name] = {kind: every[kind] for kind in SCORES}
    return found


def side_by_side(todo: list[tuple[str, int]], data: str, split: str, root: Path, jobs: int) -> None:
    """Do what is to be done in processes of one BLAS thread each; their output goes to files."""
    (root / "logs").mkdir(parents=True, exist_ok=True)

    def start(which: tuple[str, int]) -> int:
        variant, seed = which
        command = [sys.executable, __file__, variant, "--data", data, "--seeds", str(seed)]
        command += ["--split", split, "--root", str(root)]
        with open(root / "logs" / f"{data}-{variant}-{seed}.txt", "w") as log:
            environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}
            return subprocess.run(
                command, stdout=log, stderr=subprocess.STDOUT, env=environment
            ).returncode

    with ThreadPoolExecutor(jobs) as pool:
        failed = [w for w, status in zip(todo, pool.map(start, todo), strict=True) if status]
    if failed:
        raise SystemExit(f"Failed: {failed}; see {root / 'logs'}.")


def table(variants: list[str], data: str, seeds: list[int], split: str) -> Table:
    """Mean and standard deviation over seeds, by encoder and level."""
    shown = Table("variant", "GFLOP", "seconds", "encoder", "level", title=f"{data}, {split}")
    for title in ("seeds", "k-NN", "linear probe", "effective rank"):
        shown.add_column(title, justify="right")
    for variant in variants:
        files = [result_file(variant, data, seed) for seed in seeds]
        results = [json.loads(file.read_text()) for file in files if file.is_file()]
        results = [result for result in results if split in result]
        if not results:
            continue
        cost = [
            f"{np.mean([r['cost'][key] for r in results]):{form}}"
            for key, form in (("gflop_per_image", ".2f"), ("seconds", ".0f"))
        ]
        for encoder, levels in results[0][split].items():
            for level in levels:
                of_seeds = [result[split][encoder][level] for result in results]
                figures = [_mean([one[kind] for one in of_seeds]) for kind in SCORES]
                shown.add_row(variant, *cost, encoder, level, str(len(results)), *figures)
    return shown


def _mean(values: list[float]) -> str:
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
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    asked = parser.parse_args()
    todo = [(variant, seed) for variant in asked.variants for seed in asked.seeds]
    if asked.jobs > 1:
        side_by_side(todo, asked.data, asked.split, asked.root, asked.jobs)
    else:
        for variant, seed in todo:
            run(variant, asked.data, seed, asked.split, asked.root)
    console = Console(width=120)
    console.print(table(asked.variants, asked.data, asked.seeds, asked.split))


if __name__ == "__main__":
    main()
