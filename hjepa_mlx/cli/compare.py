"""`hjepa-mlx compare`: runs side by side."""

from __future__ import annotations

from typing import Annotated

import typer

from hjepa_mlx.cli.common import JsonFile, check_writable, in_runs, output_json, readable


@readable
def compare(
    runs: Annotated[list[str], typer.Argument(parser=in_runs, help="Two or more run folders.")],
    json_file: JsonFile = None,
) -> None:
    """Show what differs between runs: configuration, training and scores.

    Example: `hjepa-mlx compare runs/first runs/second`
    """
    from rich.console import Console

    from hjepa_mlx.compare import compare as run

    check_writable(json_file)
    comparison = run(runs)
    output_json(comparison.data, json_file)
    if json_file != "-":
        Console().print(comparison, soft_wrap=True)  # commands are copied from it
