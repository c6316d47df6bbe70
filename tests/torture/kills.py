"""Commands are killed at any moment, and repeated until done: the result is the undisturbed one."""

from __future__ import annotations

import hashlib
import os
import pty
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from torture import trials
from torture.run import Trial, once
from torture.trials import TRAIN, assert_same, inputs, log_of, result, succeed, wait_for, with_run

NAME = "cifar-10-binary.tar.gz"
SIGNALS = (signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
MOST = 4  # kills of a trial
STEPS = 10  # of the recipe
SELDOM = ("--set", "run.checkpoint_minutes=1000")


class Command(NamedTuple):
    """A command that is killed."""

    put: Callable[[Path], object]  # its inputs into a folder
    arguments: Callable[[Path], tuple[str, ...]]  # in that folder, as it is now
    root: str  # the part of the folder that it writes
    hooks: dict[str, Any] = {}  # noqa: RUF012
    new: str = ""  # a folder that is not written again once it is there

    def run(self, folder: Path, **traced: Any) -> str:
        """Let it run to its end; what it says."""
        return succeed(folder, *self.arguments(folder), root=self.root, hooks=self.hooks, **traced)

    def done(self, folder: Path) -> bool:
        """Whether only the end of its process was disturbed."""
        return bool(self.new) and (folder / self.new).exists()

    def undisturbed(self, name: str) -> Path:
        """A folder with its undisturbed result, the log of its operations and how long it took."""

        def make(place: Path) -> None:
            self.put(place)
            began = time.monotonic()
            self.run(place, log="log")
            (place / "seconds").write_text(str(time.monotonic() - began))

        return once(f"undisturbed-{name}", make)


def moment(rng: random.Random, log: list[tuple]) -> int:
    """The number of an operation: as often between two files as inside one."""
    rare = [number for number, (kind, *_) in enumerate(log) if kind != "write"]
    return rng.choice(rare) if rng.random() < 0.5 else rng.randrange(len(log))


def killed(rng: random.Random, folder: Path, what: Command, log: list[tuple], wait: float) -> str:
    """Run it and send a signal; in words what came of it, or "" if it was done before."""
    number = rng.choice(SIGNALS)
    how: dict[str, Any] = {"root": what.root, "hooks": what.hooks}
    inside, at = rng.random() < 0.75, moment(rng, log)
    if inside:
        how["signals"] = {str(at): number}
        if number == signal.SIGINT and rng.random() < 0.5:  # again, soon after
            how["signals"][str(at + rng.randrange(1, 60))] = number
    arguments = what.arguments(folder)
    with trials.start(folder, *arguments, **how) as process:
        try:
            said = process.communicate(timeout=trials.TIMEOUT if inside else rng.uniform(0, wait))[
                1
            ]
        except subprocess.TimeoutExpired:
            process.send_signal(number if not inside else signal.SIGKILL)
            said = process.communicate(timeout=trials.TIMEOUT)[1]
            assert not inside, f"{arguments} still ran after {trials.TIMEOUT} s."
    status, name = process.returncode, signal.Signals(number).name
    assert status in (0, 130, -number), f"{name}: {arguments} ended with {status}: {said}"
    assert "Traceback" not in said or not inside, f"{name} at {how}: {said}"
    if not status:
        return ""
    return f"{name} at operation {at}" if inside else f"{name} at some time"


def until_done(rng: random.Random, folder: Path, name: str, what: Command) -> str:
    """Kill it a few times, let it end, and compare."""
    what.put(folder)
    whole = what.undisturbed(name)
    log, kills = log_of(whole), list[str]()
    wait = float((whole / "seconds").read_text())
    for _ in range(rng.randint(1, MOST)):
        how = killed(rng, folder, what, log, wait)
        kills += [how] if how else []
        if not how or what.done(folder):
            break
    else:
        what.run(folder)
    assert_same(result(folder, what.root), result(whole, what.root))
    return f"{len(kills)} kills: {'; '.join(kills)}"


def train_or_resume(folder: Path) -> tuple[str, ...]:
    return (*TRAIN, "--resume") if (folder / "run/config.yaml").exists() else TRAIN


def small_cifar(place: Path) -> None:
    """CIFAR-10 in its published layout, with few images."""
    import layouts

    layouts.cifar10(place / "data/cifar10", 20)


def always(line: str) -> Callable[[Path], tuple[str, ...]]:
    return lambda _: tuple(line.split())


COMMANDS = {
    "training": Command(inputs, train_or_resume, "run"),
    "prepare photographs": Command(
        inputs,
        always("datasets prepare folder --data-dir pictures --out made"),
        "made",
        {"small_shards": 5},
    ),
    "prepare arrays": Command(
        small_cifar, always("datasets prepare cifar10 --data-dir data"), "data/cifar10/prepared"
    ),
    "export": Command(
        with_run, always("export run --to safetensors --out to/made"), "to", {}, "to/made"
    ),
    "finetune": Command(with_run, always("finetune run --out to/tuned"), "to", {}, "to/tuned"),
}


def kill(name: str) -> Trial:
    """The trial of one of the commands."""
    return lambda rng, folder: until_done(rng, folder, name, COMMANDS[name])


def download(rng: random.Random, folder: Path) -> str:
    """From a server on this machine that sometimes breaks off."""
    import layouts
    import servers

    def make(place: Path) -> None:
        layouts.cifar10(place / "made", 20)
        layouts.archive(place / "made/cifar-10-batches-bin", place / NAME)

    archive = once("archive", make) / NAME
    content = archive.read_bytes()
    with servers.serving() as server:
        server.files[NAME] = content
        cuts = [servers.cut_after(rng.randrange(len(content))) for _ in range(rng.randrange(3))]
        server.manners += cuts
        published = {f"{server.url}/{NAME}": [hashlib.md5(content).hexdigest(), len(content)]}
        arguments = always("datasets download cifar10 --data-dir data")
        what = Command(lambda _: None, arguments, "data", {"published": published})
        return until_done(rng, folder, "download", what)


def terminal(rng: random.Random, folder: Path) -> str:
    """The terminal of a training is closed: it saves, though nobody reads what it says."""
    inputs(folder)
    whole = COMMANDS["training"].undisturbed("training")
    environment = trials.environment(root="run", slow=0.002)
    child, screen = pty.fork()
    if not child:
        os.chdir(folder)
        os.execve(sys.executable, trials.command(*TRAIN, *SELDOM), environment)
    wait_for(lambda: (folder / "run/metrics.jsonl").is_file())
    time.sleep(rng.uniform(0, 0.5))
    os.close(screen)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, 130), f"It ended with {status}."
    assert (folder / "run/checkpoints/latest").is_file(), "It did not save."
    succeed(folder, *TRAIN, *SELDOM, "--resume")
    last = f"run/checkpoints/step-{STEPS:08}"
    assert_same(result(folder, last), result(whole, last))
    return "before the end" if status else "after the end"


TRIALS = {
    **{name: kill(name) for name in COMMANDS},
    "download": download,
    "terminal closed": terminal,
}
