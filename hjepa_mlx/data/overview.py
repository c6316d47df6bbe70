"""`hjepa-mlx datasets list`: the catalog's data sets, and which are on this machine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.table import Table

from hjepa_mlx import backend
from hjepa_mlx.config import Data
from hjepa_mlx.data import importers
from hjepa_mlx.data.catalog import CATALOG, Dataset, Range
from hjepa_mlx.data.source import data_root, layout
from hjepa_mlx.files import free_space

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


def tables(facts: dict[str, Any]) -> list[Table]:
    """The data sets, and the goal that each is good for."""
    sets = _table(f"Data sets; {facts['free_gb']:.0f} GB are free for {facts['folder']}")
    for column in ("name", "images", "pixels", "classes", "download", "on this machine"):
        sets.add_column(column, justify="right" if column in SETS_RIGHT else "left", no_wrap=True)
    goals = _table("Promised for 100 epochs on an M1 Max (not measured)")
    for column in ("your goal", "data set", "M1 Max", "probe %", "k-NN %", "rank %", "here h"):
        goals.add_column(column, no_wrap=True)
    for row in facts["datasets"]:
        sets.add_row(
            row["name"],
            f"{row['images']:,}",
            str(row["resolution"]),
            f"{row['classes']:,}",
            f"{row['download_gb']:g} GB" if row["download_gb"] else "–",
            row["here"]["layout"] or "no",
        )
        promised, here = row["promised"], row["here"]["hours_100_epochs"]
        if promised:
            goals.add_row(
                row["goal"],
                row["name"],
                _hours(promised["hours"]),
                _range(promised["linear_probe"]),
                _range(promised["knn"]),
                f"{promised['feature_rank_percent']:g}",
                "–" if here is None else f"{here:.1f}",
            )
    return [sets, goals]


SETS_RIGHT = ("images", "pixels", "classes", "download")


def _table(title: str) -> Table:
    return Table(title=title, title_justify="left", box=None, padding=(0, 1, 0, 0))


def _range(pair: Range) -> str:
    return f"{pair[0]:g}–{pair[1]:g}"


def _hours(pair: Range) -> str:
    days = pair[0] >= 48
    return f"{pair[0] / 24:g}–{pair[1] / 24:g} days" if days else f"{_range(pair)} h"
