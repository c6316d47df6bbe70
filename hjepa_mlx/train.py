"""Training is a loop: evaluate, step, report, save."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator
from contextlib import ExitStack, closing
from typing import Any

import mlx.core as mx
import numpy as np
from rich.console import Console

from hjepa_mlx import agreement, backend, world
from hjepa_mlx.config import Config
from hjepa_mlx.data.pipeline import Position, training_batches
from hjepa_mlx.data.storage import StorageError
from hjepa_mlx.errors import HJEPAError
from hjepa_mlx.files import locked
from hjepa_mlx.losses import LossFn
from hjepa_mlx.masks import Masks
from hjepa_mlx.models.hjepa import HJEPA
from hjepa_mlx.progress import lasting_console, say, training_bar
from hjepa_mlx.runs import Run
from hjepa_mlx.saving import check_finite, restore, save, save_after_loss, share, stopped
from hjepa_mlx.session import awake, interruptible, watched
from hjepa_mlx.signals import EVERY, highest, reading, warnings
from hjepa_mlx.state import Sampler, Stage, TrainState, setup
from hjepa_mlx.step import Metrics, Schedule, random_key, reseed, schedule
from hjepa_mlx.trackers import logging

Write = Callable[[dict[str, Any]], None]  # a row
Inputs = list[tuple[mx.array, Masks]]  # of one step: images and masks of each accumulated batch


class Interrupted(Exception):
    """The user asked to stop; the run was saved."""


def train(
    config: Config,
    resume: bool = False,
    console: Console | None = None,
    loss_fn: LossFn | None = None,
    sampler: Sampler | None = None,
    model: HJEPA | None = None,
) -> Run:
    """Train as `config` says, from the start or (`resume`) from the run's newest checkpoint.

    loss_fn: your own prediction loss, from prediction and target [B, n, D] to a number.
    sampler: your own masks, from the batch's number and how many to draw (see `MaskSampler`).
    model: the network to start from, built from this config (another run's weights, a subclass).
    Everything is checked before the run folder is made. A Ctrl-C, SIGTERM or closed terminal saves
    a checkpoint and raises Interrupted. Other failures raise HJEPAError or UsageError, one line.
    """
    console = console or lasting_console()
    with ExitStack() as inside:
        beat: Callable[[], None] = lambda: None  # noqa: E731
        if world.backend():  # before the ranks connect
            beat = inside.enter_context(watched(60 * config.run.rank_timeout_minutes))
            console = Console(quiet=True) if world.rank() else console
        state = setup(config, resume, console, loss_fn, sampler, model)
        with agreement.together():
            if world.rank() == 0:
                inside.enter_context(locked(state.run.path / ".lock", str(state.run.path)))
                restore(state)
        if world.size() > 1:
            share(state)
        fit(state, beat)
    return state.run


def fit(state: TrainState, beat: Callable[[], None] = lambda: None) -> None:
    """Evaluate, step, report, save, until all steps are done or the user asks to stop.

    Every rank steps; rank 0 alone evaluates, reports and saves. beat: called after each step.
    """
    c, leads = state.config, world.rank() == 0
    previous: Metrics = {}
    work, undo, stop = _work(state.stages), undoing(state), False
    bar = training_bar(state.console, c.optim.epochs, state.total, state.done, work)
    with (
        closing(inputs(state)) as steps,
        logging(state.run, state.console, c.run.trackers if leads else []) as write,
        interruptible(leads) as interrupt,
        awake(),
        bar as show,
    ):
        begin(state, write)
        try:
            for batches, position in steps:
                values = schedule(c, state.scheduled, state.per_epoch * c.optim.epochs)
                metrics = state.step(batches, values)
                mx.eval(previous)  # at most one step is in flight
                previous = metrics
                state.done, state.position, undo = state.done + 1, position, undoing(state)
                state.meter.add(metrics)
                beat()
                log(state, values, show, write)
                due = time.monotonic() > state.next_save or state.done == state.total
                stop, due = agreement.anywhere(interrupt.wanted, due)
                if stop or due:
                    gather_skipped(state)
                    with agreement.together():
                        save(state)
                if stop:
                    break
        except StorageError as error:
            raise HJEPAError(f"{error} {save_after_loss(state, 'When it is back')}") from error
        except RuntimeError as error:
            if world.size() == 1:
                raise
            undo()  # nothing else has changed in the step that was not completed
            lost = f"Rank {world.rank()} has lost another one ({error})."
            raise HJEPAError(f"{lost} {save_after_loss(state, 'Go on with')}") from error
        finally:
            name_skipped(state)
    if stop or interrupt.wanted:
        raise Interrupted(stopped(state))
    for line in reading(state.run.last_stage) if leads else ():
        say(state.console, line)


def undoing(state: TrainState) -> Callable[[], None]:
    """Takes back what a step changes before all ranks have completed it."""
    key, moments = random_key(), {**state.step.moments}

    def undo() -> None:
        reseed(key)
        state.step.moments.update(moments)

    return undo


def begin(state: TrainState, write: Write) -> None:
    """Say what is about to be done; write down the signals before the first step."""
    for line in state.notes:
        say(state.console, line)
    if world.rank() == 0 and not state.run.metrics:
        own = {"own_parts": state.own_parts} if any(state.own_parts.values()) else {}
        write({"step": 0, "epoch": 0.0, **own, **state.signals()})
    state.highest = {} if world.rank() else highest(state.run.metrics)
    state.meter.start()


def log(state: TrainState, values: Schedule, show: Write, write: Write) -> None:
    """Report and evaluate where that is due; write it down."""
    row = report(state, values)
    if row:
        gather_skipped(state)
    if world.rank():
        return
    row |= evaluate(state)
    if row:
        row = {"step": state.done, "epoch": round(state.epoch, 4), **row}
        write(row)
    if "loss" in row:
        show(row)
        state.meter.start()
    name_skipped(state)


def inputs(state: TrainState) -> Generator[tuple[Inputs, Position], None, None]:
    """Inputs of each step that is left, and the place in the data after them, stage by stage."""
    accumulate = state.config.optim.accumulate
    count = state.config.data.batch_size * state.config.masks.per_image
    for config, sampler, end, _ in state.stages:
        if state.done >= end:
            continue
        if len(state.stages) > 1:
            size = config.data.image_size
            say(state.console, f"Up to step {end}: images of {size}×{size}.")
        batches = training_batches(state.source, config, state.position, state.skipped)
        with closing(batches):
            while state.done < end:
                found: Inputs = []
                for number in range(accumulate * state.done, accumulate * (state.done + 1)):
                    batch = next(batches)
                    masks = sampler(number, count)
                    found.append((mx.array(batch.images), masks.rows(world.rows(count))))
                yield found, batch.next


def report(state: TrainState, values: Schedule) -> dict[str, Any]:
    """The training metrics since the last report, when one is due."""
    c = state.config
    if not state.due(c.run.log_every):
        return {}
    state.meter.read(state.done, state.run.latest)
    return {
        **state.meter.take_mean(),
        **values._asdict(),
        "images_per_second": state.meter.rate(c.data.batch_size * c.optim.accumulate),
        "peak_memory_gb": round(mx.get_peak_memory() / backend.GB, 3),
    }


def evaluate(state: TrainState) -> dict[str, float]:
    """Collapse signals and k-NN, when they are due; a warning when the features collapse."""
    c = state.config.run
    row: dict[str, float] = {}
    looks = state.due(EVERY * c.log_every)
    judges = state.knn and state.scheduled % (state.per_epoch * c.eval_every_epochs) == 0
    with state.meter.paused():
        if looks or judges:
            check_finite(state)
        if looks:
            row = state.signals()
            for warning in warnings(state.highest, row, state.config.predicted):
                say(state.console, f"step {state.done}: {warning}", style="yellow")
            state.highest = highest([state.highest, row])
        if state.knn and judges:
            try:
                row |= state.knn()
            except StorageError:
                raise
            except HJEPAError as error:  # too many unreadable images, for one
                say(state.console, f"No more k-NN: {error}", style="yellow")
                state.knn = None
    return row


def gather_skipped(state: TrainState) -> None:
    """Let rank 0 know of images that the others could not read."""
    new = list(state.skipped.items())[state.named :] if world.rank() else []
    state.named += len(new)
    found = agreement.values(new)
    for others in [] if world.rank() else found[1:]:
        state.skipped |= dict(others)


def name_skipped(state: TrainState) -> None:
    """Report images that could not be read since the last call; skipped.txt names them all."""
    if world.rank():
        return
    items = list(state.skipped.items())[state.named :]
    state.named += len(items)
    if new := state.run.log_skipped(items):
        more = f" and {len(new) - 1} more" if len(new) > 1 else ""
        say(
            state.console,
            f"Skipped {new[0][0]} ({new[0][1]}){more}; {len(state.skipped)} unreadable so far, "
            "all in skipped.txt.",
        )


def _work(stages: list[Stage]) -> Callable[[int], float]:
    """GFLOP of the first so many steps: those with small images are done sooner."""
    ends = [0, *(stage.end for stage in stages)]
    work = np.cumsum([0.0, *(np.diff(ends) * [stage.gflop for stage in stages])])
    return lambda step: float(np.interp(step, ends, work))
