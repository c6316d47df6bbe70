"""How fast a step's parts, the pipeline, and both together run here."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import closing
from itertools import repeat
from typing import Any

import mlx.core as mx
import numpy as np

from hjepa_mlx import backend
from hjepa_mlx.config import Config
from hjepa_mlx.data.pipeline import training_batches
from hjepa_mlx.data.source import Source
from hjepa_mlx.models.hjepa import HJEPA, computing_in
from hjepa_mlx.step import as_arrays
from hjepa_mlx.timing import VALUES, Rig

AHEAD = 3  # batches: more than the pipeline reads ahead


def time_parts(config: Config, repeats: int = 3) -> dict[str, float]:
    """Seconds of a step's parts, each timed alone: medians.

    `backward` is what gradients take beyond the three forward passes. Their sum is more than the
    whole step, which overlaps them.
    """
    rig = Rig(config)
    step, masks = rig.step, as_arrays(rig.masks(0))
    model, state = step.model, step.state
    context, targets, centres, pool = masks
    cells = [targets.shape[1] * len(matrix) for matrix in pool]
    patches = model.patches(rig.images).astype(step.dtype)
    looked, grid = model.context_encoder(patches, context)[0], config.grid
    mx.eval(patches, looked, masks)
    values = [mx.array(value, mx.float32) for value in VALUES]

    def timed(function: Callable, changes: bool = False) -> float:
        def forward() -> Any:
            with computing_in(model, step.dtype):
                return function()

        compiled = step.compile(function) if changes else _compiled(forward, model, config)
        taken = []
        for _ in range(1 + repeats):
            start = time.perf_counter()
            mx.eval(compiled(), state)
            taken.append(time.perf_counter() - start)
        return float(np.median(taken[1:]))

    parts = {
        "target": timed(lambda: model.targets(patches, targets, pool)),
        "context": timed(lambda: model.context_encoder(patches, context)),
        "predictor": timed(lambda: model.predictor(looked, context, centres, cells, grid)),
    }
    whole = timed(lambda: step.compute_gradients(rig.images, *masks), changes=True)
    parts["backward"] = max(0.0, whole - sum(parts.values()))
    _, gradients = step.compute_gradients(rig.images, *masks)
    mx.eval(gradients)
    parts["update"] = timed(lambda: step.apply_gradients(gradients, *values), changes=True)
    return parts


def _compiled(function: Callable, model: HJEPA, config: Config) -> Callable:
    return mx.compile(function, inputs=[model.state]) if backend.compiles(config) else function


def time_pipeline(source: Source, config: Config, seconds: float) -> float:
    """Images per second of the data pipeline alone, after two batches."""
    with closing(training_batches(source, config)) as batches:
        next(batches), next(batches)
        start, images = time.perf_counter(), 0
        while time.perf_counter() - start < seconds:
            images += len(next(batches).images)
        return images / (time.perf_counter() - start)


def time_end_to_end(source: Source, config: Config, seconds: float) -> tuple[float, float]:
    """Images per second of pipeline and step together; and as a share of the step alone.

    Both take turns with the same block shapes, a second or two steps each, since a machine's speed
    drifts. What was read ahead while the step ran alone is thrown away first.
    """
    rig = Rig(config)
    rig.warm_up()
    turn = max(2, round(1 / rig.run(0)))
    alone: list[float] = []
    together: list[float] = []
    same = repeat(np.array(rig.images))
    with closing(training_batches(source, config)) as batches:
        fresh = (batch.images for batch in batches)
        while len(alone) < 2 or sum(alone + together) < seconds:
            numbers = range(len(alone) * turn, (len(alone) + 1) * turn)
            alone.append(_seconds(rig, same, numbers))
            for _ in range(AHEAD):
                next(fresh)
            _seconds(rig, fresh, range(1))
            together.append(_seconds(rig, fresh, numbers))
    images = turn * config.data.batch_size * len(together)
    return images / sum(together), sum(alone) / sum(together)


def _seconds(rig: Rig, images: Iterator[np.ndarray], numbers: range) -> float:
    """Seconds of a step on the next images for each number; one is in flight, as in training."""
    previous: dict[str, mx.array] = {}
    start = time.perf_counter()
    for number in numbers:
        metrics = rig.step([(mx.array(next(images)), rig.masks(number))], VALUES)
        mx.eval(previous)
        previous = metrics
    mx.eval(previous, rig.step.state)
    return time.perf_counter() - start
