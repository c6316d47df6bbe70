"""The command line: what a person asks, the calls that answer it, one line for what goes wrong."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from shlex import quote
from typing import TYPE_CHECKING, Annotated

import typer

from hjepa_mlx.cli import study
from hjepa_mlx.cli.bench import bench
from hjepa_mlx.cli.common import DataDir, JsonFile, check_writable, output_json, readable
from hjepa_mlx.cli.datasets import datasets
from hjepa_mlx.errors import HJEPAError, UsageError

if TYPE_CHECKING:
    from hjepa_mlx.config import Config

app = typer.Typer(
    help="Pretrain and study a hierarchical JEPA on your own machine.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)
app.add_typer(datasets, name="datasets")
app.command(name="eval")(study.evaluate)
for _command in (study.viz, study.compare, study.embed, bench):
    app.command()(_command)


def main() -> None:
    """Entry point; `--debug` may stand anywhere and shows tracebacks."""
    if "--debug" in sys.argv:
        sys.argv.remove("--debug")
        os.environ["HJEPA_DEBUG"] = "1"
    app(prog_name="hjepa-mlx")


def _print_version(wanted: bool) -> None:
    if wanted:
        from hjepa_mlx import __version__

        print(__version__)
        raise typer.Exit()


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", help="Print the version.", is_eager=True, callback=_print_version
        ),
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
) -> None:
    """Pretrain and study a hierarchical JEPA on your own machine."""


@app.command()
@readable
def train(
    config: Annotated[str, typer.Argument(help="Name of a recipe, or path of a YAML file.")],
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Change the config; may be repeated."),
    ] = None,
    data_dir: DataDir = None,
    run_dir: Annotated[
        str | None, typer.Option(help="Run folder. Default: runs/CONFIG-TIME.")
    ] = None,
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Go on from the newest checkpoint; CONFIG: the run."),
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the resolved config and its costs, and stop.")
    ] = False,
) -> None:
    """Train a recipe, then evaluate what it learned.

    Example: `hjepa-mlx train demo --set optim.epochs=5`
    """
    from hjepa_mlx.config import find_config, load_config

    loaded = load_config(config, overrides)
    if data_dir is not None:
        loaded.data.dir = data_dir
    own = find_config(config)
    if run_dir is not None:
        loaded.run.dir = run_dir
    elif resume and own.name == "config.yaml" and (own.parent / "metrics.jsonl").is_file():
        loaded.run.dir = str(own.parent)
    if dry_run:
        _print_plan(loaded)
        return
    from hjepa_mlx.train import Interrupted
    from hjepa_mlx.train import train as start

    try:
        run = start(loaded, resume)
    except Interrupted as stopped:
        with suppress(OSError):  # the terminal may be gone
            print(f"hjepa-mlx: {stopped}", file=sys.stderr, flush=True)
        os._exit(130)  # data threads may still hold images
    if loaded.run.final_eval:
        try:
            study.report(run.path)
        except KeyboardInterrupt:
            command = f"hjepa-mlx eval {quote(str(run.path))}"
            print(f"hjepa-mlx: trained and saved. Evaluate with: {command}", file=sys.stderr)
            raise typer.Exit(130) from None


@app.command()
@readable
def doctor(json_file: JsonFile = None) -> None:
    """Show machine, libraries and speed, and what to put right.

    Example: `hjepa-mlx doctor`
    """
    from rich.console import Console
    from rich.table import Table

    from hjepa_mlx.doctor import examine

    check_writable(json_file)
    facts = examine()
    output_json(facts, json_file)
    if json_file == "-":
        return
    table = Table(show_header=False, box=None)
    for key, value in facts.items():
        if key != "advice":
            table.add_row(key.replace("_", " "), str(value))
    Console().print(table)
    for line in facts["advice"] or ["Nothing to put right."]:
        print(line)


def _print_plan(config: Config) -> None:
    """The resolved config as YAML; what follows from it as YAML comments."""
    from hjepa_mlx import backend
    from hjepa_mlx.costs import average_gflop, costs
    from hjepa_mlx.data.sources import open_source
    from hjepa_mlx.models.hjepa import HJEPA
    from hjepa_mlx.train import steps_per_epoch

    networks = HJEPA(config)
    cost = costs(config, networks)
    counts = zip(config.predicted, cost.predicted_cells, strict=True)
    cells = ", ".join(f"level {level}: {count:.0f}" for level, count in counts)
    lines = [
        "parameters   " + ", ".join(f"{k} {v / 1e6:.2f} M" for k, v in cost.weights.items()),
        f"tokens       {config.grid}x{config.grid} = {cost.grid_tokens} in the target encoder, "
        f"{cost.context_tokens} in the context encoder; cells predicted: {cells}",
        f"hierarchy    {_hierarchy(config)}",
        f"GFLOP/image  {cost.gflop:.2f} (target {cost.target.gflop:.2f}, "
        f"context {cost.context.gflop:.2f}, predictor {cost.predictor.gflop:.2f}); "
        f"{average_gflop(config, networks):.2f} on average over the run",
        *(
            f"{size:<12} pixels for {share:.0%} of the epochs"
            for size, share in config.stages
            if config.data.progressive
        ),
        f"memory       about {cost.memory_gb:.1f} GB (estimated) of "
        f"{backend.step_memory_gb():.1f} GB that a step may take",
    ]
    try:
        source = open_source(config.data, "pretrain")
        steps = steps_per_epoch(config, len(source))
        total = steps * config.optim.epochs
        lines.append(f"steps        {len(source):,} images, {steps} an epoch, {total:,} in all")
    except UsageError:
        raise
    except HJEPAError as error:  # not downloaded yet
        lines.append(f"steps        unknown: {error}")
    print(config.to_yaml() + "\n".join(f"# {line}" for line in lines))


def _hierarchy(config: Config) -> str:
    """What the grid means for the levels: how many cells of which size each has in an image."""
    pools, sides = map(int, config.model.level_pool), config.level_sides
    words = [
        f"level {level}: {side}x{side} cells of {config.model.patch_size * pool} pixels"
        + ("" if level in config.predicted else " (not predicted)")
        for level, (side, pool) in enumerate(zip(sides, pools, strict=True))
    ]
    if sides[-1] <= 2:
        words.append("so few coarse cells say little that the fine ones do not")
    return ", ".join(words)
