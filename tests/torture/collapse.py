"""Features are made to collapse: the signals say so within the first tenth of the run."""

from __future__ import annotations

import io
import os
import random
from pathlib import Path
from typing import Any
from unittest.mock import patch

from torture.run import Trial
from torture.trials import inputs

TENTH = 60  # steps
SETTINGS = [
    *("run.dir=run", f"optim.epochs={10 * TENTH // 8}", "run.log_every=2", "optim.warmup_epochs=0"),
    *("data.name=demo", "data.dir=null", "data.limit=64", "data.batch_size=8"),
    *("run.checkpoint_minutes=1000", "run.eval_every_epochs=0"),
]
SOUND = "none of these"
ALONE = ["optim.momentum=[0,0]", "loss.vicreg=0"]  # nothing holds the features apart
WAYS = {
    SOUND: [],
    "lr 1": ["optim.lr=1"],
    "lr 1 without clipping": ["optim.lr=1", "optim.grad_clip=0", "optim.momentum=[0.9,0.9]"],
    "no momentum": [*ALONE, "optim.lr=0.03"],
    "no momentum at lr 0.1": [*ALONE, "optim.lr=0.1"],
    "momentum 0.5": ["loss.vicreg=0", "optim.momentum=[0.5,0.5]", "optim.lr=0.3"],
    "weight decay 1000": ["optim.weight_decay=[1000,1000]", "optim.momentum=[0.9,1]"],
    "dark images": ["model.image_std=[10000,10000,10000]"],
    "equal images": ["data.name=folder", "data.dir=equal"],
    "constant targets": [*ALONE, "optim.lr=0.01"],
    "a loss of the wrong sign": [*ALONE, "optim.lr=0.03"],
}


def to_zero(prediction: Any, target: Any) -> Any:
    return (prediction**2).mean()


def away(prediction: Any, target: Any) -> Any:
    return -((prediction - target) ** 2).mean()


class Tenth(Exception):
    """The first tenth of the run is over."""


def collapse(way: str) -> Trial:
    """The trial of one of the ways."""

    def trial(rng: random.Random, folder: Path) -> str:
        from commands import picture
        from rich.console import Console

        import hjepa_mlx as hj

        inputs(folder)
        os.chdir(folder)
        if way == "equal images":
            Path("equal").mkdir()
            for number in range(200):
                picture().save(f"equal/{number}.png")
        own = {"constant targets": to_zero, "a loss of the wrong sign": away}.get(way)
        config = hj.load_config("tiny.yaml", [*SETTINGS, *WAYS[way], f"seed={rng.randrange(1000)}"])
        plain, said, done = hj.Step.__call__, io.StringIO(), 0

        def call(step: Any, *given: Any) -> Any:
            nonlocal done
            if done == TENTH:
                raise Tenth
            done += 1
            return plain(step, *given)

        with patch.object(hj.Step, "__call__", call):
            try:
                hj.train(config, console=Console(file=said, width=200), loss_fn=own)
            except (Tenth, hj.HJEPAError) as error:
                said.write(f"step {done}: {error}")
        lines = [line for line in said.getvalue().splitlines() if line.startswith("step ")]
        silent = lines[0] == f"step {TENTH}: "
        assert silent == (way == SOUND), f"In {TENTH} steps this was said: {lines[:-1]}"
        return lines[0]

    return trial


TRIALS = {way: collapse(way) for way in WAYS}
