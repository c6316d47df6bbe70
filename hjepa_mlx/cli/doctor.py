"""`hjepa-mlx doctor`: machine, libraries and speed, and advice on anything that is wrong."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from shlex import quote
from typing import Annotated, Any

import mlx.core as mx
import typer
from rich.console import Console
from rich.table import Table

from hjepa_mlx import backend, world
from hjepa_mlx.cli.common import JsonFile, output_json, readable
from hjepa_mlx.errors import UsageError
from hjepa_mlx.files import free_space
from hjepa_mlx.recipes import load_config

FREE_DISK_GB = 20.0  # ImageNet-100 as downloaded, its shards and a run's checkpoints
MEMORY_GB = 15.0
SECONDS = 2.0  # of steps


@readable
def doctor(
    json_file: JsonFile = None,
    distributed: Annotated[
        str | None,
        typer.Option(metavar="RECIPE", help="Under mlx.launch: do several ranks pay for it?"),
    ] = None,
) -> None:
    """Check this machine: its libraries, its speed, and how to fix anything that is wrong.

    Examples: `hjepa-mlx doctor`, `mlx.launch -n 2 -- hjepa-mlx doctor --distributed demo`
    """
    if distributed is not None:
        return _between_ranks(distributed, json_file)
    facts = examine()
    if not output_json(facts, json_file):
        return
    table = Table(show_header=False, box=None)
    for key, value in facts.items():
        if key != "advice":
            table.add_row(key.replace("_", " "), str(value))
    Console().print(table)
    for line in facts["advice"] or ["All is well."]:
        print(line)


def _between_ranks(recipe: str, json_file: str | None) -> None:
    from hjepa_mlx.bench import machine, result

    if not world.backend():
        known = ", ".join(filter(mx.distributed.is_available, world.BACKENDS.values()))
        raise UsageError(
            f"There is only one rank. MLX can join several here by {known}. Start them with: "
            f"mlx.launch -n 2 -- hjepa-mlx doctor --distributed {quote(recipe)}"
        )
    facts = machine.scaling(load_config(recipe), SECONDS)
    if world.rank() == 0:
        stdout_is_free = output_json(facts, json_file)
        print(result.scaling(facts), file=sys.stdout if stdout_is_free else sys.stderr)


def examine() -> dict[str, Any]:
    """Facts about machine and software, plus `advice`: one line for each thing that is wrong."""
    from hjepa_mlx.bench import machine

    unused = backend.unused_gpu()
    facts: dict[str, Any] = {
        **machine.describe(),
        "matmul_gflops": round(machine.matmul_gflops()),
        "compile": backend.can_compile(),
        "free_disk_gb": round(free_space(Path.cwd()) / backend.GB, 1),
        "data_folder": os.environ.get("HJEPA_DATA", "./data"),
    }
    advice = {
        unused: unused != "",
        "MLX uses its reference BLAS, about 30 times slower than OpenBLAS. Install OpenBLAS "
        "(Debian, Ubuntu: sudo apt install libopenblas0-pthread).": facts["device"] == "CPU"
        and "Netlib" in facts["blas"],
        "Steps are not compiled without g++. Install it (Debian, Ubuntu: sudo apt install g++).": (
            not facts["compile"]
        ),
        "MLX found no Metal GPU, so training will be slow. Check that macOS is 14 or newer.": (
            sys.platform == "darwin" and facts["device"] == "CPU"
        ),
        f"This machine has {facts['memory_gb']} GB of memory, which is little for 224-pixel "
        "recipes. Lower data.batch_size, or set model.checkpoint_blocks=true.": (
            facts["memory_gb"] < MEMORY_GB
        ),
        f"This disk has {facts['free_disk_gb']} GB free; ImageNet-100 and a run need about "
        f"{FREE_DISK_GB:.0f} GB.": facts["free_disk_gb"] < FREE_DISK_GB,
    }
    return {**facts, "advice": [line for line, applies in advice.items() if applies]}
