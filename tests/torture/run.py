"""Torture: tries to break the package's promises for as long as you like (`make torture`).

Each other file here with a table TRIALS is a kind. A trial gets random numbers and an empty
folder, raises AssertionError where a promise is broken, and returns in a few words what it did.
"""

from __future__ import annotations

import argparse
import importlib
import os
import pickle
import random
import resource
import shlex
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:] = [str(HERE.parent), str(HERE.parent.parent), *sys.path[1:], str(HERE)]
Trial = Callable[[random.Random, Path], str]
MEMORY_UNIT = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss, in bytes


def once(name: str, make: Callable[[Path], object]) -> Path:
    """A folder that the first trial that needs it fills with `make`, and all later ones share."""
    folder = Path(tempfile.gettempdir()) / f"shared-{name}"
    done = folder.with_suffix(".done")
    if not done.exists():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        make(folder)
        done.touch()
    return folder


def kinds() -> dict[str, dict[str, Trial]]:
    """The trials of every kind."""
    names = sorted(path.stem for path in HERE.glob("*.py") if path != Path(__file__))
    modules = {name: importlib.import_module(f"torture.{name}") for name in names}
    return {name: module.TRIALS for name, module in modules.items() if hasattr(module, "TRIALS")}


def tried(trial: Trial, seed: str) -> tuple[str, str, int]:
    """One trial in a process of its own: what it did, its fault or "", its memory in bytes."""
    folder = Path(tempfile.mkdtemp())
    read, write = os.pipe()
    child = os.fork()
    if not child:
        did, fault = "", ""
        try:
            did = trial(random.Random(seed), folder)
        except AssertionError as error:
            fault = str(error) or traceback.format_exc()
        except BaseException:
            fault = traceback.format_exc()
        who = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
        memory = max(resource.getrusage(one).ru_maxrss for one in who) * MEMORY_UNIT
        with os.fdopen(write, "wb") as pipe:
            pickle.dump((did, fault, memory), pipe)
        os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        said = pipe.read()
    status = os.waitpid(child, 0)[1]
    shutil.rmtree(folder, ignore_errors=True)
    return pickle.loads(said) if said else ("", f"The trial's process ended with {status}.", 0)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "kinds", nargs="*", metavar="KIND", help="such as kills, or kills/export; all if none"
    )
    parser.add_argument("--minutes", type=float, default=5, help="each trial runs at least once")
    parser.add_argument("--seed", default="0")
    parser.add_argument("--repeat", metavar="KIND/TRIAL/NUMBER", help="exactly this one")
    options = parser.parse_args()
    os.environ["OPENBLAS_NUM_THREADS"] = "1"  # on a busy machine more threads wait for each other
    every, first = kinds(), 0
    both = [(kind, trial) for kind in every for trial in every[kind]]
    chosen = [x for x in both if not options.kinds or {x[0], "/".join(x)} & {*options.kinds}]
    if not chosen:
        parser.error(f"There are these kinds: {', '.join(every)}; and such as {'/'.join(both[0])}.")
    if options.repeat:
        kind, trial, number = options.repeat.split("/")
        chosen, first, options.minutes = [(kind, trial)], int(number), 0.0
    end = time.monotonic() + 60 * options.minutes
    counts: dict[tuple[str, str], list] = {}
    with tempfile.TemporaryDirectory(prefix="torture-") as tempfile.tempdir:
        os.environ["TORTURE_MINUTES"] = str(options.minutes)
        for kind, trial, number in turns(chosen, first, end):
            began, which = time.monotonic(), f"{kind}/{trial}/{number}"
            did, fault, memory = tried(every[kind][trial], f"{options.seed}/{which}")
            seconds = time.monotonic() - began
            row = counts.setdefault((kind, trial), [0, 0, 0.0, 0])
            row[:] = row[0] + 1, row[1] + bool(fault), row[2] + seconds, max(row[3], memory)
            said = f"FAULT {which}: {fault}" if fault else f"{which}: {did}"
            print(f"{said} ({seconds:.1f} s)", flush=True)
            if fault:
                again = f"--seed {options.seed} --repeat {shlex.quote(which)}"
                print(f"      again: python tests/torture/run.py {again}", flush=True)
    return report(counts)


def turns(chosen: list[tuple[str, str]], first: int, end: float) -> Iterator[tuple[str, str, int]]:
    """Each trial once, and then again in turn until `end`."""
    for number in count(first):
        for kind, trial in chosen:
            if number > first and time.monotonic() >= end:
                return
            yield kind, trial, number
        if time.monotonic() >= end:
            return


def report(counts: dict[tuple[str, str], list]) -> int:
    """Print the table; 1 if there were faults."""
    print(f"\n{'kind':10} {'trial':32} {'tried':>6} {'faults':>6} {'seconds':>8} {'memory':>8}")
    for (kind, name), (number, faults, seconds, memory) in counts.items():
        print(f"{kind:10} {name:32} {number:6} {faults:6} {seconds:8.1f} {memory / 1e6:5.0f} MB")
    faults = sum(count[1] for count in counts.values())
    tried = sum(count[0] for count in counts.values())
    print(f"{tried} tried, {faults} faults.")
    return int(faults > 0)


if __name__ == "__main__":
    sys.exit(main())
