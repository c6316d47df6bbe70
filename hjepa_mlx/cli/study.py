"""`hjepa-mlx eval`, `viz`, `compare` and `embed`: what to do with runs once they are trained."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from hjepa_mlx.cli.common import DataDir, JsonFile, check_writable, output_json, readable
from hjepa_mlx.session import awake

NAMED = 5  # unreadable images that are named in the terminal; the file names them all


RunOrCheckpoint = Annotated[str, typer.Argument(help="Run folder, or one of its checkpoints.")]
OtherData = Annotated[
    str | None,
    typer.Option(metavar="NAME_OR_CONFIG", help="Use this data set instead of the run's own."),
]


@readable
def evaluate(
    run: RunOrCheckpoint,
    data: OtherData = None,
    data_dir: DataDir = None,
    json_file: JsonFile = None,
    k: Annotated[int, typer.Option(help="Neighbours that vote.")] = 20,
    probe: Annotated[
        str, typer.Option(help="Linear probe: logistic_regression (converged) or sgd (a grid).")
    ] = "logistic_regression",
    draws: Annotated[int, typer.Option(help="Draws of few labels; 0: leave them out.")] = 5,
    token_gb: Annotated[
        float,
        typer.Option(
            help="Disk for the attentive probe's tokens, GB per split and network (up to 4 times "
            "this in all); 0: leave the probe out."
        ),
    ] = 4.0,
) -> None:
    """Say what a run learned, per level, beside random initialisation and raw pixels.

    Example: `hjepa-mlx eval runs/demo-20260101-120000 --json scores.json`
    """
    check_writable(json_file)
    protocol = {"k": k, "probe": probe, "draws": draws, "token_gb": token_gb}
    report(Path(run), data, data_dir, json_file, protocol)


@awake()
def report(
    path: Path,
    data: str | None = None,
    data_dir: str | None = None,
    json_file: str | None = None,
    protocol: dict[str, Any] | None = None,
) -> None:
    """Evaluate a run, print the tables and keep the scores in its eval.json."""
    from rich.console import Console

    from hjepa_mlx.eval.evaluation import evaluate
    from hjepa_mlx.eval.protocols import Protocol
    from hjepa_mlx.runs import load

    settings = Protocol(**(protocol or {}))
    found = evaluate(load(path), data, data_dir, settings)
    if data is None and data_dir is None and (path / "config.yaml").is_file():
        found.save(path / "eval.json")  # first: whoever reads what is printed may be gone
    output_json(found.scores, json_file)
    if json_file != "-":
        Console().print(found)


@readable
def viz(
    run: Annotated[str, typer.Argument(help="Run folder.")],
    data: OtherData = None,
    data_dir: DataDir = None,
    out: Annotated[
        str | None, typer.Option(metavar="FOLDER", help="Where to write. Default: RUN/viz.")
    ] = None,
) -> None:
    """Draw a run: masks, features, neighbours and curves, and one HTML page with all of them.

    Example: `hjepa-mlx viz runs/demo-20260101-120000`
    """
    from rich.console import Console

    from hjepa_mlx.eval.evaluation import config_for
    from hjepa_mlx.runs import Run
    from hjepa_mlx.viz.report import make

    chosen = Run(run)
    shown = config_for(chosen.config, data, data_dir).data
    with Console(stderr=True).status("Drawing"):
        paths = make(chosen, Path(out) if out else None, shown)
    for path in paths:
        print(path)


@readable
@awake()
def embed(
    run: RunOrCheckpoint,
    folder: Annotated[str, typer.Argument(help="Images: all in this folder and its subfolders.")],
    out: Annotated[
        str, typer.Option(metavar="FILE", help="To write: .npz, .safetensors or .parquet.")
    ],
    encoder: Annotated[str, typer.Option(help="target or context.")] = "target",
    tokens: Annotated[
        bool, typer.Option("--tokens", help="Keep every cell of each level, not their mean.")
    ] = False,
) -> None:
    """Turn a folder of images into one vector per image and level.

    Example: `hjepa-mlx embed runs/demo-20260101-120000 pictures --out features.npz`
    """
    from rich.console import Console

    from hjepa_mlx.embed import embed as run_over
    from hjepa_mlx.embed import save
    from hjepa_mlx.progress import say
    from hjepa_mlx.runs import load

    embeddings = run_over(load(run), folder, encoder, not tokens, out)
    save(embeddings, out)
    unreadable = list(embeddings.skipped.items())
    for path, why in unreadable[:NAMED]:
        say(Console(stderr=True), f"Skipped {path}: {why}")
    more = f" ({len(unreadable):,} unreadable, named in the file)" if unreadable else ""
    levels = ", ".join(
        f"{name} {'×'.join(map(str, array.shape[1:]))}" for name, array in embeddings.levels.items()
    )
    say(Console(), f"{len(embeddings.paths):,} images embedded{more}: {levels}; in {out}")


@readable
def compare(
    runs: Annotated[list[str], typer.Argument(help="Two or more run folders.")],
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
