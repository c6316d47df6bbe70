"""A run in progress, and its setup: everything is checked before the run's folder is made."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import mlx.core as mx
import numpy as np
from mlx.utils import tree_reduce
from rich.console import Console

from hjepa_mlx import agreement, backend, pretrained, ranks, runs, world
from hjepa_mlx.config import Config
from hjepa_mlx.costs import costs
from hjepa_mlx.data.folder import RECORD
from hjepa_mlx.data.pipeline import Position, Skipped
from hjepa_mlx.data.source import Source, open_sources
from hjepa_mlx.errors import UsageError, counted
from hjepa_mlx.eval.knn import QuickKNN
from hjepa_mlx.eval.labels import judged
from hjepa_mlx.files import check_space
from hjepa_mlx.longer import last_stage
from hjepa_mlx.losses import LossFn
from hjepa_mlx.masks import Masks, MaskSampler
from hjepa_mlx.meter import Meter
from hjepa_mlx.models.hjepa import HJEPA
from hjepa_mlx.optimizer import by_muon
from hjepa_mlx.progress import say
from hjepa_mlx.recipes import resolve
from hjepa_mlx.runs import Run
from hjepa_mlx.signals import Signals
from hjepa_mlx.step import Step
from hjepa_mlx.timing import settle
from hjepa_mlx.trackers import check_installed

Sampler = Callable[[int, int], Masks]


class Stage(NamedTuple):
    """The part of a run at one image size."""

    config: Config
    sampler: Sampler
    end: int  # steps from the start of the run
    gflop: float  # of an image


@dataclass
class TrainState:
    """A run in progress: its parts, and how far it has come."""

    config: Config
    run: Run
    console: Console
    notes: list[str]  # to be said at the start
    source: Source
    fingerprint: str  # of the source, as it is now: its files may go away
    stages: list[Stage]
    per_epoch: int  # steps
    step: Step
    signals: Signals
    knn: QuickKNN | None
    skipped: Skipped
    own_parts: dict[str, str | None]  # names of the caller's loss_fn, sampler and model
    next_save: float  # on the monotonic clock
    done: int = 0  # steps
    position: Position = field(default_factory=Position)  # in the data, of the next batch
    meter: Meter = field(default_factory=Meter)
    named: int = 0  # skipped images that have been reported
    highest: dict[str, float] = field(default_factory=dict)  # signals so far

    @property
    def total(self) -> int:
        """Steps of the whole run."""
        return self.stages[-1].end

    @property
    def scheduled(self) -> int:
        """The step of the schedules: another than `done` where earlier stages had other batches."""
        return self.done + self.per_epoch * self.config.optim.epochs - self.total

    @property
    def epoch(self) -> float:
        """Passes over the data so far."""
        return self.scheduled / self.per_epoch

    def due(self, every: int) -> bool:
        """Whether the last step is a multiple of `every`, or the end."""
        return self.done == self.total or self.done % every == 0


def setup(
    config: Config,
    resume: bool,
    console: Console,
    loss_fn: LossFn | None = None,
    sampler: Sampler | None = None,
    model: HJEPA | None = None,
) -> TrainState:
    """Check all that was asked for, and build the parts of the run; the arguments are `train`'s."""
    config = resolve(config)
    facts = config.model_dump()
    config, run, place = _reopened(config, resume)
    with agreement.together():
        _check_own_parts(config, loss_fn, sampler, model)
        source, train, test = _sources(config, place)
        per_epoch = steps_per_epoch(config, len(source))
        bank, queries, left_out = judged(train, test)
        facts["the images"] = source.fingerprint
        if not resume:
            runs.check_new(config)
    ranks.check(facts)
    if backend.on_gpu() and "auto" in (config.precision, config.compile):
        say(console, "Trying precisions and compilation …")
    notes = [*settle(config, per_epoch * config.optim.epochs), *source.notes, *left_out]
    backend.set_memory_limits()
    own = {"loss_fn": loss_fn, "sampler": sampler, "model": type(model)}
    model, loaded = pretrained.start(config, model, init=not resume)
    stages = _stages(config, model, sampler, per_epoch)  # refuses a grid that is too small
    mx.random.seed(config.seed)  # whatever was drawn before, by the trials above or the caller
    step, skipped = Step(model, config, loss_fn), Skipped()
    signals = Signals(model, test if len(test) else source, config, skipped, step.loss_fn)
    quick = bank.classes and config.run.eval_every_epochs
    knn = QuickKNN(model, bank, queries, config) if quick else None
    run = _with_folder(run, config, model, source)
    return TrainState(
        config=config,
        run=run,
        console=console,
        notes=[*_introduction(config, model, run, source, test, per_epoch), *loaded, *notes],
        source=source,
        fingerprint=facts["the images"],
        stages=stages,
        per_epoch=per_epoch,
        step=step,
        signals=signals,
        knn=knn,
        skipped=skipped,
        own_parts={kind: _name(part) for kind, part in own.items()},
        next_save=time.monotonic() + 60 * config.run.checkpoint_minutes,
    )


def _reopened(config: Config, resume: bool) -> tuple[Config, Run | None, str | None]:
    """The config, with what the run that is resumed keeps; on rank 0 that run; its folder."""
    with agreement.together():
        run = runs.reopen(config) if resume and world.rank() == 0 else None
    config = ranks.of_rank_0(config)
    place = agreement.values(run and str(run.path))[0]
    return config, run, place and (config.run.dir or place)


