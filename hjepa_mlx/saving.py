"""Saving a run, going back to what was saved, and what is said when a run stops."""

from __future__ import annotations

import time
from shlex import quote
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from hjepa_mlx import agreement, checkpoint, world
from hjepa_mlx.data.pipeline import Position
from hjepa_mlx.errors import HJEPAError, UsageError, counted
from hjepa_mlx.models.hjepa import Origin
from hjepa_mlx.progress import say
from hjepa_mlx.state import TrainState
from hjepa_mlx.step import random_key, reseed


def save(state: TrainState) -> None:
    """Write a checkpoint, unless a loss since the last report or a weight is not finite."""
    c = state.config.run
    check_finite(state)
    kept = {
        "epoch": state.epoch,
        "images": len(state.source),
        "fingerprint": state.fingerprint,
        "position": list(state.position),
        "own_parts": state.own_parts,
        "window": state.meter.metrics,
    }
    if world.rank() == 0:
        with state.meter.paused():
            checkpoint.save(state.run.checkpoints, state.step, state.done, kept, c.keep_last)
    state.step.model.origin = Origin(str(state.run.path), state.done, state.epoch)
    state.next_save = time.monotonic() + 60 * c.checkpoint_minutes


def check_finite(state: TrainState) -> None:
    """Raise HJEPAError if a loss since the last report, a weight or a moment is not finite."""
    state.meter.read(state.done, state.run.latest)
    arrays = dict(tree_flatten([state.step.weights, state.step.optimizer.state])).values()
    if not mx.stack([mx.isfinite(x).all() for x in arrays]).all():
        raise agreement.shared_error(
            f"Training stopped at step {state.done}: a weight, or what the optimizer keeps of it, "
            f"is not finite. The last good checkpoint is {state.run.latest or 'none yet'}. Go on "
            "from there with --resume. If it happens again, start a new run with a lower optim.lr."
        )


def restore(state: TrainState) -> None:
    """Go back to the run's newest checkpoint, if it has one; drop metrics logged after it."""
    run, source = state.run, state.source
    newest, rows = run.latest, run.metrics
    if newest:
        before = checkpoint.read_state(newest)["own_parts"]
    else:
        before = rows[0].get("own_parts") if rows else state.own_parts
    before = before or dict.fromkeys(state.own_parts)
    if before != state.own_parts:
        raise UsageError(
            f"{run.path} was trained with {before}, not with {state.own_parts}. Resume it by "
            "hj.train(…, resume=True) with the same parts."
        )
    if newest:
        kept = checkpoint.restore(newest, state.step)
        _check_images(state, kept)
        checkpoint.tidy(run.checkpoints, state.config.run.keep_last)  # if it died before that
        if "fingerprint" not in kept and source.encoded and state.config.data.name != "folder":
            say(
                state.console,
                "This run began before data sets had to be prepared. If it read the original "
                "files, it goes on with images that differ slightly: they were made smaller.",
                style="yellow",
            )
        state.done, state.position = kept["step"], Position(*kept["position"])
        state.meter.metrics = kept["window"]
        say(state.console, f"Resuming {run.path} at step {state.done} of {state.total}.")
    run.forget_after(state.done if newest else -1)
    if run.config != state.config:  # in keys that may change
        run.store(state.config)


def _check_images(state: TrainState, kept: dict[str, Any]) -> None:
    """Refuse to go on with other images than those that the checkpoint was trained on."""
    run, source = state.run, state.source
    gone = f"{source.folder.gone} " if source.folder and source.folder.gone else ""
    put_back = "Put them back" if gone else "Give the same --data-dir"
    if kept["images"] != len(source):
        raise UsageError(
            f"{run.path} was trained on {counted(kept['images'])}; {source.name} has "
            f"{len(source)} of them now. {gone}{put_back}, or start a new run."
        )
    if kept.get("fingerprint", state.fingerprint) != state.fingerprint:
        raise UsageError(
            f"{run.path} was trained on other images than {source.name} holds now: a file has "
            f"another name, size or label. {gone}{put_back}, or start a new "
            "run."
        )


def save_after_loss(state: TrainState, then: str) -> str:
    """Save the last complete step after data or a rank was lost; in words, how that went."""
    if not state.done:
        return "Nothing was trained."
    if world.rank():
        return f"Rank 0 has the run. {then}: {_resume(state)}"
    try:
        save(state)
    except (OSError, HJEPAError) as error:
        return f"The run could not be saved: {error}"
    return stopped(state, then)


def stopped(state: TrainState, then: str = "Go on with") -> str:
    """What is said when a run stops, in words."""
    if state.done == state.total:
        path = quote(str(state.run.path))
        return f"Trained and saved. Evaluate with: hjepa-mlx eval {path}"
    return f"Stopped at step {state.done} of {state.total}; saved. {then}: {_resume(state)}"


def _resume(state: TrainState) -> str:
    if any(state.own_parts.values()):
        return "hj.train(…, resume=True), with your own parts again."
    ranks = f"mlx.launch -n {world.size()} -- " if world.size() > 1 else ""
    return f"{ranks}hjepa-mlx train {quote(str(state.run.path / 'config.yaml'))} --resume"


def share(state: TrainState) -> None:
    """Take rank 0's weights, optimizer, random numbers and place in the run."""
    step, place = state.step, mx.array([state.done, *state.position])
    step.model.update(agreement.of_rank_0(step.model.parameters()))
    own = [step.optimizer.state, step.scaler, step.moments, random_key(), place]
    optimizer, scaler, moments, key, place = agreement.of_rank_0(own)
    step.adopt()
    step.optimizer.state.update(optimizer)
    step.scaler.update(scaler)
    step.moments.update(moments)
    reseed(key)
    state.done, *position = place.tolist()
    state.position = Position(*position)
