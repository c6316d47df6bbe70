"""The disk is full, broken, slow or gone; the folder of a run is moved, copied, opened twice."""

from __future__ import annotations

import errno
import os
import random
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torture import kills, trials
from torture.kills import COMMANDS
from torture.run import Trial
from torture.trials import (
    TRAIN,
    assert_one_line,
    assert_same,
    ended,
    hjepa,
    inputs,
    log_of,
    result,
    start,
    succeed,
    wait_for,
)

ERRORS = (errno.ENOSPC, errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.ESTALE)
RESUME = (*TRAIN, "--resume")


def same_run(folder: Path) -> None:
    whole = COMMANDS["training"].undisturbed("training")
    assert_same(result(folder, "run"), result(whole, "run"))


def fail(name: str) -> Trial:
    """The disk refuses everything from some moment on; then it is well again."""
    what = COMMANDS[name]

    def trial(rng: random.Random, folder: Path) -> str:
        whole = what.undisturbed(name)
        what.put(folder)
        log, number = log_of(whole), rng.choice(ERRORS)
        at = kills.moment(rng, log)
        before = {"root": what.root, "hooks": what.hooks, "fails": (at, number)}
        ended = hjepa(folder, *what.arguments(folder), **before)
        if ended.returncode:
            assert_one_line(ended, os.strerror(number))
        if not what.done(folder):
            what.run(folder)
        assert_same(result(folder, what.root), result(whole, what.root))
        return f"{errno.errorcode[number]} from operation {at} of {len(log)} on"

    return trial


def each_write(rng: random.Random, folder: Path) -> str:
    """The disk is full at each single write of one save; the checkpoint before it stays whole."""
    from torture.traced import Tracer, hook

    import hjepa_mlx as hj
    from hjepa_mlx import checkpoint

    inputs(folder)
    os.chdir(folder)
    run = hj.train(hj.load_config("tiny.yaml", ["run.dir=run", "optim.epochs=1"]))
    step = hj.Step(hj.load(run.path), run.config)
    state = checkpoint.restore(run.latest, step)
    before = result(run.latest, ".")
    tracer = Tracer("run", fails=(0, errno.ENOSPC))
    hook(tracer)
    for at in range(10_000):
        tracer.count, tracer.how["fails"] = 0, (at, errno.ENOSPC)
        said = ""
        try:
            checkpoint.save(run.checkpoints, step, 99, state, 3)
        except hj.HJEPAError as error:
            said = str(error)
        newest, left = run.latest, list(run.checkpoints.glob(".*"))
        assert not left, f"The failed save left {left}."
        assert newest is not None
        if newest.name == "step-00000099":  # whole, though nothing that came after it was
            checkpoint.restore(newest, step)
            shutil.rmtree(newest)
        else:
            assert result(newest, ".") == before, "The checkpoint before is not the same any more."
        if not said:
            return f"full at each of the {at} operations of a save"
        for part in ("No space left", str(newest), "--resume"):
            assert part in said, said
    raise AssertionError("The save never succeeded.")


@contextmanager
def training(folder: Path, **traced: float) -> Iterator[subprocess.Popen]:
    """A training that has begun to save."""
    with start(folder, *TRAIN, **{"root": "run", "slow": 0.002, **traced}) as process:
        wait_for(lambda: list(folder.glob("run/checkpoints/step-*")) or process.poll() is not None)
        yield process
        process.kill()


def moved(rng: random.Random, folder: Path) -> str:
    """The folder of a run is moved away, or removed, as it trains."""
    inputs(folder)
    removed = rng.random() < 0.3
    with training(folder) as process:
        time.sleep(rng.uniform(0, 1))
        (folder / "run").rename(folder / "elsewhere")
        result_of = ended(process)
    if result_of.returncode:
        assert_one_line(result_of, "No such file")
    assert not (folder / "run").exists(), "A second folder was made."
    if removed:
        shutil.rmtree(folder / "elsewhere")
        assert_one_line(hjepa(folder, *RESUME), "run is not a run")
        succeed(folder, *TRAIN)
    else:
        (folder / "elsewhere").rename(folder / "run")
        succeed(folder, *RESUME)
    same_run(folder)
    return "removed" if removed else "moved away and back"


