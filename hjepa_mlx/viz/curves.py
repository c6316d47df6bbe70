"""Curves of a run: losses, collapse signals, k-NN and schedules over its steps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from hjepa_mlx.errors import HJEPAError
from hjepa_mlx.viz.canvas import COLOURS, WIDTH, Picture

LEVELS = range(8)  # at most
MARKERS = "os^DvP*X"  # tell levels apart beside colour
COLUMNS = 3
PANELS = (  # title, unit, key in metrics.jsonl ({} stands for the level)
    ("Prediction loss", "loss", "loss_level_{}"),
    ("Effective rank", "dimensions", "effective_rank_level_{}"),
    ("Feature std", "0 collapsed, 1 isotropic", "feature_std_level_{}"),
    ("k-NN accuracy", "% of test images", "knn_level_{}"),
    ("k-NN, all levels whitened", "% of test images", "knn_whitened"),
    ("Learning rate", "optim.lr", "lr"),
    ("Momentum", "optim.momentum", "momentum"),
)


def draw(rows: Sequence[dict[str, Any]]) -> Picture:
    """Curves of the rows of a run's metrics.jsonl; panels without a logged value are left out."""
    keys = {key for row in rows for key, value in row.items() if value is not None}
    panels = [panel for panel in PANELS if any(panel[2].format(i) in keys for i in LEVELS)]
    if not panels:
        raise HJEPAError("There are no curves yet: metrics.jsonl holds no logged step.")
    columns = min(COLUMNS, len(panels))
    lines = math.ceil(len(panels) / columns)
    figure = Picture(figsize=(WIDTH * columns / COLUMNS, 0.4 + 2.35 * lines))
    figure.set_layout_engine("constrained", w_pad=0.08, h_pad=0.08)
    for number, (title, unit, key) in enumerate(panels, 1):
        ax = figure.add_subplot(lines, columns, number)
        ax.set_title(title, loc="left", fontsize=10, weight="bold")
        ax.set(xlabel="step", ylabel=unit)
        _draw_panel(ax, key, rows)
    shown = [level for level in LEVELS if any(f"level_{level}" in key for key in keys)]
    handles = [Line2D([], [], c=COLOURS[n], marker=MARKERS[n], label=f"level {n}") for n in shown]
    if any(key.startswith("position_only") for key in keys):
        words = "loss of guessing each\nplace's average"
        handles.append(Line2D([], [], color="0.3", linestyle="--", label=words))
    place: dict[str, Any] = {"loc": "outside lower center", "ncols": 5}
    if len(panels) < lines * columns:  # there is room beside the last one
        place = {"loc": "center", "bbox_to_anchor": (1 - 0.5 / columns, 0.5 / lines)}
    figure.legend(handles=handles, frameon=False, fontsize=9, **place)
    return figure


def _draw_panel(ax: Axes, key: str, rows: Sequence[dict[str, Any]]) -> None:
    """One line per level of `key`, and dashed the loss of guessing each place's average."""
    for level in LEVELS if "{}" in key else LEVELS[:1]:
        name, colour = key.format(level), COLOURS[level] if "{}" in key else "0.3"
        for logged, style in ((name, f"-{MARKERS[level]}"), (f"position_only_{name}", "--")):
            found = [(row["step"], row[logged]) for row in rows if row.get(logged) is not None]
            if found:
                every = max(1, len(found) // 6)
                ax.plot(*zip(*found, strict=True), style, c=colour, markevery=every, markersize=4)
    ax.xaxis.set_major_locator(MaxNLocator(4, integer=True, min_n_ticks=1))
    ax.xaxis.set_major_formatter("{x:,.0f}")
    ax.grid(color="0.92")
    ax.spines[["top", "right"]].set_visible(False)
