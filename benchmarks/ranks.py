"""Do two ranks of one thread on this machine make more images/s than one process of two threads?

python benchmarks/ranks.py demo --batch 64

In turn, some rounds of steps on random images; the ranks are started without `mlx.launch`, which
keeps a core or two busy by itself.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import socket
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import hjepa_mlx as hj
from hjepa_mlx import world
from hjepa_mlx.timing import time_steps


def measured(recipe: str, batch: int, ranks: int, steps: int) -> float:
    """images/s of all ranks together, with as many threads in all as there are ranks or cores."""
    threads = 1 if ranks > 1 else 2
    command = [sys.executable, __file__, recipe, "--batch", str(batch), "--steps", str(steps)]
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | {"OPENBLAS_NUM_THREADS": str(threads), "HJEPA_MEASURED": "1"}
        if ranks > 1:
            sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(ranks)]
            hosts = [[f"127.0.0.1:{one.getsockname()[1]}"] for one in sockets]
            for one in sockets:
                one.close()
            (Path(folder) / "hosts.json").write_text(json.dumps(hosts))
            environment["MLX_HOSTFILE"] = f"{folder}/hosts.json"
        processes = [
            subprocess.Popen(
                command, env=environment | {"MLX_RANK": str(rank)}, stdout=subprocess.PIPE
            )
            for rank in range(ranks)
        ]
        said = [process.communicate()[0] for process in processes]
    return sum(map(float, said))


def measure(recipe: str, batch: int, steps: int) -> float:
    """images/s of this rank's share of the batch."""
    config = hj.load_config(recipe, ["precision=float32", f"data.batch_size={batch}"])
    config.compile = hj.backend.can_compile()
    return time_steps(config.with_batch(batch // world.size()), math.inf, steps).images_per_second


def main() -> None:
    """Measure both in turn, and print each figure and the ratio."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("recipe")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=60, help="of each measurement")
    asked = parser.parse_args()
    if "HJEPA_MEASURED" in os.environ:
        print(measure(asked.recipe, asked.batch, asked.steps))
        return
    rates: dict[int, list[float]] = {1: [], 2: []}
    for _ in range(asked.rounds):
        for ranks, found in rates.items():
            found.append(measured(asked.recipe, asked.batch, ranks, asked.steps))
            print(f"{ranks} rank(s): {found[-1]:.1f} images/s", flush=True)
    ratio = statistics.median(two / one for one, two in zip(rates[1], rates[2], strict=True))
    print(f"{asked.recipe}, batch {asked.batch}: two ranks make {ratio:.2f} times the images/s.")


if __name__ == "__main__":
    main()
