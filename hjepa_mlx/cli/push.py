"""`hjepa-mlx push`: a run or an export to Hugging Face."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hjepa_mlx.cli.common import in_runs, readable
from hjepa_mlx.cli.export import Licence


@readable
def push(
    run: Annotated[
        str, typer.Argument(parser=in_runs, help="Run folder, or folder of `hjepa-mlx export`.")
    ],
    repository: Annotated[str, typer.Argument(metavar="USER/NAME", help="Made if need be.")],
    private: Annotated[bool, typer.Option("--private", help="Make it a private one.")] = False,
    licence: Licence = "unknown",
) -> None:
    """Put a run on Hugging Face, where `hj.load("hf:USER/NAME")` and `--init` find it.

    Log in once with `hf auth login`. Example: `hjepa-mlx push runs/demo-20260101-120000 USER/NAME`
    """
    from hjepa_mlx.export import files_of
    from hjepa_mlx.hub import upload

    files = files_of(Path(run), licence)
    print(f"{upload(repository, files, private)}  ({len(files)} files)")
