"""A long run and its machine: Ctrl-C that saves, a Mac that stays awake."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Interrupt:
    """The first Ctrl-C (or SIGTERM) is noted; the second leaves at once."""

    def __init__(self) -> None:
        self.wanted = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """The signal handler."""
        if self.wanted:
            if os.isatty(2):
                os.write(2, b"\x1b[?25h")  # the cursor, which progress bars hide
            os._exit(130)
        self.wanted = True
        os.write(2, b"\nSaving; press Ctrl-C again to leave at once.\n")  # print may be under way


@contextmanager
def interruptible() -> Iterator[Interrupt]:
    """Catch Ctrl-C and SIGTERM while inside; yields what tells whether one came."""
    interrupt = Interrupt()
    try:
        before = {s: signal.signal(s, interrupt) for s in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not the main thread: the caller's own handling stays
        before = {}
    try:
        yield interrupt
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def awake() -> Iterator[None]:
    """Keep a Mac from sleeping while a run trains; the display may."""
    if sys.platform != "darwin":
        yield
        return
    with subprocess.Popen(["caffeinate", "-is", "-w", str(os.getpid())]) as process:
        try:
            yield
        finally:
            process.terminate()
