"""`hjepa-mlx doctor`: what this machine is, how fast its matmul, and what to put right."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from hjepa_mlx import backend
from hjepa_mlx.bench import machine
from hjepa_mlx.files import free_space

FREE_DISK_GB = 20.0  # ImageNet-100 as downloaded, its shards and a run's checkpoints
MEMORY_GB = 15.0


def examine() -> dict[str, Any]:
    """Facts about machine and software, plus `advice`: one line for each thing that is wrong."""
    facts: dict[str, Any] = {
        **machine.describe(),
        "matmul_gflops": round(machine.matmul_gflops()),
        "compile": backend.can_compile(),
        "free_disk_gb": round(free_space(Path.cwd()) / backend.GB, 1),
        "data_folder": os.environ.get("HJEPA_DATA", "./data"),
    }
    return {**facts, "advice": _advice(facts)}


def _advice(facts: dict[str, Any]) -> list[str]:
    advice = []
    if sys.platform == "linux" and "Netlib" in facts["blas"]:
        advice.append(
            "MLX uses its reference BLAS, about 30 times slower than OpenBLAS. Install it "
            "(Debian, Ubuntu: sudo apt install libopenblas0-pthread)."
        )
    if not facts["compile"]:
        advice.append("Without g++ steps are not compiled. Install it (sudo apt install g++).")
    if sys.platform == "darwin" and facts["device"] == "CPU":
        advice.append("MLX found no Metal GPU: training will be slow. Check macOS (14 or newer).")
    if facts["memory_gb"] < MEMORY_GB:
        advice.append(
            f"{facts['memory_gb']} GB of memory is little for 224-pixel recipes: lower "
            "data.batch_size, or set model.checkpoint_blocks=true."
        )
    if facts["free_disk_gb"] < FREE_DISK_GB:
        advice.append(
            f"Only {facts['free_disk_gb']} GB of disk are free here; ImageNet-100 and a run need "
            f"about {FREE_DISK_GB:.0f} GB."
        )
    return advice
