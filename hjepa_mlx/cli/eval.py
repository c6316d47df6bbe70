"""`hjepa-mlx eval`: the evaluation of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from hjepa_mlx.cli.common import (
    DataDir,
    Fit,
    ImageSize,
    JsonFile,
    OtherData,
    RunOrCheckpoint,
    output_json,
    readable,
    sides,
)
from hjepa_mlx.data.folder import record_of
from hjepa_mlx.errors import HJEPAError
from hjepa_mlx.eval.evaluation import Protocol, config_for
from hjepa_mlx.eval.evaluation import evaluate as measure
from hjepa_mlx.progress import say
from hjepa_mlx.runs import Run, load
from hjepa_mlx.session import awake


@readable
def evaluate(
    run: RunOrCheckpoint,
    data: OtherData = None,
    data_dir: DataDir = None,
    json_file: JsonFile = None,
    k: Annotated[int, typer.Option(help="Neighbours that vote.")] = 20,
    draws: Annotated[int, typer.Option(help="Draws of few labels; 0: leave them out.")] = 5,
    attentive_images: Annotated[
        int | None,
        typer.Option(help="Training images for the attentive probe; 0: leave it out."),
    ] = None,
    image_size: ImageSize = None,
    fit: Fit = "crop",
) -> None:
    """Show how good a run's features are, per level, beside random initialisation and raw pixels.

    Example: `hjepa-mlx eval runs/demo-20260101-120000 --json scores.json`
    """
    protocol: dict[str, Any] = {"k": k, "draws": draws, "attentive_images": attentive_images}
    protocol |= {"image_size": sides(image_size), "fit": fit}
    report(Path(run), data, data_dir, json_file, **protocol)


@awake()
def report(
    path: Path,
    data: str | None = None,
    data_dir: str | None = None,
    json_file: str | None = None,
    **protocol: Any,
) -> None:
    """Evaluate a run, print the tables and keep the scores in its eval.json."""
    model = load(path)
    found = measure(model, data, data_dir, Protocol(**protocol))
    used = config_for(model.config, None, data_dir).data
    same = data is None and record_of(path, model.config.data, used) is not None
    plain = same and protocol.get("image_size") is None
    if plain and protocol.get("fit") != "whole" and (path / "config.yaml").is_file():
        if lost := _lost(path, found.scores, protocol):
            say(Console(stderr=True), f"Not kept: {path / 'eval.json'} has {lost} too.")
        else:  # first: whoever reads the output may be gone
            found.save(path / "eval.json")
    if output_json(found.scores, json_file):
        Console().print(found)


def _lost(path: Path, new: dict[str, Any], protocol: dict[str, Any]) -> str:
    """What a run's kept scores of the same step have, and these were asked to leave out."""
    if 0 not in (protocol.get("draws"), protocol.get("attentive_images")):
        return ""
    try:
        kept = Run(path).scores
    except HJEPAError:  # a damaged file has nothing to lose
        return ""
    same = (kept.get("trained") or {}).get("step") == new["trained"]["step"]
    left_out = {"attentive_probe": "the attentive probe", "few_labels_1_percent": "few labels"}
    return " and ".join(v for k, v in left_out.items() if same and k in kept and k not in new)
