"""Embeddings: what a trained encoder makes of a folder of images, in a file others can read.

embeddings = embed(hj.load("runs/demo"), "pictures")
embeddings.levels["level_2"]  # [N, D] float32, in the order of embeddings.paths
save(embeddings, "features.npz")
"""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import mlx.core as mx
import numpy as np

from hjepa_mlx.data.pipeline import Skipped
from hjepa_mlx.data.source import Source, tree
from hjepa_mlx.errors import UsageError
from hjepa_mlx.eval.features import extract, model_features
from hjepa_mlx.files import atomic_write, check_space
from hjepa_mlx.models.hjepa import HJEPA

LONGEST_HEADER = 90_000_000  # bytes: what reads safetensors refuses 100 MB
ROW_GROUP = 4096  # rows of a parquet file that are encoded at once


@dataclass(frozen=True)
class Embeddings:
    """Embeddings of N images, and how they came about.

    levels: level_0 (finest), level_1, … → [N, D] float32, or [N, n_l, D] with every cell. Paths
    are relative to the folder: N in `paths`, and in `skipped` (path → reason) those left out.
    """

    levels: dict[str, np.ndarray]
    paths: list[str]
    skipped: dict[str, str]
    about: dict[str, str]


def embed(
    model: HJEPA,
    folder: str | Path,
    encoder: str = "target",
    pooled: bool = True,
    out: str | Path | None = None,
) -> Embeddings:
    """Embed all images under `folder`: the central square of each, at the model's image size.

    encoder: target or context. pooled: the mean over each level's cells; otherwise every cell,
    in raster order. out: the file to be saved to, refused now if saving would fail in the end.
    Images that cannot be read are left out. An image's embedding depends on its place in a batch by
    rounding (of some BLAS), and on the other images not at all.
    """
    if encoder not in ("target", "context"):
        raise UsageError(f"There is no encoder '{encoder}'; there are target and context.")
    if out is not None:
        _check_out(Path(out), pooled)
    source, size = _open(Path(folder)), model.config.data.image_size
    paths = [_relative(source.name_of(index), folder) for index in range(len(source))]
    shapes = [level.shape[1:] for level in model.encode(np.zeros((1, size, size, 3), np.uint8))]
    values = sum(shape[1] if pooled else shape[0] * shape[1] for shape in shapes)
    _check_room(4 * values * len(source), paths, out)
    skipped = Skipped()
    mx.eval(model.parameters())  # here: the threads that encode could not
    (found,) = extract(
        lambda: [model_features(model, encoder, pooled=pooled)],
        source,
        model.config,
        skipped,
        joined=False,
    )
    return Embeddings(
        found.by_name,
        [paths[row] for row in found.indices],
        {_relative(path, folder): why for path, why in skipped.reasons.items()},
        {
            **({"run": model.origin.run, "step": str(model.origin.step)} if model.origin else {}),
            "encoder": encoder,
            "image_size": str(size),
            "folder": _text(str(folder)),
        },
    )


def _open(folder: Path) -> Source:
    if not folder.is_dir():
        raise UsageError(f"The image folder {folder} does not exist.")
    return tree(folder)


def save(embeddings: Embeddings, path: str | Path) -> None:
    """Write `embeddings` to `path`, whole or not at all: .npz, .safetensors or .parquet."""
    path = Path(path)
    _check_out(path, next(iter(embeddings.levels.values())).ndim == 2)
    with atomic_write(path) as file:
        FORMATS[path.suffix](file, embeddings)


def _npz(file: BinaryIO, embeddings: Embeddings) -> None:
    """Arrays level_0 …, `paths` [N] and `about`: a JSON object as a string."""
    arrays: dict[str, Any] = dict(embeddings.levels)
    arrays["paths"] = np.array(embeddings.paths)
    arrays["about"] = np.array(json.dumps(_about(embeddings)))
    np.savez(file, **arrays)


def _safetensors(file: BinaryIO, embeddings: Embeddings) -> None:
    """Arrays level_0 …; metadata with `paths`: a JSON list. MLX's writer would copy the arrays."""
    header: dict[str, dict] = {
        "__metadata__": {**_about(embeddings), "paths": json.dumps(embeddings.paths)}
    }
    end = 0
    for name, array in embeddings.levels.items():
        begin, end = end, end + array.nbytes
        header[name] = {"dtype": "F32", "shape": array.shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    for array in embeddings.levels.values():
        file.write(array.data)


def _parquet(file: BinaryIO, embeddings: Embeddings) -> None:
    """Columns `path`, and level_0 … as fixed-size lists; the rest in the schema's metadata."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = {"path": pa.array(embeddings.paths, pa.string())}
    for name, array in embeddings.levels.items():
        flat = pa.array(array.reshape(-1))  # not copied
        columns[name] = pa.FixedSizeListArray.from_arrays(flat, array.shape[1])
    table = pa.table(columns, metadata=_about(embeddings))
    pq.write_table(table, file, row_group_size=ROW_GROUP, use_dictionary=False)


FORMATS: dict[str, Callable[[BinaryIO, Embeddings], None]] = {
    ".npz": _npz,
    ".safetensors": _safetensors,
    ".parquet": _parquet,
}


def _about(embeddings: Embeddings) -> dict[str, str]:
    return {**embeddings.about, "skipped": json.dumps(embeddings.skipped)}


def _relative(path: str, folder: str | Path) -> str:
    return _text(path[len(os.path.join(Path(folder), "")) :])


def _text(path: str) -> str:
    """A path as Unicode that every format can hold: bytes that are no UTF-8 become \\xff."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def _check_out(path: Path, pooled: bool) -> None:
    """Refuse a file that could not be written in the end."""
    if path.suffix not in FORMATS:
        raise UsageError(f"{path}: the file's name must end in .npz, .safetensors or .parquet.")
    if path.suffix == ".parquet" and not pooled:
        raise UsageError("Parquet holds one vector per image; for every cell take .npz.")
    if path.suffix == ".parquet" and importlib.util.find_spec("pyarrow") is None:
        raise UsageError("Writing .parquet needs pyarrow: pip install 'hjepa-mlx[hub]'.")
    if path.is_dir():
        raise UsageError(f"{path} is a folder; give a file.")
    if not path.parent.is_dir():
        raise UsageError(f"{path}: the folder {path.parent} does not exist.")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise UsageError(f"{path}: files cannot be made in {path.parent}.")


def _check_room(size: int, paths: list[str], out: str | Path | None) -> None:
    """Refuse `size` bytes of embeddings that the file's disk or its format cannot hold."""
    if out is None:
        return
    names = json.dumps(json.dumps(paths))
    size += 4 * len(paths) * max(map(len, paths)) if Path(out).suffix == ".npz" else len(names)
    what = f"The embeddings of {len(paths):,} images take"
    check_space(what, size, Path(out).parent, "Free some, or choose another --out.")
    if Path(out).suffix == ".safetensors" and len(names) > LONGEST_HEADER:
        raise UsageError(f"{len(paths):,} names are too many for .safetensors; take .npz.")
