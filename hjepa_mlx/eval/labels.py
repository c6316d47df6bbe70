"""Labels: which of them k-NN and probes can use, and the probe that has only a few."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from hjepa_mlx.data.source import Source
from hjepa_mlx.errors import UsageError
from hjepa_mlx.eval import linear_probe
from hjepa_mlx.eval.arrays import HELD_OUT, accuracy
from hjepa_mlx.eval.features import Features
from hjepa_mlx.eval.knn import K
from hjepa_mlx.rng import generator

NAMED = 3  # classes in a line


def judged(train: Source, test: Source, k: int = K) -> tuple[Source, Source, list[str]]:
    """Both splits with the labels that can be judged, and lines about what is left out.

    Images without a label and test images of a class that training lacks are left out. Where
    nothing could be judged, all images stay, without classes.
    """
    if not train.classes:
        return train, test, []
    have, asked = (np.unique(source.labels[source.labels >= 0]) for source in (train, test))
    common = np.intersect1d(have, asked)
    kept = [np.flatnonzero(np.isin(source.labels, have)) for source in (train, test)]
    why = ""
    if not len(have) or not len(asked):
        why = f"the {'test' if len(have) else 'training'} images have no labels"
    elif len(have) < 2:
        why = "all training images have one label"
    elif (n := len(kept[0])) < max(k, HELD_OUT):
        why = f"k={k} needs at least {max(k, HELD_OUT)} training images with a label; there are "
        why += f"{n}" + (f". Take `hjepa-mlx eval RUN --k {n}`" if n >= HELD_OUT else "")
    elif 2 * len(common) < len(asked):
        why = f"of the {len(asked)} classes of the test images, training has {len(common)}"
    if why:
        train, test = (
            replace(source, labels=source.labels[:0], classes=()) for source in (train, test)
        )
        return train, test, [f"No k-NN and no probes: {why}."]
    notes = []
    names = np.array(train.classes, object)
    if without := sum(int((source.labels < 0).sum()) for source in (train, test)):
        notes.append(f"Evaluation leaves out images without a label: {without:,}.")
    if dropped := int(np.isin(test.labels, np.setdiff1d(asked, have)).sum()):
        classes = _listed(names[np.setdiff1d(asked, have)])
        notes.append(
            f"Evaluation leaves out test images of a class that training lacks: {dropped:,} "
            f"({classes})."
        )
    if len(untested := np.setdiff1d(have, asked)):
        notes.append(f"No test image is of {_listed(names[untested])}.")
    train, test = (
        replace(
            source.take(rows),
            labels=np.searchsorted(have, source.labels[rows]),
            classes=tuple(names[have]),
        )
        for source, rows in zip((train, test), kept, strict=True)
    )
    return train, test, notes


class NoTestImages(UsageError):
    """All images are trained on."""


def check_evaluable(train: Source, test: Source) -> None:
    """Refuse data without a test image."""
    if not len(test):
        raise NoTestImages(
            f"{train.name}: no image is left for evaluation; there are {len(train)} in all. It "
            "needs 10, or 5 of a class, or a folder val beside train."
        )


def _listed(names: np.ndarray) -> str:
    more = f" and {len(names) - NAMED} more classes" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more


def few_labels(
    train: Features, test: Features, level: str, share: float, draws: int
) -> dict[str, float | None]:
    """Linear-probe accuracy with a share of the labels, the same share of every class (at least 1).

    Mean and standard deviation over draws of the labelled images. Too few to choose a penalty on:
    l2 = 1/N, scikit-learn's C = 1.
    """
    classes = int(train.labels.max()) + 1
    by_class = [np.flatnonzero(train.labels == number) for number in np.unique(train.labels)]
    reached = []
    for draw in range(draws):
        order = generator(0, "few labels", draw)
        rows = np.concatenate(
            [order.permutation(of)[: max(1, round(share * len(of)))] for of in by_class]
        )
        x, labels = train.pooled[level][rows], train.labels[rows]
        probe = next(linear_probe.solutions(x, labels, classes, [1 / len(rows)]))
        reached.append(accuracy(probe.predict(test.pooled[level]), test.labels))
    spread = float(np.std(reached, ddof=1)) if draws > 1 else None
    return {"mean": float(np.mean(reached)), "std": spread}
