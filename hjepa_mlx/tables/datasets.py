"""The tables of `hjepa-mlx datasets list`."""

from __future__ import annotations

from typing import Any

from rich.table import Table

from hjepa_mlx.tables import hour_span, number, span, table


def datasets(facts: dict[str, Any]) -> list[Table]:
    """The data sets, whether they are here, and the figures that each is promised to reach."""
    rows = facts["datasets"]
    sets = table(
        f"Data sets; {facts['free_gb']:.0f} GB are free for {facts['folder']}",
        ("name", "images", "pixels", "classes", "download GB", "on this machine"),
        [
            (
                row["name"],
                f"{row['images']:,}",
                row["resolution"],
                f"{row['classes']:,}",
                f"{row['download_gb']:g}" if row["download_gb"] else "–",
                row["here"]["layout"] or "no",
            )
            for row in rows
        ],
    )
    published = [
        f"{row['name']}, {row['published']['of']}: probe {row['published']['linear_probe']:g} %, "
        f"k-NN {row['published']['knn']:g} %"
        for row in rows
        if row["published"]
    ]
    goals = table(
        "Promised for 100 epochs on an M1 Max (not measured)",
        ("your goal", "data set", "M1 Max", "probe %", "k-NN %", "rank %", "here h"),
        [
            (
                row["goal"],
                row["name"],
                hour_span(promised["hours"]),
                span(promised["linear_probe"]),
                span(promised["knn"]),
                f"{promised['feature_rank_percent']:g}",
                number(row["here"]["hours_100_epochs"]),
            )
            for row in rows
            if (promised := row["promised"])
        ],
        f"Nearest published figures: {'; '.join(published)}.",
    )
    return [sets, goals]
