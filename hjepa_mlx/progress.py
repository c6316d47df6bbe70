"""What a person sees while a run trains: a live line in a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import IO, Any, cast

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

PLAIN_SECONDS = 10  # between two plain lines


class _Lasting:
    """A text stream that falls silent when its pipe or terminal is gone, instead of raising."""

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        with suppress(OSError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def lasting_console() -> Console:
    """A console on stderr for a run that outlives its terminal, or what its output is piped to."""
    return Console(file=cast(IO[str], _Lasting(sys.stderr)))


@contextmanager
def bar(
    label: str, total: int, unit: str = "bytes", shown: bool = True
) -> Iterator[Callable[[int], None]]:
    """A progress bar with time left, in a terminal only; call what it gives with the new amount."""
    console = Console(stderr=True)
    amount = DownloadColumn() if unit == "bytes" else TextColumn("{task.completed:,.0f} " + unit)
    columns = (TextColumn("{task.description}"), BarColumn(), amount, TextColumn("· left"))
    with Progress(
        *columns,
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not (shown and console.is_terminal),
    ) as progress:
        task = progress.add_task(label, total=total)
        yield lambda amount: progress.advance(task, amount)


class Reporter:
    """Shows epoch, step, loss, images per second, time left and memory.

    work: what the first so many steps cost, in any unit; time left is in proportion to it.
    """

    def __init__(
        self,
        console: Console,
        epochs: int,
        total: int,
        done: int,
        work: Callable[[int], float] = float,
    ) -> None:
        self.console = console
        self.epochs, self.total = epochs, total
        self._live = console.is_terminal
        self._began, self._first, self._work = time.monotonic(), work(done), work
        self._last_line = float("-inf")
        self._progress = Progress(
            TextColumn("epoch {task.fields[epoch]}/" + str(epochs)),
            BarColumn(),
            TextColumn(
                "step {task.fields[step]}/" + f"{total} · " + "loss {task.fields[loss]:.4f}"
            ),
            TextColumn("· {task.fields[rate]:.0f} images/s · {task.fields[memory]:.1f} GB ·"),
            TimeElapsedColumn(),
            TextColumn("· left"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
        )
        self._task = self._progress.add_task(
            "train",
            total=work(total),
            completed=work(done),  # type: ignore[arg-type]
            epoch=0,
            step=done,
            loss=float("nan"),
            rate=0.0,
            memory=0.0,
        )

    def __enter__(self) -> Reporter:
        if self._live:
            self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._live:
            self._progress.stop()

    def update(self, row: dict) -> None:
        """Show a logged step."""
        step, rate = row["step"], row["images_per_second"]
        epoch = min(self.epochs, int(row["epoch"]) + 1)
        memory = row["peak_memory_gb"]
        self._progress.update(
            self._task,
            completed=self._work(step),
            epoch=epoch,
            step=step,
            loss=row["loss"],
            rate=rate,
            memory=memory,
        )
        now = time.monotonic()
        if self._live or (now - self._last_line < PLAIN_SECONDS and step < self.total):
            return
        self._last_line = now
        done = self._work(step)
        rest = (self._work(self.total) - done) / (done - self._first)
        left = rest * (now - self._began)
        say(
            self.console,
            f"epoch {epoch}/{self.epochs} step {step}/{self.total} loss {row['loss']:.4f} "
            f"{rate:.0f} images/s {memory:.1f} GB left {duration(left)}",
        )


def say(console: Console, text: str, style: str | None = None) -> None:
    """Print a line as it is: file names are no markup, log files have no width."""
    text = text.encode("utf-8", "backslashreplace").decode()
    console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)


def duration(seconds: float) -> str:
    """Seconds in words a person reads at a glance: 45 s, 12 min, 3 h 05 min."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"
