"""Runs `hjepa-mlx ARGUMENTS` with its file operations counted, and one of them disturbed.

TRACED in the environment is a JSON object about the operations under the folder `root`: each
opening for writing, write, truncation, sync, renaming, removal and new folder. `signals`: from an
operation's number to the signal that comes just before it. `fails`: number and errno; that
operation and all later ones fail, on a full disk those that take room. `slow`: seconds that each
takes more. `log`: a file that gets them all, for power.py. `hooks`: changes of the package, see
hooks.py.
"""

from __future__ import annotations

import atexit
import builtins
import errno
import io
import json
import os
import pickle
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

FULL = (errno.ENOSPC, errno.EDQUOT)
GROWS = ("open", "write", "mkdir")  # what a full disk refuses


class Tracer:
    """Counts operations; sees to it that they are disturbed; keeps the log."""

    def __init__(self, root: str, **how: Any) -> None:
        self.root, self.how = os.path.realpath(root) + "/", how
        self.count, self.opened = 0, 0
        self.log: list[tuple] = []
        self.handles: dict[int, int] = {}  # of files open for writing: their number in the log
        self.folders: dict[int, str] = {}  # paths of the other handles

    def inside(self, path: Any) -> str | None:
        """The full path, if it lies under the root."""
        if isinstance(path, int):
            return None
        full = os.path.abspath(os.fsdecode(path))
        full = os.path.join(os.path.realpath(os.path.dirname(full)), os.path.basename(full))
        return full if (full + "/").startswith(self.root) else None

    def operation(self, kind: str, *what: Any) -> None:
        """Called before each operation."""
        number, self.count = self.count, self.count + 1
        time.sleep(self.how.get("slow", 0))
        if sent := self.how.get("signals", {}).get(str(number)):
            os.kill(os.getpid(), sent)
        first, error = self.how.get("fails", (sys.maxsize, 0))
        if number >= first and (kind in GROWS or error not in FULL):
            raise OSError(error, os.strerror(error))
        self.log.append((kind, *what))

    def finish(self) -> None:
        """Write the log down."""
        Path(self.how["log"]).write_bytes(pickle.dumps(self.log))


class File:
    """A file that tells of what is written to it."""

    def __init__(self, file: Any, tracer: Tracer, number: int) -> None:
        self._file, self._tracer, self._number = file, tracer, number

    def write(self, data: Any) -> int:
        content = data.encode() if isinstance(data, str) else bytes(data)
        appends = "a" in self._file.mode
        place = os.fstat(self._file.fileno()).st_size if appends else self._file.tell()
        self._tracer.operation("write", self._number, place, content)
        written = self._file.write(data)
        if appends:
            self._file.flush()  # so that the size is right
        return written

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def truncate(self, size: int) -> int:
        self._tracer.operation("truncate", self._number, size)
        return self._file.truncate(size)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __iter__(self) -> Any:
        return iter(self._file)

    def __enter__(self) -> File:
        return self

    def __exit__(self, *_: Any) -> None:
        self._file.close()


def hook(tracer: Tracer) -> None:
    """Put the tracer before the functions that change files."""
    opened, opened_low = builtins.open, os.open

    def opening(path: Any, mode: str = "r", *args: Any, **more: Any) -> Any:
        full = tracer.inside(path)
        if full is None or not set(mode) & set("wax+"):
            return opened(path, mode, *args, **more)
        tracer.opened += 1
        number = tracer.opened
        tracer.operation("open", number, full, mode)
        file = opened(path, mode, *args, **more)
        tracer.handles[file.fileno()] = number
        return File(file, tracer, number)

    def opening_low(path: Any, flags: int, *args: Any, dir_fd: int | None = None) -> int:
        handle = opened_low(path, flags, *args, dir_fd=dir_fd)
        tracer.handles.pop(handle, None)
        at = tracer.folders.get(dir_fd, "") if dir_fd is not None else ""
        tracer.folders[handle] = os.path.join(at, os.fsdecode(path))
        return handle

    sync = os.fsync

    def syncing(handle: int) -> None:
        if handle in tracer.handles:
            tracer.operation("sync", tracer.handles[handle])
        elif full := tracer.inside(tracer.folders.get(handle, "/")):
            names = os.listdir(full) if os.path.isdir(full) else Path(full).read_bytes()
            tracer.operation("sync", full, names)
        sync(handle)

    builtins.open = io.open = opening  # type: ignore[assignment]
    os.open, os.fsync = opening_low, syncing  # type: ignore[assignment]
    for name in ("rename", "replace", "unlink", "remove", "mkdir", "rmdir", "truncate"):
        setattr(os, name, changing(tracer, name, getattr(os, name)))
    import hjepa_mlx.files

    hjepa_mlx.files._to_disk = lambda handle: os.fsync(handle)  # also on a Mac


def changing(tracer: Tracer, name: str, original: Callable) -> Callable:
    """A function of `os` that changes a folder, counted."""

    def change(path: Any, *args: Any, **more: Any) -> Any:
        if more.get("dir_fd") is not None:
            full = tracer.inside(os.path.join(tracer.folders[more["dir_fd"]], os.fsdecode(path)))
        else:
            full = tracer.inside(path)
        if full is not None:
            to = [tracer.inside(args[0])] if name in ("rename", "replace") else []
            tracer.operation({"replace": "rename", "remove": "unlink"}.get(name, name), full, *to)
        try:
            return original(path, *args, **more)
        except OSError:
            if full is not None:
                tracer.log[-1] = ("failed",)
            raise

    return change


if __name__ == "__main__":
    how = json.loads(os.environ["TRACED"])

    from torture import hooks

    import hjepa_mlx.cli  # loaded before anything is disturbed

    hooks.install(how.get("hooks", {}))
    tracer = Tracer(**how)
    hook(tracer)
    if "log" in how:
        atexit.register(tracer.finish)
    hjepa_mlx.cli.main()
