"""The rules of hostile input, and commands that run under them.

A command ends with status 0 (the file is harmless after all), 1 or 2, and one foreseen line; it
takes at most MEMORY and SECONDS; it writes nothing outside the places it was told.
"""

import ctypes
import importlib
import os
import pkgutil
import resource
import shlex
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import hjepa_mlx
from hjepa_mlx.cli import main

MEMORY = 2_000_000_000  # bytes
SECONDS = 60  # of CPU time
WALL = 600.0  # seconds on the clock
ADDRESSES = 40_000_000_000  # bytes of address space: a bomb must not take the machine along
UNIT = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss
ENDINGS = (
    "Traceback",
    "hjepa-mlx: unexpected ",
    "Fatal Python error",
    "terminate called",
    "Aborted",
)


class Ended(NamedTuple):
    """How a command ended."""

    status: int
    stdout: str
    stderr: str
    memory: int  # bytes
    seconds: float  # of CPU time


def everything() -> None:
    """Import all that any command imports, so that a fork can run one at once.

    No operation of MLX may have run before a fork.
    """
    own = [module.name for module in pkgutil.walk_packages(hjepa_mlx.__path__, "hjepa_mlx.")]
    others = ("scipy.io", "pyarrow.parquet", "huggingface_hub", "torch", "pillow_heif")
    for name in [*own, *(name for name in others if find_spec(name.split(".")[0]))]:
        if not name.endswith("__main__"):
            importlib.import_module(name)


def run(
    command: str,
    place: Path,
    users_way: bool = False,
    change: Callable[[], None] = lambda: None,
) -> Ended:
    """`hjepa-mlx COMMAND` in the folder `place`; what it says goes beside that folder.

    users_way: in a Python of its own, as users run it, and not in a fork of this one. change: is
    called in the fork first.
    """
    said = place.parent / "said"
    for folder in (said, place.parent / "home"):
        folder.mkdir(exist_ok=True)
    if sys.platform == "linux":  # a fork has the memory of its parent, which has made bombs
        ctypes.CDLL(None).malloc_trim(0)
    child = os.fork()
    if not child:
        status = 70
        try:
            change()
            status = _in_child(command, place, said, users_way)
        finally:
            os._exit(status)
    status, usage = _wait(child)
    out, err = ((said / name).read_text(errors="replace") for name in ("out", "err"))
    shutil.rmtree(said)
    return Ended(status, out, err, usage.ru_maxrss * UNIT, usage.ru_utime + usage.ru_stime)


def _wait(child: int) -> tuple[int, resource.struct_rusage]:
    end = time.monotonic() + WALL
    while True:
        done, status, usage = os.wait4(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status), usage
        if time.monotonic() > end:
            os.kill(child, signal.SIGKILL)
        time.sleep(0.01)


def _in_child(command: str, place: Path, said: Path, users_way: bool) -> int:
    os.chdir(place)
    for number, path in ((0, Path(os.devnull)), (1, said / "out"), (2, said / "err")):
        os.dup2(os.open(path, os.O_RDWR | os.O_CREAT), number)
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS + 5, SECONDS + 10))
    if sys.platform == "linux":
        resource.setrlimit(resource.RLIMIT_AS, (ADDRESSES, ADDRESSES))
    os.environ["HOME"] = str(place.parent / "home")
    if users_way:
        path = str(Path(hjepa_mlx.__file__).parent.parent)
        environment = os.environ | {"PYTHONPATH": path}
        words = [sys.executable, "-m", "hjepa_mlx", *shlex.split(command)]
        os.execve(sys.executable, words, environment)
    tempfile.tempdir = None
    usage = shutil.disk_usage("/")._replace(free=10**12)
    shutil.disk_usage = lambda path: usage  # type: ignore[assignment]  # as if for real data sets
    sys.argv = ["hjepa-mlx", *shlex.split(command)]
    try:
        main()
    except SystemExit as ended:
        return ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    return 0


def seen(folder: Path) -> dict[str, tuple]:
    """Everything in a folder but links' targets: what, how large, and when it was changed."""
    found = {}
    for parent, folders, names in os.walk(folder):
        for name in [*folders, *names]:
            status = os.lstat(path := os.path.join(parent, name))
            is_folder = os.path.isdir(path) and not os.path.islink(path)
            changed = () if is_folder else (status.st_size, status.st_mtime_ns)
            found[path] = (status.st_mode, status.st_ino, *changed)
    return found


def hand_over(
    commands: Iterable[str],
    place: Path,
    may_write: tuple[str, ...] = (),
    users_way: bool = False,
    change: Callable[[], None] = lambda: None,
) -> str:
    """Run each command in `place`, and check the rules; returns the statuses, in words.

    may_write: places that the commands were told to write to, relative to `place`.
    """
    statuses, allowed = [], tuple(str(place / name) for name in may_write)
    for command in commands:
        earlier = seen(place.parent)
        ended = run(command, place, users_way, change)
        if fault := broken(ended):
            raise AssertionError(f"{command}: {fault}\n{ended.stderr[-3000:]}{ended.stdout[-500:]}")
        changed = {path for path, _ in earlier.items() ^ seen(place.parent).items()}
        outside = [path for path in sorted(changed) if not path.startswith(allowed)]
        home = str(place.parent / "home")  # where matplotlib keeps a list of fonts
        beside = [path for path in outside if not path.startswith(home)]
        assert not beside, f"{command}: changed {beside[:3]}\n{ended.stderr[-1000:]}"
        statuses.append(f"{command.split(' --')[0].split(' ')[0]} {ended.status}")
    return ", ".join(statuses)


def broken(ended: Ended) -> str:
    """Which rule a command has broken; "" if none."""
    both = ended.stdout + ended.stderr
    if ended.status not in (0, 1, 2):
        return f"ended with {ended.status} after {ended.seconds:.0f} s of CPU time"
    if ended.memory > MEMORY:
        return f"took {ended.memory / 1e9:.2f} GB"
    if ended.seconds > SECONDS:
        return f"took {ended.seconds:.0f} s of CPU time"
    if found := next((word for word in ENDINGS if word in both), ""):
        return f"says '{found}'"
    if ended.status == 0 or (ended.status == 1 and "WRONG" in ended.stdout):
        return ""
    lines = ended.stderr.splitlines()
    if not lines or not lines[-1].startswith("hjepa-mlx: "):
        return "does not end in its line"
    if sum(line.startswith("hjepa-mlx: ") for line in lines) > 1 or len(lines[-1]) > 4000:
        return "says more than one line"
    return ""
