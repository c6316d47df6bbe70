"""How fast a config's steps run here, and `auto` settled by that: precision and compilation."""

from __future__ import annotations

import gc
import sys
import time
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from hjepa_mlx import agreement, backend, world
from hjepa_mlx.config import Config
from hjepa_mlx.masks import Masks, MaskSampler
from hjepa_mlx.models.hjepa import HJEPA
from hjepa_mlx.rng import generator
from hjepa_mlx.step import Schedule, Step

DTYPES = ("float32", "float16", "bfloat16")
VALUES = Schedule(lr=1e-4, weight_decay=0.04, momentum=0.996)
FEWEST = 3  # steps, however long they take
CLEARLY = 1.1  # times as fast: a smaller difference is noise, and a run should not depend on it
TRIAL_SECONDS = 0.5  # of steps for each choice, after those that compile
TRIAL_BATCH = 32  # at most: a trial takes seconds, and no memory that training would not
# A shorter run is not worth a trial of compiling: CUDA's first one took 100 s on an H100
LONG_RUN = 600  # seconds


@dataclass(frozen=True)
class Speed:
    """Step times in seconds, after a step with every block shape."""

    batch: int
    seconds: tuple[float, ...]
    warm_up: tuple[float, ...]  # of a step with each block shape: tracing, compiling, the step
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

    def warm_up(self) -> tuple[float, ...]:
        """A step with each block shape; their seconds."""
        return tuple(self.run(number) for number in range(len(self.sampler.shapes)))


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
    warm_up = rig.warm_up()
    traces = rig.step.traces
    times: list[float] = []
    while len(times) < most and (len(times) < FEWEST or sum(times) < seconds):
        times.append(rig.run(len(times)))
    return Speed(
        batch=rig.config.data.batch_size,
        seconds=tuple(times),
        warm_up=warm_up,
        traces_after_warmup=rig.step.traces - traces,
        peak_memory_gb=mx.get_peak_memory() / backend.GB,
    )


def settle(config: Config, steps: int) -> list[str]:
    """Replace `auto` in `precision` and `compile`; returns each choice and its reason, in words.

    steps: of the whole run. On a GPU trial steps decide: anything but float32 has to be clearly
    faster, and compiling has to save more of the run than it took in the trial. Rank 0 tries and
    decides for all.
    """
    found: list[str] = []
    if world.rank() == 0:
        with world.alone():
            if config.precision == "auto":
                config.precision, why = _precision(config)
                found.append(f"precision: {config.precision} ({why}).")
            if config.compile == "auto":
                config.compile, why = _compile(config, steps)
                found.append(f"compile: {str(config.compile).lower()} ({why}).")
    config.precision, config.compile = agreement.values([config.precision, config.compile])[0]
    return found


def _precision(config: Config) -> tuple[Any, str]:
    if not backend.on_gpu():
        return "float32", "on a CPU, lower precision is slower"
    trials = {dtype: _trial(config, precision=dtype, compile=False) for dtype in DTYPES}
    rates = {dtype: trial.images_per_second for dtype, trial in trials.items()}
    fastest = max(rates, key=rates.__getitem__)
    words = ", ".join(f"{dtype} {rate:.0f}" for dtype, rate in rates.items()) + " images/s"
    return (fastest if rates[fastest] > CLEARLY * rates["float32"] else "float32"), words


def _compile(config: Config, steps: int) -> tuple[bool, str]:
    if not backend.on_gpu():
        return backend.can_compile(), "on a CPU, compiling pays wherever there is g++"
    eager = _trial(config, compile=False)
    images = steps * config.optim.accumulate * eager.batch  # those of larger batches take longer
    rate, whole = eager.images_per_second, images / eager.images_per_second
    if whole < LONG_RUN:
        return False, f"{rate:.0f} images/s; not tried, as the run takes only {whole / 60:.1f} min"
    compiled = _trial(config, compile=True)
    cost = sum(compiled.warm_up) - sum(eager.warm_up)
    saved = whole - images / compiled.images_per_second
    words = (
        f"{compiled.images_per_second:.0f} images/s compiled, {rate:.0f} not: it took "
        f"{cost / 60:.1f} min and saves {saved / 60:.1f} of {whole / 60:.1f} min"
    )
    return saved > cost, words


def _trial(config: Config, **choice: str | bool) -> Speed:
    small = config.model_copy(update=choice, deep=True)
    small.data.batch_size = min(TRIAL_BATCH, config.data.batch_size)
    return time_steps(small, TRIAL_SECONDS)
