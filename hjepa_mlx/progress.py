"""Progress for people: bars and a live line in a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
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
    """A console on stderr for a run that outlives its terminal, or the program that reads it."""
    return Console(file=cast(IO[str], _Lasting(sys.stderr)))


@contextmanager
def bar(
    label: str, total: int, unit: str = "bytes", shown: bool = True
) -> Iterator[Callable[[int], None]]:
    """A progress bar with time left, in a terminal only; call the result with the new amount."""
    console = Console(stderr=True)
    amount = DownloadColumn() if unit == "bytes" else TextColumn("{task.completed:,.0f} " + unit)
    label_column, left = TextColumn("{task.description}"), TextColumn("· left")
    with Progress(
        *(label_column, BarColumn(), amount, left, TimeRemainingColumn()),
        console=console,
        transient=True,
        disable=not (shown and console.is_terminal),
    ) as progress:
        task = progress.add_task(label, total=total)
        yield lambda amount: progress.advance(task, amount)


@contextmanager
def training_bar(
    console: Console, epochs: int, total: int, done: int, work: Callable[[int], float]
) -> Iterator[Callable[[dict], None]]:
    """Show epoch, step, loss, speed, memory and time left; call the result with a logged row.

    A live line in a terminal, elsewhere a plain one every PLAIN_SECONDS. work: what the first so
    many steps cost, in any unit; the time left is in proportion to it.
    """
    line, left = TextColumn("{task.description} ·"), TextColumn("· left")
    began, first, last = time.monotonic(), work(done), float("-inf")
    with Progress(
        *(BarColumn(), line, TimeElapsedColumn(), left, TimeRemainingColumn()),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    ) as progress:
        task = progress.add_task(f"step {done}/{total}", total=work(total))
        progress.update(task, completed=first)

        def show(row: dict) -> None:
            nonlocal last
            step, now = row["step"], time.monotonic()
            text = (
                f"epoch {min(epochs, int(row['epoch']) + 1)}/{epochs} step {step}/{total} "
                f"loss {row['loss']:.4f} {row['images_per_second']:.0f} images/s "
                f"{row['peak_memory_gb']:.1f} GB"
            )
            progress.update(task, completed=work(step), description=text)
            if console.is_terminal or (now - last < PLAIN_SECONDS and step < total):
                return
            last = now
            rest = (work(total) - work(step)) / (work(step) - first)
            say(console, f"{text} left {duration(rest * (now - began))}")

        yield show


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
