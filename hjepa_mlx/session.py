"""A long run and its machine: Ctrl-C or a closed terminal that saves, a Mac that stays awake."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)  # Ctrl-C, shutdown, terminal closed


class Interrupt:
    """The first of `SIGNALS` is noted; a Ctrl-C after it leaves at once."""

    def __init__(self) -> None:
        self.wanted = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """The signal handler."""
        if self.wanted and number == signal.SIGINT:  # a terminal that closes hangs up twice
            if os.isatty(2):
                _write(b"\x1b[?25h")  # the cursor, which progress bars hide
            os._exit(130)
        if not self.wanted:
            self.wanted = True
            _write(b"\nSaving; press Ctrl-C again to leave at once.\n")


def _write(text: bytes) -> None:
    """Write to stderr, where a print may be under way, if it is still there."""
    with suppress(OSError):
        os.write(2, text)


@contextmanager
def interruptible() -> Iterator[Interrupt]:
    """Catch `SIGNALS` while inside; yields what tells whether one came."""
    interrupt = Interrupt()
    hangs_up = signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN  # nohup has it ignored
    caught = [s for s in SIGNALS if hangs_up or s != signal.SIGHUP]
    try:
        before = {s: signal.signal(s, interrupt) for s in caught}
    except ValueError:  # not the main thread: the caller's own handling stays
        before = {}
    try:
        yield interrupt
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def awake() -> Iterator[None]:
    """Keep a Mac from sleeping while something long runs; the display may."""
    if sys.platform != "darwin":
        yield
        return
    with subprocess.Popen(["caffeinate", "-is", "-w", str(os.getpid())]) as process:
        try:
            yield
        finally:
            process.terminate()
