"""How the time of a training step grows with tokens, width and batch, beside its GFLOP.

python benchmarks/scaling.py --out benchmarks/results/scaling.json

Times the compiled step on random images while one thing changes, in rounds so that drift meets all
sizes alike, and fits a power law by least squares in log-log. An exponent below the GFLOP's means
that larger is more efficient; above it, that something other than matmuls grows faster. Takes
4 minutes on two cores.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

import numpy as np

import hjepa_mlx as hj
from hjepa_mlx.bench.machine import describe
from hjepa_mlx.cli.common import output_json
from hjepa_mlx.costs import costs
from hjepa_mlx.timing import Rig

BASE = [
    "data.batch_size=8",
    "model.size=tiny",
    "model.depth=4",
    "model.predictor_dim=64",
    "model.predictor_depth=2",
    "masks.context_tokens=auto",
]
TOKENS = [[f"data.image_size={size}"] for size in (96, 128, 160, 192, 224)]
WIDTH = [[f"model.dim={dim}", f"model.heads={dim // 64}"] for dim in (128, 192, 256, 384, 512)]
BATCH = [[f"data.batch_size={batch}"] for batch in (2, 4, 8, 16, 32)]
SERIES = {"tokens": TOKENS, "width": WIDTH, "batch": BATCH}


def measure(configs: list[hj.Config], rounds: int) -> list[float]:
    """Seconds of a step of each config: the mean over block shapes of medians over rounds."""
    rigs = [Rig(config) for config in configs]
    for rig in rigs:
        rig.warm_up()
    seconds: list[list[list[float]]] = [[] for _ in rigs]
    for _ in range(rounds):
        for rig, times in zip(rigs, seconds, strict=True):
            times.append([rig.run(number) for number in range(len(rig.sampler.shapes))])
    return [float(np.median(times, axis=0).mean()) for times in seconds]


def power_law(x: list[float], y: list[float]) -> dict[str, float]:
    """Exponent of y ~ x^exponent by least squares in log-log, with its standard error."""
    log_x, log_y = np.log(x), np.log(y)
    exponent, shift = np.polyfit(log_x, log_y, 1)
    residuals = log_y - exponent * log_x - shift
    spread = ((log_x - log_x.mean()) ** 2).sum()
    variance = (residuals**2).sum() / max(1, len(x) - 2)
    return {"exponent": float(exponent), "standard_error": float(np.sqrt(variance / spread))}


def series(kind: str, configs: list[hj.Config], rounds: int) -> dict[str, Any]:
    """Seconds and GFLOP, per image (per step for "batch"), at each size; their exponents."""
    rows = []
    for config, seconds in zip(configs, measure(configs, rounds), strict=True):
        batch = config.data.batch_size
        size = {"tokens": config.grid**2, "width": int(config.model.dim), "batch": batch}[kind]
        gflop = costs(config, hj.HJEPA(config)).gflop
        whole = kind == "batch"
        rows.append(
            {
                kind: size,
                "seconds": seconds if whole else seconds / batch,
                "gflop": gflop * batch if whole else gflop,
                "gflops": gflop * batch / seconds,
            }
        )
    sizes = [row[kind] for row in rows]
    return {
        "per": "step" if kind == "batch" else "image",
        "rows": rows,
        "seconds": power_law(sizes, [row["seconds"] for row in rows]),
        "gflop": power_law(sizes, [row["gflop"] for row in rows]),
    }


def main() -> None:
    """Measure the three series; write or print JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--only", nargs="+", choices=list(SERIES), default=list(SERIES))
    parser.add_argument("--set", action="append", dest="overrides", metavar="KEY=VALUE")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--out", help="write the figures as JSON")
    asked = parser.parse_args()
    base = [*BASE, *(asked.overrides or [])]
    result: dict[str, Any] = {"machine": describe(), "base": base, "series": {}}
    for kind in asked.only:
        configs = [hj.load_config("imagenet100", [*base, *change]) for change in SERIES[kind]]
        found = series(kind, configs, asked.rounds)
        result["series"][kind] = found
        print(
            "{}: seconds ~ size^{:.2f} ± {:.2f}, GFLOP ~ size^{:.2f}".format(
                kind, *found["seconds"].values(), found["gflop"]["exponent"]
            ),
            file=sys.stderr,
            flush=True,
        )
    output_json(result, asked.out or "-")


if __name__ == "__main__":
    main()
