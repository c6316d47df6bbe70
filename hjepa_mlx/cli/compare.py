"""`hjepa-mlx compare`: runs side by side."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console

from hjepa_mlx.cli.common import JsonFile, in_runs, output_json, readable


@readable
def compare(
    runs: Annotated[list[str], typer.Argument(parser=in_runs, help="Two or more run folders.")],
    json_file: JsonFile = None,
) -> None:
    """Show what differs between runs: configuration, training and scores.

    Example: `hjepa-mlx compare runs/first runs/second`
    """
    from hjepa_mlx.compare import compare as run

    comparison = run(runs)
    if output_json(comparison.data, json_file):
        Console().print(comparison, soft_wrap=True)  # commands are copied from it
