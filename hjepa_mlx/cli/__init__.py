"""The command line: what a person asks, the calls that answer it, one line for what goes wrong."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from hjepa_mlx.cli.bench import bench
from hjepa_mlx.cli.compare import compare
from hjepa_mlx.cli.datasets import datasets
from hjepa_mlx.cli.doctor import doctor
from hjepa_mlx.cli.embed import embed
from hjepa_mlx.cli.eval import evaluate
from hjepa_mlx.cli.export import export
from hjepa_mlx.cli.finetune import finetune, predict
from hjepa_mlx.cli.push import push
from hjepa_mlx.cli.train import train
from hjepa_mlx.cli.viz import viz

app = typer.Typer(
    help="Pretrain and study a hierarchical JEPA on your own machine.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)
app.add_typer(datasets, name="datasets")
for _command in (train, viz, compare, embed, finetune, predict, export, push, bench, doctor):
    app.command()(_command)
app.command(name="eval")(evaluate)


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
    context: typer.Context,
    version: Annotated[
        bool,
        typer.Option(
            "--version", help="Print the version.", is_eager=True, callback=_print_version
        ),
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
) -> None:
    """Pretrain and study a hierarchical JEPA on your own machine."""
    from hjepa_mlx.backend import unused_gpu

    if context.invoked_subcommand != "doctor" and (line := unused_gpu()):
        print(line, file=sys.stderr)
