"""The steps since the last logged one: their metrics, and how long they took."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from hjepa_mlx import agreement
from hjepa_mlx.step import Metrics


class Meter:
    """Gives one logged row: the mean of each metric, and images per second."""

    def __init__(self) -> None:
        self.metrics: list[dict[str, Any]] = []  # a checkpoint keeps these
        self.start()

    def start(self) -> None:
        """Start the clock; earlier steps do not count in `rate`."""
        self._began, self._steps = time.monotonic(), 0

    def add(self, metrics: Metrics) -> None:
        """Note a step, which may still be under way."""
        self.metrics.append(metrics)
        self._steps += 1

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time spent inside does not count in `rate`."""
        began = time.monotonic()
        yield
        self._began += time.monotonic() - began

    def read(self, done: int, kept: Path | None) -> None:
        """Wait for the steps, of which `done` is the last, and turn their metrics into numbers.

        Raises HJEPAError at the first one that is not finite; it names the checkpoint `kept`.
        """
        self.metrics = [{k: float(v) for k, v in metrics.items()} for metrics in self.metrics]
        for number, metrics in enumerate(self.metrics, done - len(self.metrics) + 1):
            # an overflow passes while the loss scale can still be halved
            sound = math.isfinite(metrics["grad_norm"]) or metrics.get("loss_scale", 1) > 1
            if not (math.isfinite(metrics["loss"]) and sound):
                raise agreement.shared_error(
                    f"Training stopped at step {number}: the loss is {metrics['loss']}, the "
                    f"gradient's norm {metrics['grad_norm']}. The last good checkpoint is "
                    f"{kept or 'none yet'}. Start a new run with a lower optim.lr, or with "
                    "precision=float32."
                )

    def rate(self, batch: int) -> float:
        """Images per second, with `batch` images a step."""
        return round(batch * self._steps / (time.monotonic() - self._began), 1)

    def take_mean(self) -> dict[str, Any]:
        """The mean of each metric; None where no step had a finite one. Forgets the metrics."""
        floats, self.metrics = self.metrics, []
        mean = {}
        for key in floats[0]:  # a float16 step that overflowed has no gradient norm
            finite = [m[key] for m in floats if math.isfinite(m[key])]
            mean[key] = float(np.mean(finite)) if finite else None
        return {"loss": mean.pop("loss"), **mean}
