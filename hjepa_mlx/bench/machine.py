"""This machine: its name, versions and power; how fast it multiplies, reads images and trains."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial
from importlib.metadata import version
from itertools import repeat
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_reduce

from hjepa_mlx import agreement, backend, world
from hjepa_mlx.config import Config
from hjepa_mlx.data.pipeline import training_batches
from hjepa_mlx.data.source import Source
from hjepa_mlx.models.hjepa import HJEPA
from hjepa_mlx.step import as_arrays
from hjepa_mlx.timing import DTYPES, FEWEST, VALUES, Rig, settle, time_steps

MATMUL_SIDE = 2048
SMALL_SIDE = 256
AT_ONCE = 4  # computations in one evaluation, so that starting it does not count
STREAM = 1 << 24  # elements in each of the two arrays that a bandwidth measurement adds
AHEAD = 3  # batches: more than the pipeline reads ahead
REPEATS = 3  # of a step's part
DEVICES = {"metal": "Apple GPU (Metal)", "cuda": "NVIDIA GPU (CUDA)", "cpu": "CPU"}


def describe() -> dict[str, Any]:
    """Machine, software and power: a measurement depends on these."""
    from hjepa_mlx import __version__  # here: the package imports this module

    tree = Path(__file__).parents[2]
    git = ("git", f"--git-dir={tree / '.git'}", f"--work-tree={tree}")
    return {
        "chip": backend.chip(),
        "cores": backend.cpu_count(),
        "memory_gb": round(backend.memory_gb(), 1),
        "device": DEVICES[backend.device()],
        "nvidia_gpu": backend.nvidia_gpu(),
        "blas": backend.blas_name(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "mlx": version("mlx"),
        "mlx_data": version("mlx-data"),
        "hjepa_mlx": __version__,
        # with '+' if the source tree was changed; empty for an installed package
        "commit": _output(*git, "describe", "--always", "--exclude=*", "--dirty=+").strip(),
        "power": power(),
    }


def resident_mb() -> float:
    """Memory of this process that is in RAM, MB (10^6 bytes)."""
    return int(_output("ps", "-o", "rss=", "-p", str(os.getpid()))) * 1024 / 1e6


def speeds() -> dict[str, dict[str, float]]:
    """Of each dtype: matmul GFLOP/s, and GB/s that sums of two arrays read and write."""
    found = {}
    for dtype in DTYPES:
        x = mx.ones((STREAM,), getattr(mx, dtype))
        y = mx.ones_like(x)
        mx.eval(x, y)
        bandwidth = 3 * x.nbytes / _best(partial(mx.add, x, y), 1.0) / 1e9
        found[dtype] = {"matmul_gflops": matmul_gflops(dtype), "bandwidth_gbs": bandwidth}
    return found


def matmul_gflops(dtype: str = "float32") -> float:
    """GFLOP/s of square matmuls."""
    # a CPU emulates half precision: only a small matmul is quick there
    side = MATMUL_SIDE if dtype == "float32" or backend.on_gpu() else SMALL_SIDE
    a = mx.random.normal((side, side)).astype(getattr(mx, dtype))
    mx.eval(a)
    return 2 * side**3 / _best(lambda: a @ a, 3.0) / 1e9


def _best(function: Callable[[], mx.array], longest: float) -> float:
    return min(times(lambda: [function() for _ in range(AT_ONCE)], 6, longest)) / AT_ONCE


def times(function: Callable[[], Any], tries: int, longest: float = float("inf")) -> list[float]:
    """Seconds of each try to compute the arrays that `function` returns; no more after `longest`.

    The first try is slower than the others.
    """
    taken: list[float] = []
    while len(taken) < tries and sum(taken) < longest:
        start = time.perf_counter()
        mx.eval(function())
        taken.append(time.perf_counter() - start)
    return taken


def power() -> str:
    """Power settings that may slow the machine down, in words; empty if none are known."""
    if sys.platform == "darwin":
        on_battery = "Battery Power" in _output("pmset", "-g", "batt")
        saving = bool(re.search(r"(lowpowermode|powermode)\s+1\b", _output("pmset", "-g")))
    else:
        supplies = Path("/sys/class/power_supply").glob("BAT*/status")
        on_battery = any(path.read_text().strip() == "Discharging" for path in supplies)
        saving = False
    return ", ".join(["on battery"] * on_battery + ["low-power mode is on"] * saving)


def time_parts(config: Config) -> dict[str, float]:
    """Seconds of a step's parts, each timed alone: medians.

    `backward` is the time that gradients take beyond the forward passes, and what the image level
    adds. The sum exceeds a whole step's time, because a step overlaps its parts.
    """
    rig = Rig(config)
    step, model, masks = rig.step, rig.step.model, as_arrays(rig.masks(0))
    context, targets, centres, pool, *drawn = masks
    cells = [targets.shape[1] * len(matrix) for matrix in pool]
    patches = model.patches(rig.images).astype(step.dtype)
    seen = model.context_encoder(patches, context)[0].astype(step.dtype)
    views = model.views(rig.images, drawn).astype(step.dtype) if drawn else None
    _, gradients = step.compute_gradients(rig.images, *masks)
    values = [mx.array(value, mx.float32) for value in VALUES]
    mx.eval(patches, seen, views, masks, gradients)

    def seconds(function: Callable[[], Any]) -> float:
        compiled = step.compile(function)
        taken = times(lambda: (compiled(), step.state), 1 + REPEATS)
        return float(np.median(taken[1:]))

    step.place(step.dtype)
    mx.eval(model.parameters())
    parts = {"target": seconds(lambda: model.targets(patches, targets, pool))}
    if views is not None:
        parts["views"] = seconds(lambda: model.context_encoder(model.views(rig.images, drawn)))
    if pool:
        grid = config.grid
        parts["context"] = seconds(lambda: model.context_encoder(patches, context))
        parts["predictor"] = seconds(lambda: model.predictor(seen, context, centres, cells, grid))
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


def scaling(config: Config, seconds: float) -> dict[str, Any]:
    """Seconds of a step by rank 0 alone and by all ranks together, and of averaging gradients."""
    config = config.model_copy(deep=True)
    settle(config, 0)
    alone = 0.0
    if world.rank() == 0:
        with world.alone():
            alone = float(np.median(time_steps(config, seconds).seconds))
    alone = agreement.values(alone)[0]
    own = config.with_batch(config.data.batch_size // world.size())
    together = time_steps(own, float("inf"), max(FEWEST, round(seconds / alone)))
    gradients = HJEPA(own).trainable_parameters()
    averaging = min(times(lambda: world.average(gradients), 1 + REPEATS))
    size = tree_reduce(lambda total, w: total + w.nbytes, gradients, 0)
    return {
        "recipe": config.name,
        "batch": config.data.batch_size,
        "backend": world.backend(),
        "hosts": agreement.values(platform.node()),
        "averaged_mb": size / 1e6,
        "averaging_seconds": averaging,
        "averaged_gbs": size / averaging / 1e9,
        "step_seconds_alone": alone,
        "step_seconds": float(np.median(together.seconds)),
    }


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


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""
