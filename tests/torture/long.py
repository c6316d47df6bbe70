"""Long runs: memory, open files and the time of a step stay as they are; clocks may jump."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from itertools import count
from pathlib import Path
from statistics import mean
from typing import Any
from unittest.mock import patch

import numpy as np
from torture.kills import COMMANDS
from torture.trials import TRAIN, assert_same, ended, inputs, result, start, succeed

A_MINUTE, LEAST, MOST = 400, 1_000, 50_000  # steps
SETTINGS = [
    *("run.dir=run", "run.log_every=50", "run.checkpoint_minutes=0.1", "run.eval_every_epochs=100"),
    *("compile=true", "data.workers=1"),
]
EACH = 50  # steps between two looks at memory
SLOW, RARE = 3, 0.002  # times the median; the share of steps that may take that long unexplained
GROWTH = 0.01


def memory() -> int:
    """KiB that this process holds."""
    command = ["ps", "-o", "rss=", "-p", str(os.getpid())]
    return int(subprocess.run(command, capture_output=True, check=True).stdout)


def steady(rng: random.Random, folder: Path) -> str:
    """One long run, in steps of CPU time: other programs may keep the machine busy."""
    import hjepa_mlx as hj
    from hjepa_mlx import checkpoint

    inputs(folder)
    os.chdir(folder)
    steps = int(min(MOST, max(LEAST, A_MINUTE * float(os.environ["TORTURE_MINUTES"]))))
    config = hj.load_config("tiny.yaml", [*SETTINGS, f"optim.epochs={steps // 5}"])
    begins, ends, calls = np.ones(steps), np.ones(steps), count()  # whole: memory is measured
    sizes, files, saved = list[int](), list[int](), set[int]()
    plain, save = hj.Step.__call__, checkpoint.save

    def call(step: Any, *given: Any) -> Any:
        at = next(calls)
        ends[at] = time.process_time()
        if at % EACH == 0:
            sizes.append(memory())
            files.append(len(os.listdir("/dev/fd")))
        begins[at] = time.process_time()
        return plain(step, *given)

    def saving(place: Path, step: Any, number: int, *given: Any) -> Path:
        saved.add(number)
        return save(place, step, number, *given)

    with patch.object(hj.Step, "__call__", call), patch.object(checkpoint, "save", saving):
        run = hj.train(config)
    took = ends[1:] - begins[:-1]
    logged = {row["step"] for row in run.metrics}
    assert logged == {*range(0, steps, 50), steps}, "metrics.jsonl lacks rows."
    usual = float(np.median(took))
    slow = [at for at, seconds in enumerate(took, 1) if seconds > SLOW * usual]
    unexplained = [at for at in slow if not {at, at - 1} & (logged | saved)]
    assert len(unexplained) <= max(2, RARE * steps), (
        f"{len(unexplained)} of {steps} steps took more than {SLOW} times the median of "
        f"{1e3 * usual:.1f} ms: {unexplained[:20]}"
    )
    part = len(sizes) // 4
    early, late = mean(sizes[part:-part]), mean(sizes[-part:])
    report = (
        f"{steps} steps of {1e3 * usual:.1f} ms; {len(unexplained)} above {SLOW} times that without"
        f" a reason; {early / 1e3:.1f} → {late / 1e3:.1f} MB; {max(files[2:])} files open"
    )
    assert late < early * (1 + GROWTH), f"Memory grows: {report}, {sizes[:: len(sizes) // 20]}"
    assert max(files[2:]) <= files[1] + 1, f"Open files: {files[:: len(files) // 20]}"
    return report


def same_run(folder: Path) -> None:
    whole = COMMANDS["training"].undisturbed("training")
    assert_same(result(folder, "run"), result(whole, "run"))


def clock_jumps(rng: random.Random, folder: Path) -> str:
    """The clock on the wall is set forwards and back as it trains."""
    inputs(folder)
    succeed(folder, *TRAIN, root="run", hooks={"clock_jumps": rng.randrange(1000)})
    same_run(folder)
    return "by up to ten years"


def sleeps(rng: random.Random, folder: Path) -> str:
    """The machine sleeps and wakes."""
    inputs(folder)
    minutes = float(os.environ["TORTURE_MINUTES"])
    slept, asleep = 0.0, min(120.0, 3 + minutes)
    with start(folder, *TRAIN, root="run", slow=0.001) as process:
        for _ in range(2):
            time.sleep(rng.uniform(0.5, 2))
            if process.poll() is None:
                process.send_signal(signal.SIGSTOP)
                time.sleep(asleep / 2)
                process.send_signal(signal.SIGCONT)
                slept += asleep / 2
        done = ended(process)
    assert done.returncode == 0, done.stderr
    same_run(folder)
    return f"for {slept:.0f} s"


TRIALS = {"steady": steady, "the clock jumps": clock_jumps, "the machine sleeps": sleeps}
