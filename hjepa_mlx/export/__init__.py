"""An encoder for other codes: a folder in their layout, checked against MLX on the spot."""

from __future__ import annotations

import sys
import warnings
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from hjepa_mlx.config import Config
from hjepa_mlx.errors import HJEPAError, UsageError, check_choice
from hjepa_mlx.export.card import card
from hjepa_mlx.export.formats import FORMATS, WEIGHTS
from hjepa_mlx.files import atomic_folder
from hjepa_mlx.models.hjepa import ENCODERS, HJEPA
from hjepa_mlx.rng import generator
from hjepa_mlx.runs import Run, load

TOLERANCE = 1e-4  # of the largest feature, or 1; float32


class Exported(NamedTuple):
    """What was written: bytes of each file, the largest difference, and of what."""

    files: dict[str, int]
    difference: float
    compared: str


def export(
    model: HJEPA,
    to: str,
    folder: str | Path,
    encoder: str = "target",
    scores: dict[str, Any] | None = None,
    licence: str = "unknown",
) -> Exported:
    """Write the target or context encoder to a new folder, in one of FORMATS, with a model card.

    The features of a few images are compared with those of `encode`; if they differ, HJEPAError,
    and no folder is left. scores: the content of eval.json, for the card.
    """
    folder = Path(folder)
    check_choice("format", to, FORMATS)
    check_choice("encoder", encoder, ENCODERS)
    if folder.exists():
        raise UsageError(f"{folder} exists already. Delete it, or give another --out.")
    with atomic_folder(folder) as part:
        (part / "config.yaml").write_text(shareable(model.config).to_yaml())
        (part / "README.md").write_text(card(model, to, encoder, scores or {}, licence))
        with warnings.catch_warnings(), redirect_stdout(sys.stderr):
            warnings.simplefilter("ignore")  # torch and coremltools have many of their own
            difference, compared = _compared(model, to, encoder, part)
    files = {p.relative_to(folder).as_posix(): p for p in sorted(folder.rglob("*")) if p.is_file()}
    return Exported({name: p.stat().st_size for name, p in files.items()}, difference, compared)


def _compared(model: HJEPA, to: str, encoder: str, folder: Path) -> tuple[float, str]:
    """Write the files of a format; the largest difference, and between what."""
    read = FORMATS[to](model, encoder, folder)
    if isinstance(read, float):
        return read, "weights only, since this machine cannot run the converted program"
    size = model.config.data.image_size
    images = generator(0, "export").integers(0, 256, (4, size, size, 3), np.uint8)
    ours = [np.array(level) for level in model.encode(images, encoder)]
    pairs = zip(ours, read(images), strict=True)
    difference = max(float(np.abs(mine - theirs).max()) for mine, theirs in pairs)
    largest = max(float(np.abs(level).max()) for level in ours)
    if not difference <= TOLERANCE * max(1, largest):
        raise HJEPAError(f"The exported encoder is wrong: its features differ by {difference:.1e}.")
    return difference, f"features of all levels, 4 images; the largest feature is {largest:.1f}"


def shareable(config: Config) -> Config:
    """The config without the names of places on this machine."""
    other = config.model_copy(deep=True)
    other.data.dir = other.run.dir = other.model.init = None
    if other.data.labels.endswith(".csv"):
        other.data.labels = "auto"
    return other


def files_of(path: Path, licence: str) -> dict[str, bytes | Path]:
    """What `push` uploads: of a run its newest weights, config and a card; an export as it is."""
    run = Run(path)
    if run.latest is None:
        if not all((path / name).is_file() for name in ("README.md", "config.yaml")):
            raise UsageError(f"{path} is neither a run with a checkpoint nor an export.")
        return {p.relative_to(path).as_posix(): p for p in path.rglob("*") if p.is_file()}
    return {
        "README.md": card(load(path), "run", "", run.scores, licence).encode(),
        "config.yaml": shareable(run.config).to_yaml().encode(),
        **{f"checkpoints/{run.latest.name}/{x}": run.latest / x for x in (WEIGHTS, "state.json")},
    }
