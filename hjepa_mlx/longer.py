"""A run that goes on to more epochs, as a new stage of the same run.

From the step where it goes on, every schedule is that of a run of all the epochs (step.py). Only
the learning rate gets there from what it was in a straight line, in as many steps as a warm-up has.
"""

from __future__ import annotations

from pathlib import Path
from shlex import quote

from hjepa_mlx import checkpoint
from hjepa_mlx.config import Config
from hjepa_mlx.errors import UsageError
from hjepa_mlx.recipes import load_config
from hjepa_mlx.runs import Run, differences
from hjepa_mlx.sections import Earlier


def longer(path: str | Path, epochs: int, overrides: list[str] | None = None) -> Config:
    """The config with which the run at `path` goes on to `epochs` epochs in all, as a new stage.

    Train it with `train(config, resume=True)`. overrides: of `optim`, the batch size and the image
    size. A run that has just that config, and was interrupted, is simply resumed. Raises UsageError
    when there is nothing to go on from.
    """
    run = Run(path)
    before, newest = run.config, run.latest
    overrides = [*(overrides or []), f"optim.epochs={epochs}"]
    sized = any(one.startswith("views.size=") for one in overrides)
    # the views of before may be larger than the images now
    config = load_config(
        run.path / "config.yaml", overrides if sized else ["views.size=auto", *overrides]
    )
    config.run.dir = str(run.path)
    if not sized:
        config.views.size = before.view_size(config.data.image_size)
    if config.data.image_size != before.data.image_size:
        if before.model.positions == "learned":
            raise UsageError(
                "Learned positions belong to one image size. Start a new run with another: "
                f"--init {quote(str(path))} --set data.image_size={config.data.image_size}."
            )
        scaled = before.at_size(config.data.image_size)
        config.model.positions = before.position_grid
        if config.masks.context_tokens == before.masks.context_tokens:
            config.masks.context_tokens = scaled.masks.context_tokens
    if not differences(before.model_dump(), config.model_dump()):
        return config
    if newest is None:
        raise UsageError(f"The run {path} has no checkpoint yet. Start a new run.")
    state = checkpoint.read_state(newest)
    if config.optim.epochs <= state["epoch"]:
        done = f"{path} has trained {state['epoch']:g} epochs already"
        raise UsageError(f"{done}. Give --epochs more than that.")
    ended = Earlier(
        step=state["step"],
        epoch=state["epoch"],
        lr=checkpoint.learning_rate(newest),
        epochs=before.optim.epochs,
        batch_size=before.data.batch_size,
        accumulate=before.optim.accumulate,
        image_size=before.data.image_size,
    )
    config.run.history = [*before.run.history, ended]
    return config


def last_stage(config: Config) -> str:
    """How a run that was made longer goes on, in words; empty for other runs."""
    if not config.run.history:
        return ""
    last, c, share, size = config.run.history[-1], config.optim, 0.0, 0
    for side, part in config.stages:  # the first that is not over
        size = size if share * c.epochs > last.epoch + 1e-6 else side
        share += part
    pixels = f"{size}×{size} pixels" + (" at first" if size != config.data.image_size else "")
    return (
        f"Stage {len(config.run.history) + 1} goes on from step {last.step} (epoch "
        f"{last.epoch:g}) to epoch {c.epochs}: {pixels}, batches of "
        f"{config.data.batch_size}. All schedules are those of {c.epochs} epochs; the learning "
        f"rate gets there from {last.lr:.3g} in a straight line over {c.warmup_epochs:g} epochs."
    )
