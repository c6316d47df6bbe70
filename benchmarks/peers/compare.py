"""This project's training step beside a plain PyTorch one, on the same cores and batch.

.venv-parity/bin/python benchmarks/peers/compare.py

After `make parity`; keeps results/peers.json. Each contender runs in a process of its own, one
after the other, in several rounds, on random images without a data pipeline; medians. The peer is
`ijepa_torch.py`. A recipe that trains at several image sizes is timed at each; its speed is the
run's: 1 / Σ (share of the epochs / speed).
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
RESULTS = HERE.parent / "results" / "peers.json"
TORCH = {"torch 6x192": 192, "torch 6x384": 384}  # the predictor's depth and width
RECIPES = ("imagenet100", "imagenet100_fast")
RATIOS = (
    ("imagenet100", "torch 6x192"),
    ("imagenet100", "torch 6x384"),
    ("imagenet100_fast", "torch 6x192"),
)
SETTINGS = ("rounds", "batch", "mask_batch", "steps")

Figures = dict[str, float]
Commands = list[tuple[float, list[str]]]  # share of the epochs, and what measures its speed


def measure(recipe: str, size: int, batch: int, steps: int) -> Figures:
    """The step of `recipe` at one image size, after a step with every block shape."""
    import hjepa_mlx as hj
    from hjepa_mlx.bench.machine import matmul_gflops
    from hjepa_mlx.costs import costs
    from hjepa_mlx.timing import time_steps

    config = hj.load_config(recipe, [f"data.batch_size={batch}"]).at_size(size)
    speed = time_steps(config, seconds=math.inf, most=steps)
    gflop, peak = costs(config, hj.HJEPA(config)).gflop, matmul_gflops()
    return {
        "images_per_second": speed.images_per_second,
        "gflop_per_image": gflop,
        "matmul_gflops": peak,
        "mfu_percent": 100 * speed.images_per_second * gflop / peak,
        "traces_after_warmup": speed.traces_after_warmup,
    }


def contenders(batch: int, steps: int, mask_batch: int, number: int) -> dict[str, Commands]:
    """What measures each contender in round `number`: a command for each image size it trains at.

    The peer's masks, whose sizes vary, are others in each round.
    """
    import hjepa_mlx as hj

    same = ["--batch", str(batch), "--steps", str(steps)]
    torch_step, ours = str(HERE / "time_torch.py"), str(HERE / "compare.py")
    found: dict[str, Commands] = {}
    for name, width in TORCH.items():
        own = ["--predictor-dim", str(width), "--mask-batch", str(mask_batch)]
        own += ["--seed", str(number)]
        found[name] = [(1.0, [torch_step, *own, *same])]
    for recipe in RECIPES:
        found[recipe] = [
            (share, [ours, "--one", recipe, "--size", str(size), *same])
            for size, share in hj.load_config(recipe).stages
        ]
    return found


def run(commands: Commands) -> Figures:
    """Figures of one contender over its whole training, each part in a process of its own."""
    environment = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE"}
    shares, parts = [], []
    for share, command in commands:
        done = subprocess.run(
            [sys.executable, *command], check=True, stdout=subprocess.PIPE, env=environment
        )
        shares.append(share)
        parts.append(json.loads(done.stdout))
    return over_the_run(shares, parts)


def over_the_run(shares: list[float], parts: list[Figures]) -> Figures:
    """Speed, work and share of the matmul's speed over epochs of which `shares` are each part's."""
    rates = [part["images_per_second"] for part in parts]
    gflop = sum(s * part["gflop_per_image"] for s, part in zip(shares, parts, strict=True))
    rate = 1 / sum(s / r for s, r in zip(shares, rates, strict=True))
    peak = max(part["matmul_gflops"] for part in parts)
    return {
        "images_per_second": rate,
        "gflop_per_image": gflop,
        "matmul_gflops": peak,
        "mfu_percent": 100 * rate * gflop / peak,
        **{f"images_per_second_part_{n}": r for n, r in enumerate(rates) if len(rates) > 1},
        "traces_after_warmup": sum(part.get("traces_after_warmup", 0) for part in parts),
    }


def summary(rounds: dict[str, list[Figures]]) -> dict[str, dict]:
    """Median, least and most of every figure; ratios of median speeds, and their range a round."""
    speeds = {name: [f["images_per_second"] for f in found] for name, found in rounds.items()}
    ratios = {}
    for ours, theirs in RATIOS:
        each = [a / b for a, b in zip(speeds[ours], speeds[theirs], strict=True)]
        ratio = float(np.median(speeds[ours]) / np.median(speeds[theirs]))
        ratios[f"{ours} / {theirs}"] = {"of_medians": ratio, "least": min(each), "most": max(each)}
    return {
        "contenders": {
            name: {key: _spread([figures[key] for figures in found]) for key in found[0]}
            for name, found in rounds.items()
        },
        "ratios": ratios,
    }


def _spread(values: list[float]) -> Figures:
    return {"median": float(np.median(values)), "least": min(values), "most": max(values)}


def main() -> None:
    """Measure all contenders in rounds, print the ratios, keep the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--mask-batch", type=int, default=0, help="see time_torch.py")
    parser.add_argument("--steps", type=int, default=12, help="timed in each process")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--size", type=int, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.one:
        print(json.dumps(measure(asked.one, asked.size, asked.batch, asked.steps)))
        return
    from hjepa_mlx.bench.machine import describe
    from hjepa_mlx.files import write_json

    found: dict[str, list[Figures]] = {}
    for number in range(asked.rounds):
        commands = contenders(asked.batch, asked.steps, asked.mask_batch, number)
        for name, of_this in commands.items():
            figures = run(of_this)
            found.setdefault(name, []).append(figures)
            print(
                "round {}: {}: {images_per_second:.2f} images/s, {gflop_per_image:.1f} GFLOP each, "
                "{mfu_percent:.0f} % of the matmul's speed".format(number + 1, name, **figures),
                file=sys.stderr,
                flush=True,
            )
    versions = {name: importlib.metadata.version(name) for name in ("torch", "timm")}
    result = {
        "machine": {**describe(), **versions},
        "settings": {name: getattr(asked, name) for name in SETTINGS},
        **summary(found),
    }
    print(json.dumps(result["ratios"], indent=1))
    asked.out.parent.mkdir(exist_ok=True)
    write_json(asked.out, result)


if __name__ == "__main__":
    main()
