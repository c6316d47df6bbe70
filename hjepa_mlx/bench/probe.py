"""`precision: auto` and `compile: auto`: real steps decide on a GPU, and say what they did.

Batches are small, so that it takes seconds and no memory that training would not.

What departs from float32 and compiled steps must be clearly faster here: small differences are
noise, and a run should not depend on it.
"""

from __future__ import annotations

from typing import Any

from hjepa_mlx import backend
from hjepa_mlx.bench import machine
from hjepa_mlx.bench.throughput import time_steps
from hjepa_mlx.config import Config

CLEARLY = 1.1  # times as fast
SECONDS = 0.5  # of steps for each choice, after those that compile
BATCH = 32  # at most


def settle(config: Config) -> list[str]:
    """Replace `auto` in `precision` and `compile`; returns what was chosen and why, in words."""
    found = []
    if config.precision == "auto":
        config.precision, why = _precision(config)
        found.append(f"precision: {config.precision} ({why}).")
    if config.compile == "auto":
        config.compile, why = _compile(config)
        found.append(f"compile: {str(config.compile).lower()} ({why}).")
    return found


def _precision(config: Config) -> tuple[Any, str]:
    if not backend.on_metal():
        return "float32", "a CPU has no arithmetic for less"
    rates = {dtype: _rate(config, precision=dtype) for dtype in machine.DTYPES}
    fastest = max(rates, key=rates.__getitem__)
    words = ", ".join(f"{dtype} {rate:.0f}" for dtype, rate in rates.items()) + " images/s"
    return (fastest if rates[fastest] > CLEARLY * rates["float32"] else "float32"), words


def _compile(config: Config) -> tuple[bool, str]:
    if not backend.on_metal():
        return backend.can_compile(), "on a CPU it pays wherever there is g++"
    compiled, eager = _rate(config, compile=True), _rate(config, compile=False)
    words = f"{compiled:.0f} images/s compiled, {eager:.0f} not"
    return eager <= CLEARLY * compiled, words


def _rate(config: Config, **choice: str | bool) -> float:
    small = config.model_copy(update=choice, deep=True)
    small.data.batch_size = min(BATCH, config.data.batch_size)
    return time_steps(small, SECONDS).images_per_second
