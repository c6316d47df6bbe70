"""Sources of every data set, found on this machine and checked, by name."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from shlex import quote
from typing import get_args

import numpy as np

from hjepa_mlx.config import Data
from hjepa_mlx.data import imagenet, raw
from hjepa_mlx.data.catalog import CATALOG, Dataset
from hjepa_mlx.data.folder import open_folder
from hjepa_mlx.data.source import Source, Split
from hjepa_mlx.data.storage import Joined
from hjepa_mlx.errors import HJEPAError, UsageError, did_you_mean

DEBIAN_FASHION = Path("/usr/share/datasets/fashion-mnist")


def open_source(data: Data, split: Split) -> Source:
    """The images of a data set's split; `data.limit` cuts what is trained on.

    `a+b` is both: pretraining sees both, evaluation the first. What is not on this machine raises
    HJEPAError with the command that gets it.
    """
    if split not in get_args(Split):
        raise UsageError(f"No split '{split}'. There are: {', '.join(get_args(Split))}.")
    names = check_name(data)
    if split != "pretrain" or len(names) == 1:
        source = _open_one(names[0], data, split)
        return source if split == "test" else source.some(data.limit, "limit")
    sources = [_open_one(name, data, split) for name in names]
    if data.limit is not None:
        total = sum(map(len, sources))
        limits = [max(1, round(data.limit * len(source) / total)) for source in sources]
        sources = [s.some(limit, "limit") for s, limit in zip(sources, limits, strict=True)]
    parts = tuple(len(source) for source in sources)
    offsets = np.cumsum([0, *(len(source.images) for source in sources)])
    rows = [source.rows + offset for source, offset in zip(sources, offsets, strict=False)]
    joined = Joined([source.images for source in sources])
    shares: tuple[int, ...] = ()
    if data.weights != "auto":
        ends = np.round(np.cumsum(data.weights) / np.sum(data.weights) * sum(parts))
        shares = tuple(np.diff(ends, prepend=0).astype(int).tolist())
    return Source(data.name, joined, np.concatenate(rows), np.zeros(0, np.int64), (), parts, shares)


def check_name(data: Data) -> list[str]:
    """Names of the data sets of `data.name`, known and with as many weights."""
    names = data.name.split("+")
    known = list(SOURCES) if len(names) > 1 else [*SOURCES, "folder"]
    for name in names:
        if name not in known:
            hint = did_you_mean(name, known)
            raise UsageError(
                f"No data set '{name}'.{hint} There are: {', '.join(known)}; a+b for both."
            )
    if len(set(names)) < len(names):
        raise UsageError(f"data.name={data.name} has a data set twice; use data.weights.")
    if data.weights != "auto" and len(data.weights) != len(names):
        raise UsageError(
            f"data.weights={data.weights} needs one weight per data set; data.name={data.name} has "
            f"{len(names)}."
        )
    return names


def _open_one(name: str, data: Data, split: Split) -> Source:
    if name == "folder":
        if data.dir is None:
            raise UsageError("data.name=folder needs the folder of images: give --data-dir FOLDER.")
        return open_folder(Path(data.dir).expanduser(), split)
    root = data_root(data)
    places = [root / name, root]
    if name == "fashion-mnist" and data.dir is None:
        places.append(DEBIAN_FASHION)
    source = SOURCES[name](places, split)
    if source is None:
        raise HJEPAError(missing(CATALOG[name], root))
    return source


def layout(name: str, data: Data) -> str | None:
    """In which layout a data set of the catalog is on this machine, in words."""
    root = data_root(data)
    parts = [part for part in name.split("+") if part.startswith("imagenet")]
    found = [imagenet.layout(part, [root / part, root]) for part in parts]
    if None in found:
        return None
    words = [where[0] for where in found if where]
    try:
        for part in set(name.split("+")) - set(parts):
            open_source(data.whole(part), "pretrain")
            words.append("raw pixels")
    except HJEPAError:
        return None
    return " + ".join(words)


def missing(row: Dataset, root: Path) -> str:
    """What to do when a data set is not on this machine."""
    place = "" if str(root) == "data" else f" --data-dir {quote(str(root))}"
    command = f"hjepa-mlx datasets download {row.name}{place}"
    what = f"{row.title} is not in {root / row.name}."
    if row.files or row.hub:
        return f"{what} Get it ({row.download_gb:g} GB) with: {command}"
    return f"{what} How to get it: {command}"


def data_root(data: Data) -> Path:
    """The folder that holds one folder per data set."""
    return Path(data.dir or os.environ.get("HJEPA_DATA") or "data").expanduser()


SOURCES: dict[str, Callable[[list[Path], Split], Source | None]] = {
    "demo": raw.demo,
    "fashion-mnist": raw.fashion_mnist,
    "cifar10": raw.cifar10,
    "stl10": raw.stl10,
    "imagenet100": partial(imagenet.find, "imagenet100"),
    "imagenet1k": partial(imagenet.find, "imagenet1k"),
}
