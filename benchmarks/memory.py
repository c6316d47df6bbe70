"""Memory of a training step against batch and model, with and without checkpointed blocks.

python benchmarks/memory.py --out benchmarks/results/memory.json
python benchmarks/memory.py --steps 500

With --steps: does memory grow while `demo` trains? Without:
peak memory of recipe imagenet100 (224 pixels) on random images, each case in a process of its own,
beside the estimate of `--dry-run`; straight lines through both, and which batch they promise a Mac.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import subprocess
import sys
from typing import Any

import numpy as np

import hjepa_mlx as hj
from hjepa_mlx.bench.machine import describe, resident_mb
from hjepa_mlx.cli.common import output_json
from hjepa_mlx.costs import costs
from hjepa_mlx.timing import Rig, time_steps

import mlx.core as mx  # isort: skip  (after hjepa_mlx, which loads OpenBLAS)

RECIPE = "imagenet100"
MODELS, BATCHES = ("tiny", "small"), (8, 16, 32, 64)
TIMED_BATCH, TIMED_STEPS = 16, 12
# What macOS recommends for the GPU, in GiB: two thirds of 32, three quarters of 64
# (llama.cpp's logs print it: 21845 and 49152 MiB; github.com/ggml-org/llama.cpp/pull/2011)
RECOMMENDED = {32: 64 / 3, 64: 48.0}
GIB = 2**30 / hj.backend.GB  # GB

Row = dict[str, Any]


def measure(config: hj.Config, steps: int = 1) -> Row:
    """Peak memory, GB, over a step with each block shape and `steps` or more timed ones."""
    speed = time_steps(config, seconds=math.inf, most=max(steps, 1))
    return {
        "batch": config.data.batch_size,
        "peak_gb": speed.peak_memory_gb,
        "estimated_gb": costs(config, hj.HJEPA(config)).memory_gb,
        "seconds_per_step": float(np.median(speed.seconds)),
    }


def line(rows: list[Row], key: str) -> dict[str, float]:
    """Least squares: `key` is fixed + per_image · batch. The largest deviation, in percent, too."""
    batches, values = ([row[k] for row in rows] for k in ("batch", key))
    per_image, fixed = np.polyfit(batches, values, 1)
    off = np.abs(np.polyval([per_image, fixed], batches) / values - 1).max()
    return {
        "fixed_gb": float(fixed),
        "per_image_gb": float(per_image),
        "largest_deviation_percent": 100 * float(off),
    }


def largest_batch(fit: dict[str, float], memory_gb: float) -> int:
    """The largest multiple of 8 whose peak, on the fitted line, is at most `memory_gb`."""
    return max(0, int((memory_gb - fit["fixed_gb"]) / fit["per_image_gb"] / 8) * 8)


def projected(fit: dict[str, float]) -> dict[str, int]:
    """Batches that Macs would hold: a projection, not measured on any."""
    return {f"{gb} GB": largest_batch(fit, gpu * GIB) for gb, gpu in RECOMMENDED.items()}


def series(size: str, checkpoint: bool, batches: list[int]) -> Row:
    """One model's rows, lines and projected batches."""
    rows = []
    for batch in batches:
        command = [sys.executable, __file__, "--one", size, "--batches", str(batch)]
        command += ["--checkpoint"] if checkpoint else []
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE)
        rows.append(json.loads(done.stdout))
        print(
            "{}{}, batch {batch}: {peak_gb:.2f} GB, estimated {estimated_gb:.2f}".format(
                size, ", checkpointed" * checkpoint, **rows[-1]
            ),
            file=sys.stderr,
            flush=True,
        )
    found: Row = {"model": size, "checkpoint_blocks": checkpoint, "rows": rows}
    if len(rows) > 1:
        fits = {key: line(rows, key) for key in ("peak_gb", "estimated_gb")}
        found |= {"lines": fits, "projected_batches": projected(fits["peak_gb"])}
    return found


def time_ratios(found: list[Row]) -> Row:
    """How much longer a step takes with checkpointing, by model, at TIMED_BATCH."""
    seconds = {
        (one["model"], one["checkpoint_blocks"]): row["seconds_per_step"]
        for one in found
        for row in one["rows"]
        if row["batch"] == TIMED_BATCH
    }
    models = {model for model, _ in seconds}
    return {model: seconds[model, True] / seconds[model, False] for model in sorted(models)}


def grow(config: hj.Config, steps: int, every: int = 50) -> Row:
    """Resident and MLX's active memory, MB, each `every` steps on new random images; growth.

    Growth, in percent, is from the second report to the last.
    """
    gc.collect()  # what earlier steps left behind must not be freed while this is measured
    rig = Rig(config)
    rng, rows, warm = np.random.default_rng(0), [], 0
    for number in range(steps):
        rig.images = mx.array(rng.integers(0, 256, rig.images.shape, np.uint8))
        rig.run(number)
        if number == len(rig.sampler.shapes) - 1:
            warm = rig.step.traces
        if (number + 1) % every == 0:
            active = mx.get_active_memory() / 1e6
            rows.append({"step": number + 1, "resident_mb": resident_mb(), "active_mb": active})
    first, last = rows[min(1, len(rows) - 1)], rows[-1]
    return {
        "rows": rows,
        "resident_growth_percent": 100 * (last["resident_mb"] / first["resident_mb"] - 1),
        "active_growth_percent": 100 * (last["active_mb"] / first["active_mb"] - 1),
        "traces_after_warmup": rig.step.traces - warm,
    }


def _config(size: str, batch: int, checkpoint: bool) -> hj.Config:
    changed = [f"model.size={size}", f"data.batch_size={batch}"]
    return hj.load_config(RECIPE, [*changed, f"model.checkpoint_blocks={checkpoint}".lower()])


def main() -> None:
    """Measure every case; write or print JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    parser.add_argument("--batches", nargs="+", type=int, default=list(BATCHES))
    parser.add_argument("--steps", type=int, help="train `demo` so long and watch memory instead")
    parser.add_argument("--out", help="write the figures as JSON")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--checkpoint", action="store_true", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.one:
        (batch,) = asked.batches
        timed = TIMED_STEPS if batch == TIMED_BATCH else 1
        print(json.dumps(measure(_config(asked.one, batch, asked.checkpoint), timed)))
        return
    result: Row = {"machine": describe()}
    if asked.steps:
        result |= grow(hj.load_config("demo"), asked.steps)
    else:
        found = [series(m, on, asked.batches) for m in asked.models for on in (False, True)]
        result |= {"series": found, "checkpointed_time_ratio": time_ratios(found)}
    output_json(result, asked.out or "-")


if __name__ == "__main__":
    main()
