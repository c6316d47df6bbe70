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
from scoring import ENCODERS, encoded
from sklearn.linear_model import LogisticRegression
from study import config_of, trained, with_deviation

from hjepa_mlx.eval.features import Features
from hjepa_mlx.eval.knn import knn_accuracy
from hjepa_mlx.eval.linear_probe import moments, standardised
from hjepa_mlx.eval.rank import rankme

DATA = "fashion", "test"
ITERATIONS = 1_000  # of scikit-learn's L-BFGS, at its own C = 1


def evaluated(variant: str, seed: int, root: Path) -> list[list[float]]:
    """k-NN, linear probe and rank of the target and of the context encoder."""
    model = trained(variant, config_of(variant, DATA[0], seed, DATA[1], root))
    return [scores(*parts) for parts in encoded(model).values()]


def scores(train: Features, test: Features) -> list[float]:
    """k-NN, linear probe (both %) and rank of one encoder's last level."""
    *_, level = train.pooled
    moved = moments(train.pooled[level])
    x, queries = (standardised(part.pooled[level], *moved) for part in (train, test))
    probe = LogisticRegression(max_iter=ITERATIONS).fit(x, train.labels)
    return [
        knn_accuracy(x, train.labels, queries, test.labels),
        100 * probe.score(queries, test.labels),
        centred_rank(test.pooled[level]),
    ]


def centred_rank(features: np.ndarray) -> float:
    """RankMe of centred features [N, D]."""
    return rankme(features - features.mean(0))


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
