"""`hjepa-mlx train`: train a recipe, then evaluate it."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from functools import partial
from pathlib import Path
from shlex import quote
from typing import Annotated

import typer
from rich.console import Console

from hjepa_mlx import backend, pretrained, world
from hjepa_mlx.agreement import shared_error
from hjepa_mlx.checkpoint import read_state
from hjepa_mlx.cli.common import DataDir, Overrides, in_runs, readable
from hjepa_mlx.cli.eval import report
from hjepa_mlx.config import Config
from hjepa_mlx.costs import average_gflop, costs
from hjepa_mlx.data.folder import RECORD
from hjepa_mlx.data.source import open_sources
from hjepa_mlx.errors import HJEPAError, UsageError, counted
from hjepa_mlx.eval.labels import NoTestImages
from hjepa_mlx.longer import last_stage, longer
from hjepa_mlx.losses import prediction_loss
from hjepa_mlx.progress import say
from hjepa_mlx.recipes import config_names, find_config, load_config
from hjepa_mlx.runs import Run, reopen
from hjepa_mlx.state import steps_per_epoch
from hjepa_mlx.train import Interrupted
from hjepa_mlx.train import train as start

Epochs = Annotated[
    int | None,
    typer.Option(metavar="N", help="Epochs in all; CONFIG a run: it goes on to so many."),
]
Hours = Annotated[
    float | None,
    typer.Option(help="Take so long; my-folder (default: 8) also chooses the network by it."),
]
RunDir = Annotated[str | None, typer.Option(help="Run folder. Default: runs/CONFIG-TIME.")]
Init = Annotated[
    str | None,
    typer.Option(
        parser=in_runs, metavar="WHAT", help="Weights: a run, file, folder or hf:USER/NAME."
    ),
]


@readable
def train(
    config: Annotated[str, typer.Argument(help="Name of a recipe, path of a YAML file, or a run.")],
    overrides: Overrides = None,
    data_dir: DataDir = None,
    run_dir: RunDir = None,
    hours: Hours = None,
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Go on from the newest checkpoint; CONFIG: the run."),
    ] = False,
    epochs: Epochs = None,
    init: Init = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the resolved config and its costs, and stop.")
    ] = False,
) -> None:
    """Train a recipe, then evaluate what it learned.

    Examples: `hjepa-mlx train demo`, `hjepa-mlx train my-folder --data-dir pictures --hours 8`,
    `hjepa-mlx train runs/demo-20260101-120000 --epochs 10`
    """
    config = config if config in config_names() else in_runs(config)
    own_run = _own_run(config, run_dir, epochs)
    overrides = overrides or []
    if hours is not None:
        _check_hours(epochs, (own_run or run_dir or "RUN") if resume else None)
    if hours is not None or (config == "my-folder" and not resume):
        overrides = [*_chosen(config, overrides, data_dir, hours), *overrides]
    loaded = _loaded(config, own_run, overrides, epochs)
    resume |= own_run is not None and epochs is not None
    loaded.data.dir, loaded.model.init = data_dir or loaded.data.dir, init or loaded.model.init
    loaded.run.dir = run_dir or (own_run if resume else None) or loaded.run.dir
    if dry_run:
        record = reopen(loaded).path / RECORD if resume else None  # refuses another config
        return _print_plan(loaded, record)
    if own_run is not None and epochs is not None and _has_trained(own_run, epochs):
        print(f"{own_run} has trained {epochs} epochs already: there is nothing to do.")
        if loaded.run.final_eval and world.rank() == 0 and _unjudged(own_run):
            _evaluate(Path(own_run), data_dir)
        return None
    try:
        run = start(loaded, resume)
    except Interrupted as stopped:
        with suppress(OSError):  # the terminal may be gone
            if world.rank() == 0:
                print(f"hjepa-mlx: {stopped}", file=sys.stderr, flush=True)
        os._exit(130)  # data threads may still hold images
    if loaded.run.final_eval and world.rank() == 0:
        _evaluate(run.path)


def _check_hours(epochs: int | None, resumed: str | None) -> None:
    """Refuse --hours where the length is known: with --epochs, and for a run that is resumed."""
    if epochs is not None:
        raise UsageError("--hours chooses the epochs itself: give either --hours or --epochs.")
    if resumed is not None:
        how = f"hjepa-mlx train {quote(resumed)} --resume"
        raise UsageError(f"A run keeps its length. Resume it by: {how}")


def _has_trained(run: str, epochs: int) -> bool:
    newest = Run(run).latest
    return newest is not None and read_state(newest)["epoch"] >= epochs


def _unjudged(run: str) -> bool:
    """Whether the scores of the last step are missing, as when the evaluation was interrupted."""
    judged, newest = Run(run).scores.get("trained") or {}, Run(run).latest
    return newest is not None and judged.get("step") != read_state(newest)["step"]


def _evaluate(run: Path, data_dir: str | None = None) -> None:
    """The evaluation at the end of a training; without it the run is whole all the same."""
    try:
        report(run, None, data_dir)
    except HJEPAError as error:
        print(f"hjepa-mlx: trained and saved, but not evaluated: {error}", file=sys.stderr)
        if not isinstance(error, NoTestImages):
            raise typer.Exit(error.exit_status) from None
    except KeyboardInterrupt:
        command = f"hjepa-mlx eval {quote(str(run))}"
        print(f"hjepa-mlx: trained and saved. Evaluate with: {command}", file=sys.stderr)
        raise typer.Exit(130) from None


def _chosen(
    config: str, overrides: list[str], data_dir: str | None, hours: float | None
) -> list[str]:
    """Settings that fit the hours, which are printed with the reason."""
    from hjepa_mlx.bench.fit import HOURS, fit_hours

    console = Console(stderr=True)
    hours = HOURS if hours is None else hours
    if world.size() > 1:
        raise shared_error(
            "my-folder and --hours measure one process. Let one choose, with --dry-run > own.yaml, "
            "and train own.yaml on all ranks.",
            status=2,
        )
    settings, lines = fit_hours(config, overrides, data_dir, hours, partial(say, console))
    for line in lines:
        say(console, line)
    return settings


def _own_run(given: str, run_dir: str | None, epochs: int | None) -> str | None:
    """The run that `given` is or whose config it is: a folder, or one that has been logged to.

    None if its config is to be trained anew, in `run_dir`.
    """
    file = find_config(given)
    is_run = Path(given).is_dir() or (file.parent / "metrics.jsonl").is_file()
    if file.name != "config.yaml" or not is_run:
        return None
    run = str(file.parent)
    if run_dir is not None and epochs is not None:
        raise UsageError(
            f"{run} goes on in its own folder: leave out --run-dir. A new run with its weights: "
            f"hjepa-mlx train RECIPE --init {quote(run)}."
        )
    return run if run_dir is None else None


def _loaded(given: str, own_run: str | None, overrides: list[str], epochs: int | None) -> Config:
    if epochs is None:
        return load_config(given, overrides)
    if own_run is not None:
        return longer(own_run, epochs, overrides)
    return load_config(given, [*overrides, f"optim.epochs={epochs}"])


def _print_plan(config: Config, record: Path | None) -> None:
    """The resolved config as YAML; its costs as YAML comments. record: of a run that goes on."""
    prediction_loss(config.loss.kind)
    networks, loaded = pretrained.start(config)
    cost = costs(config, networks)
    counts = zip(config.masked, cost.predicted_cells, strict=True)
    cells = ", ".join(f"level {level}: {count:.0f}" for level, count in counts)
    lines = [
        "parameters   " + ", ".join(f"{k} {v / 1e6:.2f} M" for k, v in cost.weights.items()),
        f"tokens       {config.grid}x{config.grid} = {cost.grid_tokens} in the target encoder, "
        f"{cost.context_tokens} in the context encoder; cells predicted: {cells or 'none'}",
        f"hierarchy    {_hierarchy(config)}",
        f"GFLOP/image  {cost.gflop:.2f} ("
        + ", ".join(f"{name} {part.gflop:.2f}" for name, part in cost.parts.items())
        + f"); {average_gflop(config, networks):.2f} on average over the run",
        *(
            f"{size:<12} pixels for {share:.0%} of the epochs"
            for size, share in config.stages
            if config.data.progressive
        ),
        f"memory       about {cost.memory_gb:.1f} GB (estimated) of "
        f"{backend.step_memory_gb():.1f} GB that a step may take",
    ]
    lines += [f"longer       {words}" for words in [last_stage(config)] if words]
    try:
        source = open_sources(config.data, record, ("pretrain",))["pretrain"]
        steps = steps_per_epoch(config, len(source))
        total = steps * config.optim.epochs
        lines.append(f"steps        {counted(len(source))}, {steps} an epoch, {total:,} in all")
    except UsageError:
        raise
    except HJEPAError as error:  # not downloaded yet
        lines.append(f"steps        unknown: {error}")
    print(config.to_yaml() + "\n".join(f"# {line}" for line in [*lines, *loaded]))


def _hierarchy(config: Config) -> str:
    """How many cells of which size each level has in an image."""
    words = []
    model, seen, count = config.model, config.view_grid, config.views.count
    shapes = zip(model.level_blocks, model.level_pool, config.level_sides, strict=True)
    for level, (block, pool, side) in enumerate(shapes):
        cells = f"{side}x{side} cells of {model.patch_size * config.level_pools[level]} pixels"
        few = ", with so few cells it adds little" if side <= 2 else ""
        if pool == "image":
            sources = ["the context"] * bool(config.masked) * config.image_predicted
            sources += [f"{counted(count, 'view')} of {seen}x{seen} patches"] * bool(seen)
            cells, few = "the image" + ", from " * bool(sources) + " and ".join(sources), ""
        predicted = "" if level in config.predicted else " (not predicted)"
        words.append(f"level {level}: {cells} after block {block}{predicted}{few}")
    return ", ".join(words)
