"""Embeddings: a trained encoder's features of a person's images, in a file others can read.

embeddings = embed(hj.load("runs/demo"), "pictures")
embeddings.levels["level_2"]  # [N, D] float32, in the order of embeddings.paths
save(embeddings, "features.npz")
"""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import mlx.core as mx
import numpy as np

from hjepa_mlx.data.frame import Frame
from hjepa_mlx.data.listing import summary
from hjepa_mlx.data.pipeline import Skipped
from hjepa_mlx.data.source import pictures
from hjepa_mlx.errors import UsageError, check_choice, counted, required
from hjepa_mlx.eval.features import extract, model_features
from hjepa_mlx.files import as_unicode, atomic_write, check_space
from hjepa_mlx.models.hjepa import ENCODERS, HJEPA

LONGEST_HEADER = 90_000_000  # bytes: readers of safetensors refuse 100 MB
ROW_GROUP = 4096  # rows of a parquet file that are encoded at once


@dataclass(frozen=True)
class Embeddings:
    """Embeddings of N images, and how they came about.

    levels: level_0 (finest), level_1, … → [N, D] float32, or with every cell [N, rows, columns, D].
    Paths are relative to the folder (of several places: to the one that holds them all): N in
    `paths`, and in `skipped` (path → reason) those that could not be read. left_out: a line about
    files that are no images.
    """

    levels: dict[str, np.ndarray]
    paths: list[str]
    skipped: dict[str, str]
    about: dict[str, str]
    left_out: str = ""


def embed(
    model: HJEPA,
    folder: str | Path | Sequence[str | Path],
    encoder: str = "target",
    pooled: bool = True,
    out: str | Path | None = None,
    image_size: int | tuple[int, int] | None = None,
    fit: str = "crop",
) -> Embeddings:
    """Embed all images under `folder`: the central square of each, at the model's image size.

    folder: also an image, a .txt file with a path a line, or several of these. encoder: target or
    context. pooled: the mean over each level's cells; otherwise every cell, on its grid. out: the
    file for `save`, refused now if saving would fail in the end. image_size: another side, or
    height and width, in pixels, multiples of the patch. fit: "crop" takes the largest central part
    of that shape, "whole" resizes the whole picture to it. Images that cannot be read are left out.
    Other images change an embedding by rounding at most.
    """
    check_choice("encoder", encoder, ENCODERS)
    config, skipped = model.config, Skipped()
    frame = Frame.of(config, image_size, fit)
    places = [folder] if isinstance(folder, (str, Path)) else folder
    source, found_in = pictures(places, config.data.bits)
    names = dict(zip(found_in.paths, map(as_unicode, found_in.names), strict=True))
    paths = list(names.values())
    if out is not None:
        cells = int(config.model.levels) if pooled else config.cells(frame.height, frame.width)
        _check_out(Path(out), pooled, 4 * cells * int(config.model.dim) * len(source), paths)
    mx.eval(model.parameters())  # here: the threads that encode could not
    encoders = partial(model_features, model, encoder, pooled=pooled)
    (found,) = extract(lambda: [encoders()], source, config, skipped, frame=frame)
    about = {"run": model.origin.run, "step": str(model.origin.step)} if model.origin else {}
    sides = [frame.height, frame.width][: 1 + (frame.height != frame.width)]
    about |= {"encoder": encoder, "image_size": "x".join(map(str, sides)), "fit": fit}
    return Embeddings(
        found.pooled,
        [paths[row] for row in found.indices],
        {names[path]: why for path, why in skipped.items()},
        {**about, "folder": as_unicode(found_in.root)},
        summary(found_in.left_out),
    )


def save(embeddings: Embeddings, path: str | Path) -> None:
    """Write `embeddings` to `path`, whole or not at all: .npz, .safetensors, .parquet or .csv.

    .npz: arrays level_0 …, `paths` [N], and `about`, a JSON object as a string. .safetensors:
    arrays level_0 …; metadata with `paths`, a JSON list. .parquet: columns `path`, and level_0 … as
    fixed-size lists; the rest in the schema's metadata. .csv: columns path, level_0_0, level_0_1 …
    """
    path = Path(path)
    _check_out(path, next(iter(embeddings.levels.values())).ndim == 2)
    about = {**embeddings.about, "skipped": json.dumps(embeddings.skipped)}
    with atomic_write(path) as file:
        WRITERS[path.suffix](file, embeddings, about)


def _npz(file: BinaryIO, embeddings: Embeddings, about: dict[str, str]) -> None:
    arrays: dict[str, Any] = {**embeddings.levels, "paths": embeddings.paths}
    np.savez(file, about=json.dumps(about), **arrays)


def _safetensors(file: BinaryIO, embeddings: Embeddings, about: dict[str, str]) -> None:
    """Array by array: MLX's writer would hold a copy of them all."""
    header: dict[str, Any] = {"__metadata__": {**about, "paths": json.dumps(embeddings.paths)}}
    end = 0
    for name, x in embeddings.levels.items():
        begin, end = end, end + x.nbytes
        header[name] = {"dtype": "F32", "shape": x.shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    for x in embeddings.levels.values():
        file.write(x.data)


def _parquet(file: BinaryIO, embeddings: Embeddings, about: dict[str, str]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = {"path": pa.array(embeddings.paths, pa.string())}
    for name, x in embeddings.levels.items():
        columns[name] = pa.FixedSizeListArray.from_arrays(pa.array(x.reshape(-1)), x.shape[1])
    table = pa.table(columns, metadata=about)
    pq.write_table(table, file, row_group_size=ROW_GROUP, use_dictionary=False)


def _csv(file: BinaryIO, embeddings: Embeddings, about: dict[str, str]) -> None:
    text = io.TextIOWrapper(file, "utf-8", newline="")
    table = csv.writer(text, lineterminator="\n")
    sizes = {name: x.shape[1] for name, x in embeddings.levels.items()}
    table.writerow(["path", *(f"{name}_{i}" for name, size in sizes.items() for i in range(size))])
    for path, *row in zip(embeddings.paths, *embeddings.levels.values(), strict=True):
        table.writerow([path, *(f"{value:.9g}" for x in row for value in x.tolist())])
    text.detach()


WRITERS = {".npz": _npz, ".safetensors": _safetensors, ".parquet": _parquet, ".csv": _csv}


def _check_out(path: Path, pooled: bool, size: int = 0, names: Sequence[str] = ()) -> None:
    """Refuse a file that could not be written in the end, with `size` bytes of arrays."""
    if path.suffix not in WRITERS:
        raise UsageError(f"{path}: the file's name must end in {', '.join(WRITERS)}.")
    if path.suffix in (".parquet", ".csv") and not pooled:
        raise UsageError(
            f"A {path.suffix} file holds one vector per image; for every cell, use .npz."
        )
    if path.suffix == ".parquet":
        required("pyarrow", "hub")
    if path.is_dir():
        raise UsageError(f"{path} is a folder; give a file.")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise UsageError(f"{path}: the folder {path.parent} does not exist or is not writable.")
    size += 4 * len(names) * max(map(len, names), default=0)
    needs = f"The embeddings of {counted(len(names))} take"
    check_space(needs, size, path.parent, "Free some, or choose another --out.")
    if path.suffix == ".safetensors" and len(json.dumps(json.dumps(names))) > LONGEST_HEADER:
        raise UsageError(f"A .safetensors file cannot hold {len(names):,} names; use .npz.")
