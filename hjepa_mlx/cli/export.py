"""`hjepa-mlx export`: an encoder for other codes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hjepa_mlx.cli.common import JsonFile, RunOrCheckpoint, check_out, output_json, readable
from hjepa_mlx.runs import Run, load

Licence = Annotated[str, typer.Option("--licence", help="Of the weights, for the model card.")]


@readable
def export(
    run: RunOrCheckpoint,
    to: Annotated[
        str, typer.Option(metavar="FORMAT", help="timm, transformers, safetensors, onnx or coreml.")
    ],
    out: Annotated[
        str | None, typer.Option(metavar="FOLDER", help="To write. Default: RUN/export/FORMAT.")
    ] = None,
    encoder: Annotated[str, typer.Option(help="target or context.")] = "target",
    licence: Licence = "unknown",
    json_file: JsonFile = None,
) -> None:
    """Write a run's encoder for another library, with a model card, and check its features.

    Example: `hjepa-mlx export runs/demo-20260101-120000 --to timm`
    """
    from hjepa_mlx.export import export as write

    check_out(run, out)
    model = load(run)
    own = model.origin.run if model.origin else run
    folder = Path(out) if out else Path(own) / "export" / to
    exported = write(model, to, folder, encoder, Run(own).scores, licence)
    if output_json({"folder": str(folder), **exported._asdict()}, json_file):
        for name, size in exported.files.items():
            print(f"{size:>12,} bytes  {folder / name}")
        print(f"Largest difference from MLX: {exported.difference:.1e} ({exported.compared}).")
