"""The speed of a step's parts, of the data pipeline, and of both together on this machine."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import closing
from itertools import repeat
from typing import Any

import mlx.core as mx
import numpy as np

from hjepa_mlx.bench.machine import times
from hjepa_mlx.config import Config
from hjepa_mlx.data.pipeline import training_batches
from hjepa_mlx.data.source import Source
from hjepa_mlx.models.hjepa import computing_in
from hjepa_mlx.step import as_arrays
from hjepa_mlx.timing import VALUES, Rig

AHEAD = 3  # batches: more than the pipeline reads ahead
REPEATS = 3


def time_parts(config: Config) -> dict[str, float]:
    """Seconds of a step's parts, each timed alone: medians.

    `backward` is the time that gradients take beyond the three forward passes. The sum exceeds a
    whole step's time, because a step overlaps its parts.
    """
    rig = Rig(config)
    step, model, masks = rig.step, rig.step.model, as_arrays(rig.masks(0))
    context, targets, centres, pool = masks
    cells = [targets.shape[1] * len(matrix) for matrix in pool]
    patches = model.patches(rig.images).astype(step.dtype)
    seen = model.context_encoder(patches, context)[0]
    _, gradients = step.compute_gradients(rig.images, *masks)
    values = [mx.array(value, mx.float32) for value in VALUES]
    mx.eval(patches, seen, masks, gradients)

    def seconds(function: Callable[[], Any]) -> float:
        compiled = step.compile(function)
        taken = times(lambda: (compiled(), step.state), 1 + REPEATS)
        return float(np.median(taken[1:]))

    with computing_in(model, step.dtype):
        parts = {
            "target": seconds(lambda: model.targets(patches, targets, pool)),
            "context": seconds(lambda: model.context_encoder(patches, context)),
            "predictor": seconds(
                lambda: model.predictor(seen, context, centres, cells, config.grid)
            ),
        }
    whole = seconds(lambda: step.compute_gradients(rig.images, *masks))
    parts["backward"] = max(0.0, whole - sum(parts.values()))
    parts["update"] = seconds(lambda: step.apply_gradients(gradients, *values))
    return parts


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

    Both take turns of a second (two steps at least) with the same block shapes, since a machine's
    speed drifts. Batches read ahead while the step ran alone are thrown away first.
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
