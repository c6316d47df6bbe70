"""A number becomes NaN or infinite: the run stops at that step, and its checkpoints stay sound."""

from __future__ import annotations

import math
import os
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

from torture.run import Trial, once
from torture.trials import TRAIN, assert_same, inputs, result, succeed

STEPS = 20
SETTINGS = ("--set", "optim.epochs=4", "--set", "run.log_every=1")
NOT_FINITE = (math.nan, math.inf, -math.inf)


def spoilt(array: Any, rng: random.Random, value: float) -> Any:
    """The array with one number replaced."""
    import mlx.core as mx

    flat = array.reshape(-1)
    at = rng.randrange(flat.size)
    return mx.where(mx.arange(flat.size) == at, value, flat).reshape(array.shape)


def in_an_image(step: Any, rng: random.Random, value: float, given: list) -> None:
    import mlx.core as mx

    images, masks = given[0][0]
    given[0] = [(spoilt(images.astype(mx.float32), rng, value), masks)]


def in_a_gradient(step: Any, rng: random.Random, value: float, given: list) -> None:
    plain = step.compute_gradients

    def compute(*inputs: Any) -> Any:
        metrics, gradients = plain(*inputs)
        spoil_one(gradients, rng, value)
        return metrics, gradients

    step.compute_gradients = compute


def in_a_weight(step: Any, rng: random.Random, value: float, given: list) -> None:
    spoil_one(step.weights, rng, value)
    step.place()


def in_a_moment(step: Any, rng: random.Random, value: float, given: list) -> None:
    kinds = step.optimizer.state[rng.choice([k for k in step.weights if k != "target_encoder"])]
    spoil_one(kinds[rng.choice([*kinds])], rng, value)


def spoil_one(tree: Any, rng: random.Random, value: float) -> None:
    """Of a tree of dictionaries one number of one array."""
    while True:
        key = rng.choice([*tree])
        if not isinstance(tree[key], dict):
            tree[key] = spoilt(tree[key], rng, value)
            return
        tree = tree[key]


def spoil(inject: Callable[[Any, random.Random, float, list], None]) -> Trial:
    """The trial that injects a number like this into one step."""

    def trial(rng: random.Random, folder: Path) -> str:
        import hjepa_mlx as hj

        inputs(folder)
        os.chdir(folder)
        at, value = rng.randrange(1, STEPS + 1), rng.choice(NOT_FINITE)
        minutes, plain, done = rng.choice(["1e-9", "1000"]), hj.Step.__call__, 0

        def call(step: Any, *given: Any) -> Any:
            nonlocal done
            done, given = done + 1, [*given]
            if done == at:
                inject(step, rng, value, given)
            return plain(step, *given)

        settings = [x for x in SETTINGS if x != "--set"]
        settings += ["run.dir=run", f"run.checkpoint_minutes={minutes}"]
        said = ""
        with patch.object(hj.Step, "__call__", call):
            try:
                hj.train(hj.load_config("tiny.yaml", settings))
            except hj.HJEPAError as error:
                said = str(error)
        stopped = re.match(
            r"Training stopped at step (\d+): .* checkpoint is (none yet|\S+)\. ", said
        )
        assert stopped, f"{value} at step {at}: {said or 'it was not noticed'}"
        kept = hj.Run("run").latest
        assert stopped[2] == str(kept) or (stopped[2], kept) == ("none yet", None), said
        assert at <= int(stopped[1]) <= (STEPS if minutes == "1000" else at + 1), said
        succeed(folder, *TRAIN, *SETTINGS, "--resume")

        def whole(place: Path) -> None:
            inputs(place)
            succeed(place, *TRAIN, *SETTINGS)

        last = f"run/checkpoints/step-{STEPS:08d}"
        assert_same(result(folder, last), result(once("poisoned", whole), last))
        return f"{value} at step {at}, stopped at step {stopped[1]}"

    return trial


TRIALS = {
    "in an image": spoil(in_an_image),
    "in a gradient": spoil(in_a_gradient),
    "in a weight": spoil(in_a_weight),
    "in a moment": spoil(in_a_moment),
}
