"""Trackers: what a run logs, also in TensorBoard or Weights & Biases.

metrics.jsonl stays the source. A tracker that fails is left out from then on; it never stops a run.
"""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console

from hjepa_mlx.config import Config
from hjepa_mlx.errors import UsageError
from hjepa_mlx.progress import say
from hjepa_mlx.runs import Run

Log = Callable[[dict[str, float], int], Any]  # of numbers by name, and the step


def check_installed(config: Config) -> None:
    """Refuse a tracker whose package is missing."""
    for name in config.run.trackers:
        if importlib.util.find_spec(name) is None:
            raise UsageError(f"run.trackers={name} needs: pip install 'hjepa-mlx[{name}]'.")


@contextmanager
def logging(
    run: Run, console: Console, names: Sequence[str]
) -> Iterator[Callable[[dict[str, Any]], None]]:
    """A function that logs a row of the run in metrics.jsonl, then in each of these trackers."""
    trackers: dict[str, tuple[Log, Callable[[], Any]]] = {}

    @contextmanager
    def harmless(name: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # whatever it is, training is worth more
            trackers.pop(name, None)
            text = f"{name} failed and is left out: {error}. metrics.jsonl has every row."
            say(console, text, style="yellow")

    def log(row: dict[str, Any]) -> None:
        run.log(row)
        numbers = {key: float(x) for key, x in row.items() if isinstance(x, (int, float))}
        for name, (track, _) in list(trackers.items()):
            with harmless(name):
                track(numbers, row["step"])

    for asked in names:
        with harmless(asked):
            trackers[asked] = OPENERS[asked](run)
    try:
        yield log
    finally:
        for name, (_, close) in list(trackers.items()):
            with harmless(name):
                close()


def _tensorboard(run: Run) -> tuple[Log, Callable[[], Any]]:
    from tensorboard.summary import Writer

    writer = Writer(str(run.path / "tensorboard"))

    def track(numbers: dict[str, float], step: int) -> None:
        for name, value in numbers.items():
            writer.add_scalar(name, value, step)
        writer.flush()

    return track, writer.close


def _wandb(run: Run) -> tuple[Log, Callable[[], Any]]:
    import wandb

    path = run.path.absolute()
    own = hashlib.sha256(str(path).encode()).hexdigest()[:8]  # the same when the run is resumed
    started = wandb.init(
        project="hjepa-mlx",
        name=path.name,
        id=f"{path.name}-{own}",
        resume="allow",
        dir=str(path),
        config=run.config.model_dump(),
    )
    return (lambda numbers, step: started.log(numbers, step=step)), started.finish


OPENERS = {"tensorboard": _tensorboard, "wandb": _wandb}
