"""Evaluate networks as the run of Meta's code that `ijepa` is compared with was evaluated.

python benchmarks/recipes/reference.py ijepa untrained_ijepa untrained_ijepa_0.02

On Fashion-MNIST's test images: k-NN and scikit-learn's logistic regression on standardised
features, and the rank of centred ones. Trains what is not trained yet.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table
from sklearn.linear_model import LogisticRegression
from study import config_of, run_dir, trained, with_deviation

import hjepa_mlx as hj
from hjepa_mlx.data.pipeline import Skipped
from hjepa_mlx.eval.features import Features, extract, model_features
from hjepa_mlx.eval.knn import knn_accuracy
from hjepa_mlx.eval.linear_probe import moments, standardised

DATA = "fashion", "test"
ENCODERS = "target", "context"
ITERATIONS = 1_000  # of scikit-learn's L-BFGS, at its own C = 1


def evaluated(variant: str, seed: int, root: Path) -> list[list[float]]:
    """k-NN, linear probe and rank of the target and of the context encoder."""
    config = config_of(variant, DATA[0], seed, DATA[1], root)
    config.run.dir = run_dir(variant, DATA[0], seed, DATA[1], root)
    model = trained(variant, config)
    splits = [
        extract(
            lambda: [model_features(model, encoder) for encoder in ENCODERS],
            hj.open_source(config.data, split),
            config,
            Skipped(),
        )
        for split in ("train", "test")
    ]
    return [scores(*parts) for parts in zip(*splits, strict=True)]


def scores(train: Features, test: Features) -> list[float]:
    """k-NN, linear probe (both %) and rank of one encoder's last level."""
    *_, level = train.by_name
    moved = moments(train.by_name[level])
    x, queries = (standardised(part.by_name[level], *moved) for part in (train, test))
    probe = LogisticRegression(max_iter=ITERATIONS).fit(x, train.labels)
    return [
        knn_accuracy(x, train.labels, queries, test.labels),
        100 * probe.score(queries, test.labels),
        centred_rank(test.by_name[level]),
    ]


def centred_rank(features: np.ndarray) -> float:
    """exp(entropy) of the singular values of centred features [N, D], as shares of their sum."""
    singular = np.linalg.svd(features - features.mean(0), compute_uv=False).astype(np.float64)
    share = singular[singular > 0] / singular.sum()
    return float(np.exp(-(share * np.log(share)).sum()))


def main() -> None:
    """Print mean and standard deviation over seeds."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("variants", nargs="+", metavar="VARIANT")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--root", type=Path, default=Path("data/recipes"))
    asked = parser.parse_args()
    table = Table("variant", "encoder", "k-NN", "linear probe", "rank")
    for variant in asked.variants:
        runs = [evaluated(variant, seed, asked.root) for seed in asked.seeds]
        for encoder, of_seeds in zip(ENCODERS, zip(*runs, strict=True), strict=True):
            figures = (with_deviation(list(one)) for one in zip(*of_seeds, strict=True))
            table.add_row(variant, encoder, *figures)
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