def opened_twice(rng: random.Random, folder: Path) -> str:
    """Another training of the same folder is refused, and harms nothing."""
    inputs(folder)
    with training(folder) as process:
        other = hjepa(folder, *rng.choice([TRAIN, RESUME]))
        still = process.poll() is None
        one = ended(process)
    if still:
        assert_one_line(other, "run")
    assert one.returncode == 0, one.stderr
    same_run(folder)
    return f"the other one said: {other.stderr.strip().splitlines()[-1]}"


def started_twice(rng: random.Random, folder: Path) -> str:
    """Two commands begin the same new run at the same moment: one does it."""
    inputs(folder)
    own = [(*TRAIN, "--set", f"seed={seed}") for seed in (1, 0)]
    rng.shuffle(own)
    late = rng.choice([0, 0.02])
    both = [start(folder, *one, root="run", slow=late) for one in own]
    done = [ended(process) for process in both]
    won = [one for one in done if one.returncode == 0]
    assert len(won) == 1, f"{len(won)} of them ended well: {[one.stderr for one in done]}"
    assert_one_line(next(one for one in done if one is not won[0]), "run")
    its = won[0].args[-1].replace("=", ": ")
    assert f"\n{its}\n" in (folder / "run/config.yaml").read_text(), f"{its} is not in config.yaml."
    if its == "seed: 0":
        same_run(folder)
    return f"{its} was trained"


def copied(rng: random.Random, folder: Path) -> str:
    """A copy made while the run goes on can go on, too."""
    inputs(folder)
    with training(folder, slow=0.001) as process:
        time.sleep(rng.uniform(0, 1.5))
        subprocess.run(["cp", "-r", folder / "run", folder / "copy"], capture_output=True)
        assert ended(process).returncode == 0
    shutil.rmtree(folder / "run")
    (folder / "copy").rename(folder / "run")
    damaged = 0
    while (again := hjepa(folder, *RESUME)).returncode:
        damaged += 1
        assert damaged < 4, again.stderr
        assert_one_line(again, "is damaged", "Delete that folder")
        shutil.rmtree(folder / again.stderr.split("Checkpoint ")[1].split(" is damaged")[0])
    rows = trials.rows(folder / "run")
    assert rows == trials.rows(COMMANDS["training"].undisturbed("training") / "run")
    return f"its copy went on, {damaged} checkpoints cut by the copying deleted as it said"


def read_only(rng: random.Random, folder: Path) -> str:
    """Nothing can be written where the run lies."""
    trials.with_run(folder)
    disk = folder / "disk"
    disk.mkdir()
    root = os.geteuid() == 0
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", disk]
    if root and subprocess.run(mount, capture_output=True).returncode:
        return "not tried: this root may write everywhere and cannot mount a disk"
    try:
        shutil.move(folder / "run", disk / "run")
        if root:
            subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        else:
            subprocess.run(["chmod", "-R", "a-w", disk], check=True)
        for line in ("train disk/run --resume", "export disk/run --to safetensors"):
            assert_one_line(hjepa(folder, *line.split()), "disk/run")
        full = ("export", "disk/run", "--to", "safetensors", "--out", "elsewhere")
        succeed(folder, *full)
    finally:
        subprocess.run(["umount", disk] if root else ["chmod", "-R", "u+w", disk], check=True)
    return "mounted read-only" if root else "without the right to write"


def slow(rng: random.Random, folder: Path) -> str:
    inputs(folder)
    succeed(folder, *TRAIN, root="run", slow=0.004)
    same_run(folder)
    return "4 ms more for each operation"


TRIALS = {
    "full at each write of a save": each_write,
    **{f"refuses {name}": fail(name) for name in COMMANDS},
    "read-only": read_only,
    "moved": moved,
    "opened twice": opened_twice,
    "started twice": started_twice,
    "copied": copied,
    "slow": slow,
}
