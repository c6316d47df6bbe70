"""`hjepa-mlx embed`: features of a folder of images."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console

from hjepa_mlx.cli.common import Fit, ImageSize, RunOrCheckpoint, readable, sides
from hjepa_mlx.errors import counted
from hjepa_mlx.progress import say
from hjepa_mlx.runs import load
from hjepa_mlx.session import awake

NAMED = 5  # unreadable images that are named in the terminal; the file names them all


@readable
@awake()
def embed(
    run: RunOrCheckpoint,
    images: Annotated[
        list[str], typer.Argument(help="Folders, images, and .txt files with a path a line.")
    ],
    out: Annotated[
        str, typer.Option(metavar="FILE", help="To write: .npz, .safetensors, .parquet or .csv.")
    ],
    encoder: Annotated[str, typer.Option(help="target or context.")] = "target",
    tokens: Annotated[
        bool, typer.Option("--tokens", help="Keep every cell of each level, not their mean.")
    ] = False,
    image_size: ImageSize = None,
    fit: Fit = "crop",
) -> None:
    """Turn images into one vector per image and level.

    Example: `hjepa-mlx embed runs/demo-20260101-120000 pictures --out features.npz`
    """
    from hjepa_mlx.embed import embed as run_over
    from hjepa_mlx.embed import save

    embeddings = run_over(load(run), images, encoder, not tokens, out, sides(image_size), fit)
    save(embeddings, out)
    if embeddings.left_out:
        say(Console(stderr=True), embeddings.left_out)
    unreadable = list(embeddings.skipped.items())
    for path, why in unreadable[:NAMED]:
        say(Console(stderr=True), f"Skipped {path}: {why}")
    more = f" ({len(unreadable):,} unreadable)" if unreadable else ""
    levels = ", ".join(
        f"{name} {'×'.join(map(str, array.shape[1:]))}" for name, array in embeddings.levels.items()
    )
    say(Console(), f"{counted(len(embeddings.paths))} embedded{more}: {levels}; in {out}")
