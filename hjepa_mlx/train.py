"""The training loop: check everything, then evaluate, step, report, save."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from shlex import quote
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_reduce
from rich.console import Console

from hjepa_mlx import backend, checkpoint, runs
from hjepa_mlx.config import Config
from hjepa_mlx.costs import costs
from hjepa_mlx.data.pipeline import Position, Skipped, training_batches
from hjepa_mlx.data.source import open_source
from hjepa_mlx.data.storage import StorageError
from hjepa_mlx.errors import HJEPAError, UsageError
from hjepa_mlx.eval.evaluation import check_evaluable
from hjepa_mlx.eval.knn import QuickKNN
from hjepa_mlx.files import check_space, locked
from hjepa_mlx.masks import Masks, MaskSampler
from hjepa_mlx.models.hjepa import HJEPA, Origin
from hjepa_mlx.progress import Reporter, lasting_console, say
from hjepa_mlx.recipes import resolve
from hjepa_mlx.runs import Run
from hjepa_mlx.session import Interrupt, awake, interruptible
from hjepa_mlx.signals import Signals, reading, warnings
from hjepa_mlx.step import LossFn, Metrics, Schedule, Step, schedule
from hjepa_mlx.timing import settle
from hjepa_mlx.window import Window

Sampler = Callable[[int, int], Masks]


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

    loss_fn: a prediction loss of your own, from prediction and target [B, n, D] to a number.
    sampler: masks of your own, from the batch's number and how many to draw (see `MaskSampler`).
    model: the network to start from, built from this config (another run's weights, a subclass).
    Everything is checked before the run folder is made. Raises Interrupted after a Ctrl-C, with a
    checkpoint saved, as after SIGTERM and a closed terminal; HJEPAError or UsageError with one
    readable line for what else is foreseen.
    """
    return Training(config, resume, console or lasting_console(), loss_fn, sampler, model).fit()


def steps_per_epoch(config: Config, images: int) -> int:
    """Updates in one pass over `images`; refuses a batch that is larger than the data set."""
    effective = config.data.batch_size * config.optim.accumulate
    if images < effective:
        raise UsageError(
            f"data.batch_size={config.data.batch_size}"
            + (
                f" × optim.accumulate={config.optim.accumulate}"
                if config.optim.accumulate > 1
                else ""
            )
            + f" needs at least {effective} training images; there are {images}."
        )
    return images // effective


