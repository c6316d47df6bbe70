"""`hjepa-mlx datasets list`: the catalog's data sets, and which are on this machine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hjepa_mlx import backend
from hjepa_mlx.data import importers
from hjepa_mlx.data.catalog import CATALOG, Dataset
from hjepa_mlx.data.source import data_root, layout
from hjepa_mlx.files import free_space
from hjepa_mlx.sections import Data

SHOWN = {"name", "title", "resolution", "classes", "download_gb", "goal", "terms"}
RESULTS = Path("benchmarks/results")  # of `hjepa-mlx bench`


def overview(data: Data) -> dict[str, Any]:
    """Every data set's row, whether it is in `data.dir`, and the disk's free space in GB."""
    root = data_root(data)
    hours = hours_here(RESULTS)
    rows = [_row(row, data, hours.get(row.name)) for row in CATALOG.values()]
    return {"folder": str(root), "free_gb": free_space(root) / 1e9, "datasets": rows}


def _row(row: Dataset, data: Data, hours: float | None) -> dict[str, Any]:
    promise = row.promise and {
        **row.promise.model_dump(exclude={"rank"}),
        "feature_rank_percent": row.promise.rank,
    }
    return {
        **row.model_dump(include=SHOWN),
        "images": row.images,
        "promised": promise,
        "published": row.published and row.published.model_dump(),
        "here": {"layout": _layout(row, data), "hours_100_epochs": hours},
    }


def _layout(row: Dataset, data: Data) -> str | None:
    """In which form the data set is here: prepared, or as published, which has to be prepared."""
    if layout(row.name, data) or row.parts:
        return layout(row.name, data)
    found = importers.find(row.name, data_root(data))
    return found and f"{found.layout}, not prepared"


def hours_here(results: Path) -> dict[str, float]:
    """Hours of 100 epochs by data set, from the newest `hjepa-mlx bench` of this machine."""
    files = sorted(results.glob("*.json"), key=lambda path: path.stat().st_mtime)
    for path in reversed(files):
        try:
            facts = json.loads(path.read_text())
            if facts["machine"]["chip"] != backend.chip():
                continue
            hours: dict[str, float] = {}
            for row in facts["estimates"]:  # a data set's own recipe comes first
                hours.setdefault(row["dataset"], float(row["hours_100_epochs"]))
            return hours
        except (OSError, ValueError, KeyError, TypeError):
            continue  # the result of another benchmark
    return {}
