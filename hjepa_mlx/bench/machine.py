"""This machine: its name and versions, its matmul and memory speed by dtype, its power."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx

from hjepa_mlx import backend
from hjepa_mlx.timing import DTYPES

MATMUL_SIDE = 2048
SMALL_SIDE = 256
AT_ONCE = 4  # computations in one evaluation, so that starting it does not count
STREAM = 1 << 24  # elements in each of the two arrays that a bandwidth measurement adds


def describe() -> dict[str, Any]:
    """Machine, software and power: a measurement depends on these."""
    from hjepa_mlx import __version__  # here: the package imports this module

    tree = Path(__file__).parents[2]
    git = ("git", f"--git-dir={tree / '.git'}", f"--work-tree={tree}")
    return {
        "chip": backend.chip(),
        "cores": backend.cpu_count(),
        "memory_gb": round(backend.memory_gb(), 1),
        "device": "Apple GPU (Metal)" if backend.on_metal() else "CPU",
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
        bandwidth = 3 * x.nbytes / _best(lambda x=x, y=y: x + y, 1.0) / 1e9
        found[dtype] = {"matmul_gflops": matmul_gflops(dtype), "bandwidth_gbs": bandwidth}
    return found


def matmul_gflops(dtype: str = "float32") -> float:
    """GFLOP/s of square matmuls."""
    # a CPU emulates half precision: only a small matmul is quick there
    side = MATMUL_SIDE if dtype == "float32" or backend.on_metal() else SMALL_SIDE
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


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""