class Training:
    """One run in progress."""

    def __init__(
        self,
        config: Config,
        resume: bool,
        console: Console,
        loss_fn: LossFn | None = None,
        sampler: Sampler | None = None,
        model: HJEPA | None = None,
    ) -> None:
        self.config = config = resolve(config)
        self.console = console
        subclass = None if model is None or type(model) is HJEPA else type(model)
        parts = {"loss_fn": loss_fn, "sampler": sampler, "model": subclass}
        self.own_parts = {kind: _name(part) for kind, part in parts.items()}
        _check_own(loss_fn, sampler, config)
        if model is not None:
            _check_built_from(model, config)
        if sampler and config.data.progressive:
            raise UsageError("data.progressive needs masks for each image size: give no sampler.")
        sizes = [config.at_size(size) for size, _ in config.stages]
        self.stages = [(at, sampler or MaskSampler(at)) for at in sizes]
        self.train_source = open_source(config.data, "pretrain")
        self.test_source = open_source(config.data, "test")
        self.per_epoch = steps_per_epoch(config, len(self.train_source))
        self.total = self.per_epoch * config.optim.epochs
        self.labelled = open_source(config.data, "train")
        check_evaluable(self.labelled, self.test_source)
        self.skipped = Skipped()
        self._named: set[str] = set()
        self.resumed = runs.reopen(config) if resume else None
        if not resume:
            runs.check_new(config)
        if backend.on_metal() and "auto" in (config.precision, config.compile):
            self._say("Trying precisions and compilation for a few seconds …")
        self._settled = settle(config)
        backend.set_memory_limits()
        self.model = HJEPA(config) if model is None else model
        mx.random.seed(config.seed)  # whatever was drawn before, by the trials above or the caller
        self.step = Step(self.model, config, loss_fn)
        self.signals = Signals(
            self.model, self.test_source, config, self.skipped, self.step.loss_fn
        )
        self.knn: QuickKNN | None = None
        if self.labelled.classes and config.run.eval_every_epochs:
            self.knn = QuickKNN(self.model, self.labelled, self.test_source, config)
        shares = np.cumsum([share for _, share in config.stages])
        self.ends = [round(self.total * share) for share in shares]  # of the stages, in steps
        gflop = [1.0]  # of a step of each stage; one stage needs no comparison
        if len(self.stages) > 1:
            gflop = [costs(at, self.model).gflop for at, _ in self.stages]
        self._work_at_ends = np.cumsum([0, *(np.diff([0, *self.ends]) * gflop)])
        self.done = 0  # steps
        self.position = Position()
        self.window = Window()
        self._told_of_share = False
        self._saved = time.monotonic()

    def fit(self) -> Run:
        """Make the run's folder, or go on from its newest checkpoint, and train to the end."""
        if not self.resumed:
            _check_disk(self.config, self.model)
        self.run = self.resumed or runs.create(self.config)
        with locked(self.run.path / ".lock", str(self.run.path)):
            self._restore()
            if self.run.config != self.config:  # in what a resumed run may change
                self.run.store(self.config)
            self._fit()
        return self.run

    def _restore(self) -> None:
        newest, rows = self.run.latest, self.run.metrics
        if newest is None:
            if rows:
                self._check_parts(rows[0].get("own_parts", dict.fromkeys(self.own_parts)))
            self.run.forget_after(-1)
            return
        self._check_parts(checkpoint.read_state(newest)["own_parts"])
        state = checkpoint.restore(newest, self.step)
        if state["images"] != len(self.train_source):
            raise UsageError(
                f"{self.run.path} was trained on {state['images']} images; now there are "
                f"{len(self.train_source)} in {self.train_source.name}. Give the same --data-dir."
            )
        self.done, self.position = state["step"], Position(*state["position"])
        self.window.metrics = state["window"]
        self.run.forget_after(self.done)
        self._say(f"Resuming {self.run.path} at step {self.done} of {self.total}.")

    def _check_parts(self, before: dict[str, str | None]) -> None:
        if before != self.own_parts:
            raise UsageError(
                f"{self.run.path} was trained with {before}, not with {self.own_parts}: resume it "
                "by hj.train(…, resume=True) with the same ones."
            )

    def _fit(self) -> None:
        self._began, self._first = time.monotonic(), self.done
        epochs = self.config.optim.epochs
        reporter = Reporter(self.console, epochs, self.total, self.done, self._work)
        self._say(f"Training {self.config.name}: {self.total} steps, run folder {self.run.path}")
        self._say(
            f"{self.train_source.name}: {len(self.train_source):,} images to train on; "
            f"{len(self.test_source):,} to evaluate, "
            f"{len(self.test_source.classes) or 'no'} classes."
        )
        for line in self._settled:
            self._say(line)
        needed, there = costs(self.config, self.model).memory_gb, backend.step_memory_gb()
        if needed > there:
            self._say(
                f"A step needs about {needed:.1f} GB (estimated) and may take {there:.1f}: it may "
                "be slow, or fail. Lower data.batch_size, or set model.checkpoint_blocks=true.",
                style="yellow",
            )
        if not self.run.metrics:
            own = {"own_parts": self.own_parts} if any(self.own_parts.values()) else {}
            self.run.log({"step": 0, "epoch": 0.0, **own, **self.signals()})
        first_signals = self.run.metrics[0]
        with interruptible() as interrupt, awake(), reporter:
            self.window.begin()
            try:
                self._loop(reporter, interrupt, first_signals)
            except StorageError as lost:
                raise HJEPAError(f"{lost} {self._save_what_there_is()}") from lost
            finally:
                self._name_skipped()
        if interrupt.wanted:
            what = f"hjepa-mlx eval {quote(str(self.run.path))}"
            raise Interrupted(f"Trained and saved. Evaluate with: {what}")
        for line in reading(self.run.last_stage):
            self._say(line)

    def _work(self, step: int) -> float:
        """What the first `step` steps cost, beside one another: small images are done sooner."""
        return float(np.interp(step, [0, *self.ends], self._work_at_ends))

    def _loop(self, reporter: Reporter, interrupt: Interrupt, first: dict[str, Any]) -> None:
        for (config, sampler), end in zip(self.stages, self.ends, strict=True):
            if self.done >= end:
                continue
            if len(self.stages) > 1:
                size = config.data.image_size
                self._say(f"Up to step {end}: images of {size}x{size}.")
            batches = training_batches(self.train_source, config, self.position, self.skipped)
            with closing(batches):
                for metrics, values in self._steps(batches, sampler, end):
                    self.window.add(metrics)
                    self._report(reporter, values, first)
                    if interrupt.wanted:
                        self.save()
                        raise Interrupted(
                            f"Stopped at step {self.done} of {self.total}; saved. Go on with: "
                            f"{self._resume_command()}"
                        )
                    self._save_when_due()

    def _steps(
        self, batches: Iterator, sampler: Sampler, end: int
    ) -> Iterator[tuple[Metrics, Schedule]]:
        """Metrics and schedule values of each step, after it was begun."""
        previous: Metrics = {}
        while self.done < end:
            values = schedule(self.config, self.done, self.total)
            metrics = self._update(batches, sampler, values)
            mx.eval(previous)  # at most one step is in flight
            previous = metrics
            self.done += 1
            yield metrics, values

    def _save_what_there_is(self) -> str:
        """Save after the data was lost; what was done, in words."""
        if not self.done:
            return "Nothing was trained."
        try:
            self.save()
        except (OSError, HJEPAError) as error:
            return f"The run could not be saved: {error}"
        return (
            f"Stopped at step {self.done} of {self.total}; saved. When it is back: "
            f"{self._resume_command()}"
        )

    def _resume_command(self) -> str:
        if any(self.own_parts.values()):
            return "hj.train(…, resume=True), with your own parts again."
        return f"hjepa-mlx train {quote(str(self.run.path / 'config.yaml'))} --resume"

    def _update(self, batches: Iterator, sampler: Sampler, values: Schedule) -> Metrics:
        pairs, position = [], self.position
        for micro in range(self.config.optim.accumulate):
            batch = next(batches)
            number = self.done * self.config.optim.accumulate + micro
            masks = sampler(number, len(batch.images) * self.config.masks.per_image)
            pairs.append((mx.array(batch.images), masks))
            position = batch.next
        metrics = self.step(pairs, values)
        self.position = position
        return metrics

    def _report(self, reporter: Reporter, values: Schedule, first: dict[str, Any]) -> None:
        """Log, show and judge what is due after this step."""
        c = self.config.run
        ended = self.done == self.total
        row: dict[str, Any] = {"step": self.done, "epoch": round(self.done / self.per_epoch, 4)}
        logged = ended or self.done % c.log_every == 0
        watched = ended or self.done % c.signals_every == 0
        judged = self.knn and self.done % (self.per_epoch * c.eval_every_epochs) == 0
        if logged or watched or judged:
            self._read_window()
        if logged:
            row |= self.window.take_mean() | values._asdict()
            batch = self.config.data.batch_size * self.config.optim.accumulate
            row["images_per_second"] = self.window.rate(batch)
            row["peak_memory_gb"] = round(mx.get_peak_memory() / backend.GB, 3)
        if watched:
            with self.window.paused():
                signals = self.signals()
            row |= signals
            for warning in warnings(first, signals):
                self._say(f"step {self.done}: {warning}", style="yellow")
        if judged:
            with self.window.paused():
                row |= self._quick_knn()
        if len(row) > 2:
            self.run.log(row)
        if logged:
            reporter.update(row)
            self.window.begin()
        self._name_skipped()

    def _say(self, text: str, style: str | None = None) -> None:
        say(self.console, text, style)

    def _read_window(self) -> None:
        self.window.read(self.done, self.run.latest)

    def _quick_knn(self) -> dict[str, float]:
        """k-NN of every level, if there is time for it."""
        assert self.knn is not None
        c = self.config
        elapsed = time.monotonic() - self._began
        images = (self.done - self._first) * c.data.batch_size * c.optim.accumulate
        if self.knn.affordable(elapsed, images):
            return self.knn()
        if not self._told_of_share:
            self._say(
                f"k-NN every {c.run.eval_every_epochs} epochs would take more than "
                f"{c.run.eval_share:.0%} of the time, so it is done less often (run.eval_share)."
            )
            self._told_of_share = True
        return {}

    def _name_skipped(self) -> None:
        """Name images that could not be read, in the log and in skipped.txt, once each."""
        if len(self.skipped) == len(self._named):
            return
        path = self.run.path / "skipped.txt"
        known = path.read_text(encoding="utf-8") if path.is_file() else ""
        new = [(n, why) for n, why in list(self.skipped.reasons.items()) if n not in self._named]
        self._named.update(name for name, _ in new)
        new = [(name, why) for name, why in new if f"{name!r}\t" not in known]
        if not new:
            return
        with open(path, "a", encoding="utf-8", errors="backslashreplace") as file:
            file.writelines(f"{name!r}\t{reason}\n" for name, reason in new)
        more = f" and {len(new) - 1} more" if len(new) > 1 else ""
        self._say(
            f"Skipped {new[0][0]} ({new[0][1]}){more}; {len(self.skipped)} unreadable so far, "
            "all in skipped.txt."
        )

    def _save_when_due(self) -> None:
        c = self.config.run
        late = time.monotonic() - self._saved > 60 * c.checkpoint_minutes
        if late or self.done == self.total or self._milestone():
            self.save()

    def _milestone(self) -> bool:
        every = self.config.run.milestone_epochs * self.per_epoch
        return bool(every) and self.done % every == 0

    def save(self) -> Path:
        """Write a checkpoint, if all losses since the last logged step are finite."""
        self._read_window()
        epoch = self.done / self.per_epoch
        state = {
            "epoch": epoch,
            "images": len(self.train_source),
            "position": list(self.position),
            "own_parts": self.own_parts,
            "window": self.window.metrics,
            "milestone": self._milestone() or self.done == self.total,
        }
        keep = self.config.run.keep_last
        with self.window.paused():
            path = checkpoint.save(self.run.checkpoints, self.step, self.done, state, keep)
        self.model.origin = Origin(str(self.run.path), self.done, epoch)
        self._saved = time.monotonic()
        return path


