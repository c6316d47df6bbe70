"""Time the compiled training step of a recipe on random images: its parts, and variants of it.

python benchmarks/step.py demo
python benchmarks/step.py imagenet100 --set data.batch_size=16 --seconds 60
"""

from __future__ import annotations

import argparse
import json

import hjepa_mlx as hj
from hjepa_mlx.bench.machine import matmul_gflops
from hjepa_mlx.bench.throughput import time_parts
from hjepa_mlx.costs import costs
from hjepa_mlx.timing import time_steps

VARIANTS: dict[str, list[str]] = {
    "as the recipe says": [],
    "not compiled": ["compile=false"],
    "blocks recomputed in the backward pass": ["model.checkpoint_blocks=true"],
    "two masks for one target pass": ["masks.per_image=2"],
    "one level": ["model.levels=1"],
    "predictor told the tokens only": ["model.predictor_context=tokens"],
}


def measure(config: hj.Config, seconds: float) -> dict[str, float]:
    """Median step time as images/s and share of the matmul peak; memory beside its estimate."""
    speed = time_steps(config, seconds)
    cost, peak = costs(config, hj.HJEPA(config)), matmul_gflops()
    return {
        "images_per_second": speed.images_per_second,
        "gflop_per_image": cost.gflop,
        "matmul_gflops": peak,
        "mfu_percent": 100 * speed.images_per_second * cost.gflop / peak,
        "first_step_seconds": speed.first_seconds,
        "steps": len(speed.seconds),
        "p95_over_p50": speed.spread,
        "traces_after_warmup": speed.traces_after_warmup,
        "peak_memory_gb": speed.peak_memory_gb,
        "estimated_memory_gb": cost.memory_gb,
    }


def main() -> None:
    """Print the figures as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("config")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--seconds", type=float, default=10.0, help="of steps, each variant")
    parser.add_argument("--variants", action="store_true", help="also: " + ", ".join(VARIANTS))
    arguments = parser.parse_args()
    result = {}
    for name, settings in VARIANTS.items() if arguments.variants else [("step", [])]:
        config = hj.load_config(arguments.config, [*arguments.set, *settings])
        result[name] = {k: round(v, 3) for k, v in measure(config, arguments.seconds).items()}
    parts = time_parts(hj.load_config(arguments.config, arguments.set))
    result["parts, seconds"] = {name: round(seconds, 4) for name, seconds in parts.items()}
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
