"""Time the compiled training step of a recipe on random images, beside a matmul.

python benchmarks/step.py demo
python benchmarks/step.py demo --set model.size=small --set data.image_size=224 \
    --set model.patch_size=16 --set data.batch_size=16 --set model.predictor_dim=192 \
    --set model.predictor_depth=6
"""

from __future__ import annotations

import argparse
import json
import time

import numpy as np

import hjepa_mlx as hj
from hjepa_mlx.bench.costs import costs
from hjepa_mlx.doctor import matmul_gflops
from hjepa_mlx.masks import MaskSampler
from hjepa_mlx.step import Step, schedule

import mlx.core as mx  # isort: skip  (after hjepa_mlx, which loads OpenBLAS)


def measure(config: hj.Config, steps: int, warmup: int) -> dict[str, float]:
    """Median step time after `warmup` steps, as images/s, share of the matmul peak, and memory."""
    hj.backend.set_memory_limits()
    model = hj.HJEPA(config)
    step, sampler = Step(model, config), MaskSampler(config)
    size, batch = config.data.image_size, config.data.batch_size
    images = mx.array(np.random.default_rng(0).integers(0, 256, (batch, size, size, 3), np.uint8))
    seconds, traces = [], 0
    for number in range(warmup + steps):
        masks = sampler(number, batch)
        start = time.perf_counter()
        metrics = step([(images, masks)], schedule(config, number, warmup + steps))
        mx.eval(metrics, step.state)
        seconds.append(time.perf_counter() - start)
        if number == warmup - 1:
            traces = step.traces
    cost = costs(config, model)
    rate = batch / float(np.median(seconds[warmup:]))
    peak = matmul_gflops()
    return {
        "images_per_second": rate,
        "gflop_per_image": cost.total,
        "matmul_gflops": peak,
        "mfu_percent": 100 * rate * cost.total / peak,
        "first_step_seconds": seconds[0],
        "p95_over_p50": float(np.percentile(seconds[warmup:], 95) / np.median(seconds[warmup:])),
        "traces_after_warmup": step.traces - traces,
        "peak_memory_gb": mx.get_peak_memory() / hj.backend.GB,
        "estimated_memory_gb": cost.memory_gb,
    }


def main() -> None:
    """Print the figures as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("config")
    parser.add_argument("--set", action="append", dest="overrides", metavar="KEY=VALUE")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--warmup", type=int, default=10)
    arguments = parser.parse_args()
    config = hj.load_config(arguments.config, arguments.overrides)
    result = measure(config, arguments.steps, arguments.warmup)
    print(json.dumps({key: round(value, 3) for key, value in result.items()}, indent=1))


if __name__ == "__main__":
    main()
