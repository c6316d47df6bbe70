"""`hjepa-mlx viz`: pictures of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from hjepa_mlx.cli.common import DataDir, OtherData, in_runs, readable
from hjepa_mlx.eval.evaluation import config_for
from hjepa_mlx.runs import Run


@readable
def viz(
    run: Annotated[str, typer.Argument(parser=in_runs, help="Run folder.")],
    data: OtherData = None,
    data_dir: DataDir = None,
    out: Annotated[
        str | None, typer.Option(metavar="FOLDER", help="Where to write. Default: RUN/viz.")
    ] = None,
) -> None:
    """Draw a run: masks, features, neighbours and curves, and one HTML page with all of them.

    Example: `hjepa-mlx viz runs/demo-20260101-120000`
    """
    from hjepa_mlx.viz.page import make

    chosen = Run(run)
    shown = config_for(chosen.config, data, data_dir).data
    with Console(stderr=True).status("Drawing"):
        paths = make(chosen, Path(out) if out else None, shown)
    for path in paths:
        print(path)
