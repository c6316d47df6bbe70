"""`hjepa-mlx finetune` and `predict`: a classifier from a run, and its answers."""

from __future__ import annotations

import csv
import io
import os
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from hjepa_mlx.cli.common import (
    DataDir,
    JsonFile,
    OtherData,
    Overrides,
    RunOrCheckpoint,
    check_out,
    in_runs,
    output_json,
    readable,
)
from hjepa_mlx.errors import UsageError, counted
from hjepa_mlx.eval.evaluation import config_for
from hjepa_mlx.eval.report import add_fine_tuned
from hjepa_mlx.files import as_unicode, atomic_write
from hjepa_mlx.progress import say
from hjepa_mlx.recipes import load_config
from hjepa_mlx.runs import Run, load
from hjepa_mlx.session import awake

NAMED = 5  # unreadable images that are named
OTHERS = ("data.name=", "data.dir=", "data.labels=", "data.bits=", "data.listing=", "data.limit=")


@readable
@awake()
def finetune(
    run: RunOrCheckpoint,
    overrides: Overrides = None,
    data: OtherData = None,
    data_dir: DataDir = None,
    out: Annotated[
        str | None,
        typer.Option(help="Folder to write. Default: finetuned or scratch in RUN."),
    ] = None,
    freeze: Annotated[
        bool, typer.Option("--freeze", help="Keep the encoder: only fit a head to its features.")
    ] = False,
    scratch: Annotated[
        bool, typer.Option("--scratch", help="Start from random weights instead, to compare.")
    ] = False,
    json_file: JsonFile = None,
) -> None:
    """Train a run's encoder and a linear head on labels, and save the classifier.

    Example: `hjepa-mlx finetune runs/demo-20260101-120000 --set finetune.epochs=20`
    """
    from hjepa_mlx import finetune as tuning

    check_out(run, out)
    model = load(run)
    if model.origin is None:
        raise UsageError(f"{run} is no run, so there is no data set with it. Give a run's folder.")
    config = config_for(load_config(model.origin.run, overrides), data, data_dir)
    if data is not None and any(one.startswith(OTHERS) for one in overrides or ()):
        raise UsageError(
            "--data brings labels, bits, limit and folder of its own. Write them into a YAML file: "
            "--data own.yaml."
        )
    own = Path(model.origin.run)
    folder = Path(out) if out else own / ("scratch" if scratch else "finetuned")
    if folder.exists() and any(folder.iterdir()):
        raise UsageError(f"{folder} is there already. Choose another --out.")
    place = Path(os.path.abspath(folder)).parent  # as far as it is there
    place = next(one for one in (place, *place.parents) if one.exists())
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        raise UsageError(f"Nothing can be written in {place}. Choose another --out.")
    config.finetune.epochs = 0 if freeze else config.finetune.epochs
    classifier, scores = tuning.finetune(model, config, scratch)
    tuning.save(classifier, folder, scores)
    if (report := Run(own).report) and out is None:
        add_fine_tuned(report.scores, own)
        report.save(own / "eval.json")
    if output_json(scores, json_file):
        _say(scores, folder)


def _say(scores: dict[str, Any], folder: Path) -> None:
    found = [f"frozen features {scores['frozen']:.1f} %"]
    found += [f"fine-tuned {scores[key]:.1f} %" for key in scores if key == "fine_tuned"]
    count = counted(scores["test_images"], "test image")
    say(Console(), f"Right on {count}: {', '.join(found)}. The classifier is in {folder}")
    if scores.get("fine_tuned", 100.0) < scores["frozen"]:
        advice = "Try more finetune.epochs or a lower finetune.lr, or take --freeze."
        say(Console(stderr=True), f"Fine-tuning made it worse. {advice}", style="yellow")


@readable
@awake()
def predict(
    model: Annotated[str, typer.Argument(parser=in_runs, help="Folder that `finetune` wrote.")],
    images: Annotated[list[str], typer.Argument(help="Image files, and folders of images.")],
    out: Annotated[str, typer.Option(metavar="FILE", help="CSV: path, label, probability.")],
) -> None:
    """Name the class of each image, with its probability.

    Example: `hjepa-mlx predict runs/demo-20260101-120000/finetuned pictures --out predictions.csv`
    """
    from hjepa_mlx import finetune as tuning

    if Path(out).suffix != ".csv" or Path(out).is_dir() or not Path(out).parent.is_dir():
        raise UsageError(f"--out {out}: give a .csv file in a folder that exists.")
    classifier = tuning.load(model)
    paths, probabilities, skipped = tuning.predict(classifier, images)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["path", "label", "probability"])
    for path, row in zip(paths, probabilities, strict=True):
        writer.writerow([as_unicode(path), classifier.classes[row.argmax()], f"{row.max():.6f}"])
    with atomic_write(Path(out)) as file:
        file.write(text.getvalue().encode())
    for path, why in list(skipped.items())[::-1][:NAMED]:  # unreadable ones first
        say(Console(stderr=True), f"Left out {path}: {why}")
    if (more := len(skipped) - NAMED) > 0:
        say(Console(stderr=True), f"Left out {more:,} more.")
    unread = f" ({len(skipped):,} left out)" if skipped else ""
    say(Console(), f"{counted(len(paths))} named{unread}; in {out}")