def _sources(config: Config, place: str | None) -> tuple[Source, Source, Source]:
    """The images to train on, and those to evaluate with: train and test; place: of the run."""
    opened = open_sources(config.data, Path(place) / RECORD if place else None)
    source = opened["pretrain"]
    config.data.bits = source.bits or config.data.bits
    return source, opened["train"], opened["test"]


def _with_folder(run: Run | None, config: Config, model: HJEPA, source: Source) -> Run:
    """The run that is resumed, or a new one; rank 0 makes its folder, the others know its path."""
    with agreement.together():
        if not run and world.rank() == 0:
            _check_disk(config, model)
            run = runs.create(config, source.folder)
    run = run or Run("")
    run.path = Path(agreement.values(str(run.path))[0])
    return run


def steps_per_epoch(config: Config, images: int) -> int:
    """Updates in one pass over `images`; UsageError if not one batch can be made of them."""
    batch, accumulate = config.data.batch_size, config.optim.accumulate
    if images < batch * accumulate:
        times = f" × optim.accumulate={accumulate}" if accumulate > 1 else ""
        raise UsageError(
            f"data.batch_size={batch}{times} needs at least {batch * accumulate} training images; "
            f"there are {images}."
        )
    return images // (batch * accumulate)


def _stages(config: Config, model: HJEPA, sampler: Sampler | None, per_epoch: int) -> list[Stage]:
    total = per_epoch * config.optim.epochs
    ahead = sum(round(last.epoch * per_epoch) - last.step for last in config.run.history[-1:])
    sizes, shares = zip(*config.stages, strict=True)
    ends = [round(total * share) - ahead for share in np.cumsum(shares)]
    configs = [config.at_size(size) for size in sizes]
    return [
        Stage(at, sampler or MaskSampler(at), end, costs(at, model).gflop)
        for at, end in zip(configs, ends, strict=True)
    ]


def _introduction(
    config: Config, model: HJEPA, run: Run, source: Source, test: Source, per_epoch: int
) -> list[str]:
    ranks = f" on {world.size()} ranks" if world.size() > 1 else ""
    found = [
        f"Training {config.name}{ranks}: {per_epoch * config.optim.epochs} steps, "
        f"run folder {run.path}",
        f"{source.name}: {counted(len(source))} to train on; {len(test):,} to evaluate, "
        f"{counted(len(test.classes), 'class') if test.classes else 'no classes'}.",
    ]
    found += filter(None, [last_stage(config)])
    own = config.with_batch(config.data.batch_size // world.size())
    needed, there = costs(own, model).memory_gb, backend.step_memory_gb()
    if needed > there:
        found.append(
            f"Warning: a step needs about {needed:.1f} GB (estimated) and may take {there:.1f} GB, "
            "so it may be slow or fail. Lower data.batch_size, or set model.checkpoint_blocks=true."
        )
    return found


def _check_own_parts(
    config: Config, loss_fn: LossFn | None, sampler: Sampler | None, model: HJEPA | None
) -> None:
    """Refuse a tracker or loss that cannot work, other grids' masks, another config's network."""
    check_installed(config)
    if loss_fn:
        found = loss_fn(mx.ones((2, 3, 4)), mx.zeros((2, 3, 4)))
        if not isinstance(found, mx.array) or found.size != 1:
            raise UsageError("loss_fn must return one number, an mx.array, for [B, n, D] arrays.")
    if sampler:
        masks = sampler(0, config.data.batch_size * config.masks.per_image)
        if max(masks.context.max(), masks.targets.max()) >= config.grid**2:
            raise UsageError(
                f"The sampler's masks do not fit the grid of {config.grid}×{config.grid} patches. "
                "Make it from this config."
            )
        if config.view_grid and masks.views is None:
            raise UsageError(
                "The sampler gives no views, from which the image level is predicted. Take them "
                "from MaskSampler's masks, or set views.count to 0."
            )
        if config.data.progressive:
            raise UsageError("data.progressive needs masks for each image size: give no sampler.")
    its = model.config if model else config
    for key, theirs, ours in (
        ("model", *(c.model.model_copy(update={"init": None}) for c in (its, config))),
        ("data.image_size", its.data.image_size, config.data.image_size),
        ("the levels that loss.level_weights predicts", its.predicted, config.predicted),
        ("views", its.view_grid, config.view_grid),
    ):
        if theirs != ours:
            raise UsageError(
                f"The model to start from was built from another config: {key} differs. Build it "
                "from this one: hj.HJEPA(config)."
            )


def _name(own_part: Callable | None) -> str | None:
    if own_part in (None, type(None), HJEPA):
        return None
    return getattr(own_part, "__qualname__", type(own_part).__qualname__)


def _check_disk(config: Config, model: HJEPA) -> None:
    """Refuse to start a run whose checkpoints, with the one being written, the disk cannot hold."""
    weights = tree_reduce(lambda total, w: total + w.nbytes, model.parameters(), 0)
    moments = 2 * tree_reduce(lambda total, w: total + w.nbytes, model.trainable_parameters(), 0)
    moments -= sum(weight.nbytes for weight in by_muon(config, model))  # it keeps one
    needed = (weights + moments) * (config.run.keep_last + 1)
    advice = "Free some, choose another --run-dir, or lower run.keep_last."
    check_space("The run's checkpoints need", needed, Path(config.run.dir or "runs"), advice)
