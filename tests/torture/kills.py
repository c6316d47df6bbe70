"""Commands are killed at any moment, and repeated until done: the result is the undisturbed one."""

import random
from pathlib import Path


def nothing(rng: random.Random, folder: Path) -> str:
    assert not list(folder.iterdir())
    return "looked at an empty folder"


TRIALS = {"nothing": nothing}
