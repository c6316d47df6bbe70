"""This machine: its name and versions, its matmul and memory speed by dtype, its power."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable
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

    return {
        "chip": backend.chip(),
        "cores": backend.cpu_count(),
        "memory_gb": round(backend.memory_gb(), 1),
        "device": "Apple GPU (Metal)" if backend.on_metal() else "CPU",
        "blas": backend.blas_name(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "mlx": importlib.metadata.version("mlx"),
        "mlx_data": importlib.metadata.version("mlx-data"),
        "hjepa_mlx": __version__,
        "commit": _commit(),
        "power": power(),
    }


def resident_mb() -> float:
    """Memory of this process that is in RAM, MB (10^6 bytes)."""
    return int(_output("ps", "-o", "rss=", "-p", str(os.getpid()))) * 1024 / 1e6


def speeds() -> dict[str, dict[str, float]]:
    """Matmul GFLOP/s and bandwidth GB/s of each dtype."""
    return {
        dtype: {"matmul_gflops": matmul_gflops(dtype), "bandwidth_gbs": bandwidth_gbs(dtype)}
        for dtype in DTYPES
    }


def matmul_gflops(dtype: str = "float32") -> float:
    """GFLOP/s of square matmuls: the best of five tries, or of three seconds."""
    # a CPU emulates half precision: only a small matmul is quick there
    side = MATMUL_SIDE if dtype == "float32" or backend.on_metal() else SMALL_SIDE
    a = mx.random.normal((side, side)).astype(getattr(mx, dtype))
    mx.eval(a, a[: side // 8] @ a)  # warm up
    return 2 * side**3 / _best(lambda: a @ a, 3.0) / 1e9


def bandwidth_gbs(dtype: str = "float32") -> float:
    """GB/s read and written by sums of two arrays: the best of five tries, or of a second."""
    x = mx.ones((STREAM,), getattr(mx, dtype))
    y = mx.ones_like(x)
    mx.eval(x, y, x + y)
    return 3 * x.nbytes / _best(lambda: x + y, 1.0) / 1e9


def power() -> str:
    """Power settings that may slow the machine down, in words; empty if none are known."""
    if sys.platform == "darwin":
        return _power_in_words(_output("pmset", "-g", "batt"), _output("pmset", "-g"))
    supplies = Path("/sys/class/power_supply").glob("BAT*/status")
    discharging = any(path.read_text().strip() == "Discharging" for path in supplies)
    return "on battery" if discharging else ""


def _power_in_words(battery: str, settings: str) -> str:
    """The same, from the output of `pmset -g batt` and `pmset -g`."""
    on_battery = "Battery Power" in battery
    low_power = re.search(r"(lowpowermode|powermode)\s+1\b", settings)
    return ", ".join(["on battery"] * on_battery + ["low-power mode is on"] * bool(low_power))


def _best(compute: Callable[[], mx.array], seconds: float) -> float:
    """Seconds of one computation."""
    best, began = float("inf"), time.perf_counter()
    for _ in range(5):
        start = time.perf_counter()
        mx.eval([compute() for _ in range(AT_ONCE)])
        best = min(best, (time.perf_counter() - start) / AT_ONCE)
        if time.perf_counter() - began > seconds:
            break
    return best


def _commit() -> str:
    """The commit of the source tree, with '+' if it was changed; empty for an installed one."""
    here = Path(__file__).parent.parent.parent
    if not (here / ".git").exists():
        return ""
    commit = _output("git", "-C", str(here), "rev-parse", "--short", "HEAD").strip()
    changed = _output("git", "-C", str(here), "status", "--porcelain", "--untracked-files=no")
    return f"{commit}+" if changed.strip() else commit


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""
