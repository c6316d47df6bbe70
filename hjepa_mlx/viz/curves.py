"""Curves of a run: losses, collapse signals, k-NN and schedules over its steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, StrMethodFormatter

from hjepa_mlx.errors import HJEPAError
from hjepa_mlx.viz.canvas import COLOURS, WIDTH, Picture

LEVELS = range(4)  # at most
MARKERS = "os^D"  # tell levels apart beside colour
COLUMNS = 3
PANELS = (  # title, unit, key in metrics.jsonl ({} stands for the level)
    ("Prediction loss", "loss", "loss_level_{}"),
    ("Effective rank", "dimensions", "effective_rank_level_{}"),
    ("Feature std", "0 collapsed, 1 isotropic", "feature_std_level_{}"),
    ("k-NN accuracy", "% of test images", "knn_level_{}"),
    ("Learning rate", "optim.lr", "lr"),
    ("Momentum", "optim.momentum", "momentum"),
)

Rows = Sequence[dict[str, Any]]


def draw(rows: Rows) -> Picture:
    """Curves of the rows of a run's metrics.jsonl; panels without a logged value are left out."""
    keys = {key for row in rows for key, value in row.items() if value is not None}
    panels = [panel for panel in PANELS if any(panel[2].format(i) in keys for i in LEVELS)]
    if not panels:
        raise HJEPAError("There are no curves yet: metrics.jsonl holds no logged step.")
    columns = min(COLUMNS, len(panels))
    lines = -(-len(panels) // columns)
    size = (WIDTH * columns / COLUMNS, 0.4 + 2.35 * lines)
    figure = Picture(figsize=size, facecolor="white")
    figure.set_layout_engine("constrained", w_pad=0.08, h_pad=0.08)
    for number, (title, unit, key) in enumerate(panels, 1):
        ax = figure.add_subplot(lines, columns, number)
        ax.set_title(title, loc="left", fontsize=10, weight="bold")
        ax.set_ylabel(unit, fontsize=9)
        draw_panel(ax, key, rows)
    handles = [
        Line2D([], [], color=COLOURS[level], marker=MARKERS[level], label=f"level {level}")
        for level in LEVELS
        if any(f"level_{level}" in key for key in keys)
    ]
    if any(key.startswith("position_only") for key in keys):
        words = "loss of knowing\nonly the position"
        handles.append(Line2D([], [], color="0.3", linestyle="--", label=words))
    style: dict[str, Any] = {"handles": handles, "frameon": False, "fontsize": 9}
    if len(panels) < lines * columns:  # there is room beside the last one
        ax = figure.add_subplot(lines, columns, lines * columns)
        ax.set_axis_off()
        ax.legend(loc="center", **style)
    else:
        figure.legend(loc="outside lower center", ncols=5, **style)
    return figure


def draw_panel(ax: Axes, key: str, rows: Rows) -> None:
    """One line per level of `key`, and dashed the loss of knowing only the position, if logged."""
    by_level = "{}" in key
    for level in LEVELS if by_level else LEVELS[:1]:
        colour = COLOURS[level] if by_level else "0.3"
        steps, values = points(rows, key.format(level))
        every = max(1, len(steps) // 6)
        ax.plot(steps, values, color=colour, marker=MARKERS[level], markevery=every, markersize=4)
        dashed = points(rows, f"position_only_{key.format(level)}")
        if dashed[0].size:
            ax.plot(*dashed, color=colour, linestyle="--")
    ax.set_xlabel("step", fontsize=9)
    ax.xaxis.set_major_locator(MaxNLocator(4, integer=True, min_n_ticks=1))
    ax.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    ax.tick_params(labelsize=8)
    ax.grid(color="0.92")
    ax.spines[["top", "right"]].set_visible(False)


def points(rows: Rows, key: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values [n] of the rows that hold a number for `key`."""
    found = [(row["step"], row[key]) for row in rows if row.get(key) is not None]
    steps, values = np.array(found, float).reshape(-1, 2).T
    return steps, values
