"""How fast steps and pipelines run here: measured on the real compiled step."""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from itertools import repeat
from typing import Any

import mlx.core as mx
import numpy as np

from hjepa_mlx import backend
from hjepa_mlx.config import Config
from hjepa_mlx.data.pipeline import training_batches
from hjepa_mlx.data.source import Source
from hjepa_mlx.masks import Masks, MaskSampler
from hjepa_mlx.models.hjepa import HJEPA, computing_in
from hjepa_mlx.rng import generator
from hjepa_mlx.step import Schedule, Step, as_arrays

VALUES = Schedule(lr=1e-4, weight_decay=0.04, momentum=0.996)
FEWEST = 3  # steps, however long they take
AHEAD = 3  # batches: more than the pipeline reads ahead


@dataclass(frozen=True)
class Speed:
    """Step times in seconds after every block shape had been seen, and what else was noticed."""

    batch: int
    seconds: tuple[float, ...]
    first_seconds: float  # of the first step: tracing, compiling, and the step itself
    traces_after_warmup: int
    peak_memory_gb: float

    @property
    def images_per_second(self) -> float:
        """By the median step."""
        return self.batch / float(np.median(self.seconds))

    @property
    def spread(self) -> float:
        """The 95th percentile of the step times over their median."""
        return float(np.percentile(self.seconds, 95) / np.median(self.seconds))


class Rig:
    """Model, step and masks of a config, and a batch of random images to feed them."""

    def __init__(self, config: Config) -> None:
        backend.set_memory_limits()
        self.config = config
        self.sampler = MaskSampler(config)
        self.step = Step(HJEPA(config), config)
        size, batch = config.data.image_size, config.data.batch_size
        pixels = generator(0, "bench").integers(0, 256, (batch, size, size, 3), np.uint8)
        self.images = mx.array(pixels)

    def masks(self, number: int) -> Masks:
        """Masks of one block shape after the other, so that a few steps see them all."""
        shapes = self.sampler.shapes
        rng = generator(0, "bench masks", number)
        views = self.config.data.batch_size * self.config.masks.per_image
        return self.sampler.draw(rng, shapes[number % len(shapes)], views)

    def run(self, number: int) -> float:
        """One step; its seconds."""
        masks = self.masks(number)
        start = time.perf_counter()
        mx.eval(self.step([(self.images, masks)], VALUES), self.step.state)
        return time.perf_counter() - start

    def warm_up(self) -> float:
        """A step with each block shape; the first one's seconds."""
        first, *_ = [self.run(number) for number in range(len(self.sampler.shapes))]
        return first


def time_steps(config: Config, seconds: float, most: int = sys.maxsize) -> Speed:
    """Time steps for `seconds`, but at least FEWEST and at most `most` of them."""
    _forget()
    try:
        return _timed(Rig(config), seconds, most)
    finally:
        _forget()


def _forget() -> None:
    """Let go of what earlier steps took: a step and its compiled functions hold each other."""
    gc.collect()
    mx.clear_cache()
    mx.reset_peak_memory()


def _timed(rig: Rig, seconds: float, most: int) -> Speed:
    first = rig.warm_up()
    traces, times = rig.step.traces, []
    for number in range(most):
        times.append(rig.run(number))
        if len(times) >= FEWEST and sum(times) >= seconds:
            break
    return Speed(
        batch=rig.config.data.batch_size,
        seconds=tuple(times),
        first_seconds=first,
        traces_after_warmup=rig.step.traces - traces,
        peak_memory_gb=mx.get_peak_memory() / backend.GB,
    )


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
