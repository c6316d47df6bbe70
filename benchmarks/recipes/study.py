"""Compare recipes: variants × seeds, trained on equally many images and evaluated alike.

python benchmarks/recipes/data.py data/recipes
python benchmarks/recipes/study.py baseline untrained --data fashion --jobs 2
python benchmarks/recipes/study.py baseline --data fashion --split test

Each run is kept as JSON in benchmarks/results/recipes/; what is there is not done again, and what
was interrupted goes on. Choices are made on split `validation`, made of training images. A network
has never seen the images that it is judged on: each split has training images of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from math import isqrt
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from variants import DATA_SETS, FOLDERS, VARIANTS

import hjepa_mlx as hj
from hjepa_mlx.costs import costs
from hjepa_mlx.data.pipeline import Skipped, evaluation_images
from hjepa_mlx.eval.evaluation import Protocol, level_scores
from hjepa_mlx.eval.features import Features, extract, model_features
from hjepa_mlx.eval.linear_probe import moments, standardised
from hjepa_mlx.eval.rank import rankme
from hjepa_mlx.files import write_json
from hjepa_mlx.signals import warnings

import mlx.core as mx  # isort: skip  (after hjepa_mlx, which loads OpenBLAS)

RESULTS = Path(__file__).parent.parent / "results" / "recipes"
ENCODERS = "target", "context"
CLASS_SCORES = ("knn", "linear_probe", "feature_rank")
SCORES = (*CLASS_SCORES, "standardised_rank", "orientation")
LOCAL_IMAGES = 1_000  # whose patches are looked at for the orientation of edges
EDGES = 1e-3  # mean squared slope of a patch that has any, of grey from 0 to 1
Result = dict[str, Any]


def config_of(variant: str, data: str, seed: int, split: str, root: Path) -> hj.Config:
    """The variant's recipe on this data set's training images for this split."""
    chosen = VARIANTS[variant]
    overrides = [*DATA_SETS[data], *chosen.overrides]
    own = [
        f"name={variant}",
        f"seed={seed}",
        f"data.dir={root / FOLDERS.get(data, data) / split}",
        f"run.dir={root / 'runs' / data / split / f'{variant}-{seed}'}",
    ]
    return hj.load_config(chosen.recipe, [*overrides, *own])


def result_file(variant: str, data: str, seed: int, split: str) -> Path:
    """Where one run's figures are kept."""
    return RESULTS / data / split / f"{variant}-{seed}.json"


