"""A run that fits the hours given: epochs of any recipe, and the whole of the recipe my-folder.

The hours are those of the whole command: measuring, training at the pace that was measured, and the
evaluation, which is tried beforehand. The choices for my-folder are rules of thumb from this
project's recipes, not measured optima.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from contextlib import suppress

import numpy as np

from hjepa_mlx import backend, signals
from hjepa_mlx.bench import machine
from hjepa_mlx.bench.run import USUAL_MFU
from hjepa_mlx.config import Config
from hjepa_mlx.costs import average_gflop, costs
from hjepa_mlx.data.images import UNREADABLE, opened
from hjepa_mlx.data.source import Source, open_sources
from hjepa_mlx.errors import HJEPAError, UsageError, counted
from hjepa_mlx.eval.evaluation import evaluate
from hjepa_mlx.eval.knn import BANK, QUERIES
from hjepa_mlx.eval.labels import NoTestImages
from hjepa_mlx.models.hjepa import HJEPA
from hjepa_mlx.progress import duration
from hjepa_mlx.recipes import load_config
from hjepa_mlx.state import steps_per_epoch
from hjepa_mlx.timing import settle

OWN, HOURS = "my-folder", 8.0
LOOKED_AT = 64  # images whose size is read
# Least short side of the images → size and patch to train at, as the recipes of such images
SIZES = ((160, 224, 16), (112, 128, 16), (80, 96, 8), (56, 64, 8), (0, 32, 4))
SMALLER = 128  # pixels: where 224 would be too slow
NETWORKS = {"small": (192, 6), "tiny": (128, 4), "nano": (64, 2)}  # predictor's width and depth
FEW = 10_000  # images: with fewer, no larger network than tiny
ENOUGH, MOST = 100, 800  # epochs that a network must reach to be chosen; that any is trained
BATCHES = (128, 64, 32, 16, 8)
LEAST_STEPS = 4  # of an epoch, or the batch gets smaller
FEW_STEPS = 5000  # of a run: its target encoder has to follow faster
SHORTEST, LONGEST = 5.0, 20.0  # seconds of measuring steps, within which they are a fiftieth
LONGEST_STEP = 2.0  # seconds, of a step in the measurement
LOOKS = 10  # of k-NN in a run, at most
TRIED = 2000  # training images of the evaluation that is tried
EXACT = 5  # epochs; for fewer, `data.limit` makes the time right


def fit_hours(
    recipe: str,
    overrides: Sequence[str],
    data_dir: str | None,
    hours: float,
    tell: Callable[[str], None] = print,
) -> tuple[list[str], list[str]]:
    """Settings that make a recipe take `hours` on this machine, and lines that explain them.

    overrides: the user's, which stay. Measures for some seconds, and tells so before. Raises
    UsageError when not even one step fits.
    """
    began = time.monotonic()
    if not 0 < hours < math.inf:
        raise UsageError(f"--hours {hours}: it must be above 0.")
    sources = open_sources(_config(recipe, overrides, data_dir).data)
    source, test = sources["pretrain"], sources["test"]
    if len(source) < BATCHES[-1]:
        few = f"{source.name}: {counted(len(source))} to train on"
        raise UsageError(f"{few}; that is too few, as a batch takes at least {BATCHES[-1]}.")
    tell("Trying this machine's speed …")
    budget, lines, settings = 3600 * hours, [], []
    if recipe == OWN:
        sides = _short_sides(source)
        settings = _network(recipe, overrides, source, sides, budget)
        low, middle, high = np.percentile(sides, (0, 50, 100))
        lines.append(f"{counted(len(source))}, short side {low:.0f} to {high:.0f} pixels "
                     f"(median {middle:.0f}).")  # fmt: skip
    config = _config(recipe, [*settings, *overrides], data_dir)
    settle(config, 1)
    rate = _rate(source, config, min(LONGEST, max(SHORTEST, budget / 50)))
    evaluation, (beside, looks) = _evaluation(config, source, test), _looks(config, source, test)
    left = budget - evaluation - (time.monotonic() - began)
    batch = config.data.batch_size * config.optim.accumulate
    if (steps := (left * rate - looks) / batch / (1 + beside)) < 1:
        least = (budget - left + (looks + batch * (1 + beside)) / rate) / 3600
        words = "too short for measuring, evaluation and one step"
        raise UsageError(f"--hours {hours:g} is {words}; give at least {1.1 * least:.3f}.")
    passes = steps / steps_per_epoch(config, len(source))
    settings += _length(config, min(passes, MOST if recipe == OWN else math.inf), len(source))
    config = _config(recipe, [*settings, *overrides], data_dir)
    images = min(len(source), config.data.limit or len(source))
    seen = config.optim.epochs * steps_per_epoch(config, images) * batch
    training = (seen * (1 + beside) + looks) / rate
    lines.append(f"For {hours:g} h: {' '.join(settings)}. Change any with --set.")
    lines.append(
        f"Measured: {rate:.1f} images/s. Training takes about {duration(training)}, evaluation "
        f"{duration(evaluation)}."
    )
    return settings, lines


def _config(recipe: str, settings: Sequence[str], data_dir: str | None) -> Config:
    config = load_config(recipe, [*settings])
    config.data.dir = data_dir or config.data.dir  # no setting: a folder's name may be no YAML
    return config


def _short_sides(source: Source) -> np.ndarray:
    """The shorter sides of some images, in pixels."""
    sides = []
    for row in source.rows[:: max(1, len(source) // LOOKED_AT)]:
        try:
            image = source.images.read(int(row))
            if isinstance(image, bytes):
                with opened(image) as picture:
                    sides.append(min(picture.size))
            else:
                sides.append(min(image.shape[:2]))
        except UNREADABLE:
            continue  # training will name it
    if not sides:
        raise HJEPAError(f"{source.name}: none of the images looked at can be read.")
    return np.array(sides)


def _network(
    recipe: str, given: Sequence[str], source: Source, sides: np.ndarray, budget: float
) -> list[str]:
    """Settings of the largest network that gets ENOUGH epochs: image size, network, batch, rate."""
    side = np.percentile(sides, 25)
    size, patch = next((size, patch) for least, size, patch in SIZES if side >= least)
    speed = USUAL_MFU * machine.matmul_gflops()
    names = list(NETWORKS)[len(source) < FEW :]
    tries = [(name, size) for name in names]
    if size > SMALLER:
        tries[len(tries) - 1 :] = [("tiny", SMALLER), ("nano", SMALLER)]
    for name, pixels in tries:
        width, depth = NETWORKS[name]
        settings = [f"data.image_size={pixels}", f"model.patch_size={patch}", f"model.size={name}",
                    f"model.predictor_dim={width}", f"model.predictor_depth={depth}"]  # fmt: skip
        config = load_config(recipe, [*settings, *given])
        networks = HJEPA(config)
        if budget * speed / costs(config, networks).gflop >= ENOUGH * len(source):
            break
    for batch in BATCHES:
        fits = costs(config.with_batch(batch), networks).memory_gb < backend.step_memory_gb()
        if fits and len(source) >= LEAST_STEPS * batch:
            break
    lr = min(1e-3, 5e-4 * (batch / 16) ** 0.5)  # as demo (16) and imagenet100 (128)
    return [*settings, f"data.batch_size={batch}", f"optim.lr={lr:.2g}"]


def _rate(source: Source, config: Config, seconds: float) -> float:
    """Images per second of steps and pipeline together, measured with steps that are short."""
    config = config.model_copy(deep=True)
    networks = HJEPA(config)
    average = average_gflop(config, networks)
    guess = USUAL_MFU * machine.matmul_gflops() / average
    while config.data.batch_size > max(2.0, LONGEST_STEP * guess):
        config.data.batch_size //= 2
    rate, _ = machine.time_end_to_end(source, config, seconds)
    return rate * costs(config, networks).gflop / average


def _evaluation(config: Config, source: Source, test: Source) -> float:
    """Seconds of the evaluation, tried with a new network and at most TRIED training images."""
    config = config.model_copy(deep=True)
    images = config.data.limit = min(TRIED, len(source))
    began = time.monotonic()
    with suppress(NoTestImages):
        if config.run.final_eval:
            evaluate(HJEPA(config))
    whole = (len(source) + len(test)) / (images + len(test))
    return whole * (time.monotonic() - began)


def _looks(config: Config, source: Source, test: Source) -> tuple[float, float]:
    """The work beside the steps, in images trained on: signals for each image, k-NN in all."""
    networks = HJEPA(config)
    relative = costs(config, networks).parts["target"].gflop / average_gflop(config, networks)
    images = config.data.batch_size * config.optim.accumulate * config.run.log_every
    shown = min(signals.IMAGES, len(test) or len(source)) / (signals.EVERY * images)
    judged = source.classes and config.run.eval_every_epochs
    whole = LOOKS * (min(BANK, len(source)) + min(QUERIES, len(test))) if judged else 0
    return relative * shown, relative * whole


def _length(config: Config, passes: float, images: int) -> list[str]:
    """Settings of the schedule for so many passes over the images."""
    epochs = round(passes) if passes >= EXACT else math.ceil(passes)
    limit = images if passes >= EXACT else int(images * passes / epochs)
    limit = max(limit, config.data.batch_size * config.optim.accumulate)
    steps = epochs * steps_per_epoch(config, limit)
    warm_up = min(config.optim.warmup_epochs, epochs / 10)
    found = [f"optim.epochs={epochs}", f"optim.warmup_epochs={warm_up:g}"]
    found += [f"data.limit={limit}"] if limit < images else []
    found += ["optim.momentum=[0.99,1.0]"] if steps < FEW_STEPS else []
    every = max(config.run.eval_every_epochs, math.ceil(epochs / LOOKS))
    return [*found, f"run.eval_every_epochs={every}"] if config.run.eval_every_epochs else found