def _check_built_from(model: HJEPA, config: Config) -> None:
    """Refuse a network whose shape or levels are not those of `config`."""
    its = model.config
    for key, theirs, ours in (
        ("model", its.model, config.model),
        ("data.image_size", its.data.image_size, config.data.image_size),
        ("the levels that loss.level_weights predicts", its.predicted, config.predicted),
    ):
        if theirs != ours:
            raise UsageError(
                f"The model to start from was built from another config: {key} differs. Build it "
                "from this one: hj.HJEPA(config)."
            )


def _check_own(loss_fn: LossFn | None, sampler: Sampler | None, config: Config) -> None:
    """Refuse a loss that is no number, and masks of another grid."""
    if loss_fn:
        found = loss_fn(mx.ones((2, 3, 4)), mx.zeros((2, 3, 4)))
        if not isinstance(found, mx.array) or found.size != 1:
            raise UsageError("loss_fn must return one number, an mx.array, for [B, n, D] arrays.")
    if sampler:
        masks = sampler(0, config.data.batch_size * config.masks.per_image)
        if max(masks.context.max(), masks.targets.max()) >= config.grid**2:
            raise UsageError(
                f"The sampler's masks do not fit the grid of {config.grid}×{config.grid} patches: "
                "make it from this config."
            )


def _name(own_part: Callable | None) -> str | None:
    """What a part from outside is called; None: the config's own."""
    if own_part is None:
        return None
    return getattr(own_part, "__qualname__", type(own_part).__qualname__)


def _check_disk(config: Config, model: HJEPA) -> None:
    """Refuse to start what the disk cannot hold: checkpoints kept, and one being written."""
    weights = tree_reduce(lambda total, w: total + w.nbytes, model.parameters(), 0)
    moments = 2 * tree_reduce(lambda total, w: total + w.nbytes, model.trainable_parameters(), 0)
    every = config.run.milestone_epochs
    milestones = 1 + (config.optim.epochs // every if every else 0)
    needed = (weights + moments) * (config.run.keep_last + milestones + 1)
    place = Path(config.run.dir or "runs")
    advice = "Free some, choose another --run-dir, or lower run.keep_last."
    check_space("The run's checkpoints need", needed, place, advice)