def run(variant: str, data: str, seed: int, split: str, root: Path) -> None:
    """Train and evaluate one variant with one seed, as far as that is not done yet."""
    config = config_of(variant, data, seed, split, root)
    file = result_file(variant, data, seed, split)
    recipe: Result = config.model_dump(exclude={"run", "name"})
    recipe["data"].pop("dir")
    if file.is_file():
        kept: Result = json.loads(file.read_text())["recipe"]
        for one in (kept, recipe):
            one["data"].pop("weights", None)  # a key of earlier versions, auto in all of these
        if kept != recipe:
            raise SystemExit(f"{file} is of another recipe. Delete it, or rename the variant.")
        return
    model = trained(variant, config)
    rows = hj.Run(str(config.run.dir)).metrics
    images = rows[-1]["step"] * config.data.batch_size if rows else 0
    speed = np.median([row["images_per_second"] for row in rows if "loss" in row] or [1])
    said = {row["step"]: warnings(rows[0], row) for row in rows if "effective_rank_level_0" in row}
    result = {
        "recipe": recipe,
        "cost": {
            "gflop_per_image": costs(config, model).gflop,
            "seconds": round(images / speed),
        },
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
        hj.train(config, resume=folder.exists(), model=network(config), sampler=sampler)
    return hj.load(folder, network(config))


def encoded(model: hj.HJEPA) -> dict[str, tuple[Features, Features]]:
    """Features of training and test images, by encoder."""
    splits = (
        extract(
            lambda: [model_features(model, encoder) for encoder in ENCODERS],
            hj.open_source(model.config.data, split),
            model.config,
            Skipped(),
        )
        for split in ("train", "test")
    )
    return dict(zip(ENCODERS, zip(*splits, strict=True), strict=True))


def scores(model: hj.HJEPA) -> Result:
    """k-NN, linear probe and effective rank of target and context encoder, by level."""
    found: Result = {}
    for encoder, (train, test) in encoded(model).items():
        for name in train.pooled:
            every = level_scores(train, test, name, Protocol(draws=0))
            found.setdefault(encoder, {})[name] = {
                **{kind: every[kind] for kind in CLASS_SCORES},
                "standardised_rank": standardised_rank(test.pooled[name]),
            }
        for level, value in enumerate(orientation(model, encoder)):
            found[encoder][f"level_{level}"]["orientation"] = value
    return found


def standardised_rank(features: np.ndarray) -> float:
    """RankMe of standardised features: no direction counts for more because it is large."""
    return rankme(standardised(features, *moments(features)))


def orientation(model: hj.HJEPA, encoder: str) -> list[float]:
    """How well each level's cells know the orientation of edges in each of their patches: R², %.

    A ridge regression from the features of the cell that a patch lies in to (cos 2θ, sin 2θ) of the
    patch's structure tensor, as strong as its edges are aligned; patches without edges left out.
    """
    config, parts = model.config, []
    for split in ("train", "test"):
        source = hj.open_source(config.data, split).some(LOCAL_IMAGES, "orientation")
        samples = evaluation_images(source, config, Skipped())
        images = np.stack([image for _, image in samples])
        directions, edged = structure(images, config.model.patch_size)
        batches = np.array_split(images, -(-len(images) // 64))
        encoded = zip(*(model.encode(batch, encoder) for batch in batches), strict=True)
        pools = map(int, config.model.level_pool)
        levels = [
            np.concatenate([_of_patches(np.array(x), config.grid, pool) for x in level])
            for level, pool in zip(encoded, pools, strict=True)
        ]
        parts.append(([x[edged] for x in levels], directions[edged]))
    (learnt, y), (judged, truth) = parts
    found = []
    for x, queries in zip(learnt, judged, strict=True):
        mean, scale = x.mean(0), x.std(0) + 1e-6
        x, queries = (x - mean) / scale, (queries - mean) / scale
        weights = np.linalg.solve(x.T @ x + np.eye(x.shape[1]), x.T @ (y - y.mean(0)))
        error = np.square(queries @ weights + y.mean(0) - truth).sum()
        found.append(100 * float(1 - error / np.square(truth - truth.mean(0)).sum()))
    return found


def structure(images: np.ndarray, patch: int) -> tuple[np.ndarray, np.ndarray]:
    """Of each patch: the direction of its structure tensor [n, 2], and whether it has edges [n]."""
    grey = images.mean(-1) / 255
    dy, dx = np.gradient(grey, axis=(1, 2))
    grid = images.shape[1] // patch

    def summed(x: np.ndarray) -> np.ndarray:
        return x.reshape(-1, grid, patch, grid, patch).sum((2, 4)).ravel()

    energy = summed(dx * dx + dy * dy)
    tensor = np.stack([summed(dx * dx - dy * dy), summed(2 * dx * dy)], 1)
    edged = energy > EDGES * patch**2
    return tensor / np.maximum(energy, 1e-9)[:, None], edged


def _of_patches(cells: np.ndarray, grid: int, pool: int) -> np.ndarray:
    """Features of cells [B, n, D] of pool × pool patches, given to each of those: [B·grid², D]."""
    B, n, D = cells.shape
    side, places = isqrt(n), np.arange(grid) // pool
    return cells.reshape(B, side, side, D)[:, places][:, :, places].reshape(-1, D)


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
    """Mean and standard deviation over seeds, by encoder and level."""
    shown = Table("variant", "GFLOP", "seconds", "encoder", "level", title=f"{data}, {split}")
    for title in ("seeds", "warned", *SCORES):
        shown.add_column(title.replace("_", " "), justify="right")
    for variant in variants:
        files = [result_file(variant, data, seed, split) for seed in seeds]
        results = [json.loads(file.read_text()) for file in files if file.is_file()]
        if not results:
            continue
        cost = [
            f"{np.mean([r['cost'][key] for r in results]):{form}}"
            for key, form in (("gflop_per_image", ".2f"), ("seconds", ".0f"))
        ]
        warned = sum(bool(result["warnings"]) for result in results)
        seen = str(len(results)), str(warned)
        for encoder, levels in results[0]["scores"].items():
            for level in levels:
                of_seeds = [result["scores"][encoder][level] for result in results]
                kinds = [kind for kind in SCORES if kind in of_seeds[0]]
                figures = [with_deviation([one[kind] for one in of_seeds]) for kind in kinds]
                shown.add_row(variant, *cost, encoder, level, *seen, *figures)
    return shown


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
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    asked = parser.parse_args()
    runs = [(variant, seed) for variant in asked.variants for seed in asked.seeds]
    if asked.jobs > 1:
        side_by_side(runs, asked.data, asked.split, asked.root, asked.jobs)
    else:
        for variant, seed in runs:
            run(variant, asked.data, seed, asked.split, asked.root)
    console = Console(width=160)
    console.print(table(asked.variants, asked.data, asked.seeds, asked.split))


if __name__ == "__main__":
    main()
