"""Schedules: pure functions of the step, which runs from 0 to total − 1.

The last step gets exactly the configured end; so does the first the start, if nothing warms up.
"""

from __future__ import annotations

import math


def linear(step: int, total: int, start: float, end: float) -> float:
    """A straight line from `start` to `end`."""
    progress = step / max(1, total - 1)
    return start * (1 - progress) + end * progress


def cosine(step: int, total: int, start: float, end: float) -> float:
    """Half a cosine from `start` to `end`."""
    progress = step / max(1, total - 1)
    weight = (1 + math.cos(math.pi * progress)) / 2
    return start * weight + end * (1 - weight)


def joined(step: int, steps: int, start: float, value: float) -> float:
    """`value`, reached from `start` in a straight line in the first `steps` steps."""
    share = min(1.0, max(0.0, (step + 1) / max(1, steps)))
    return start * (1 - share) + value * share


def warmup_cosine(step: int, total: int, warmup: int, peak: float, end: float) -> float:
    """Linear from peak/warmup to `peak` in `warmup` steps, then half a cosine to `end`."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return cosine(step - warmup, total - warmup, peak, end)
