"""A long run and its machine: Ctrl-C saves, a rank that hangs is noticed, a Mac stays awake."""

from __future__ import annotations

import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)  # Ctrl-C, shutdown, terminal closed
ANSWER = 5.0  # seconds and three steps that a rank has to react to a signal
RESCUE = 120.0  # seconds to save after the connections were cut


class Interrupt:
    """The first of `SIGNALS` is noted; a Ctrl-C after it leaves at once."""

    def __init__(self, speaks: bool) -> None:
        self.wanted, self.speaks = False, speaks

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """The signal handler."""
        if self.wanted and number == signal.SIGINT:  # a terminal that closes hangs up twice
            if os.isatty(2):
                _write(b"\x1b[?25h")  # the cursor, which progress bars hide
            os._exit(130)
        if not self.wanted:
            self.wanted = True
            if self.speaks:
                _write(b"\nSaving; press Ctrl-C again to leave at once.\n")


def _write(text: bytes) -> None:
    """Write to stderr, where a print may be under way, if it is still there."""
    with suppress(OSError):
        os.write(2, text)


@contextmanager
def interruptible(speaks: bool = True) -> Iterator[Interrupt]:
    """Catch `SIGNALS` while inside; yields what tells whether one came."""
    interrupt = Interrupt(speaks)
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
def watched(seconds: float) -> Iterator[Callable[[], None]]:
    """Let what waits for another rank fail when what is yielded is not called for so many seconds.

    After a signal, when it is not called for a few steps' time: Python handles none while MLX
    waits. Closes this process's sockets; where MLX uses others, the process ends.
    """
    last, step, ended = time.monotonic(), 0.0, threading.Event()
    read, write = os.pipe()  # left open: the thread may still read
    os.set_blocking(write, False)
    with suppress(ValueError):  # not the main thread: there are no signals
        signal.set_wakeup_fd(write)

    def beat() -> None:
        nonlocal last, step
        last, step = time.monotonic(), time.monotonic() - last

    def watch() -> None:
        nonlocal last
        allowed = seconds
        while time.monotonic() - last < allowed and not ended.is_set():
            if select.select([read], [], [], 0.2)[0]:
                os.read(read, 1)
                last, allowed = time.monotonic(), min(seconds, ANSWER + 3 * step)
        if not ended.is_set():
            _close_sockets()
        if not ended.wait(RESCUE):
            _write(b"hjepa-mlx: another rank hangs. Go on from the last checkpoint.\n")
            os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    try:
        yield beat
    finally:
        ended.set()
        with suppress(ValueError):
            signal.set_wakeup_fd(-1)


def _close_sockets() -> None:
    for handle in (int(name) for name in os.listdir("/dev/fd") if int(name) > 2):
        with suppress(OSError), socket.socket(fileno=os.dup(handle)) as connection:
            connection.shutdown(socket.SHUT_RDWR)


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
