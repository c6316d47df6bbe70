"""Curves of a run: losses, collapse signals, k-NN and schedules over its steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, StrMethodFormatter

from hjepa_mlx.errors import HJEPAError
from hjepa_mlx.viz.canvas import COLOURS, WIDTH, Picture

LEVELS = range(4)  # at most
MARKERS = "os^D"  # what tells levels apart beside colour
COLUMNS = 3

Rows = Sequence[dict[str, Any]]


class Panel(NamedTuple):
    """What one set of axes shows: a key of the metrics, `{}` standing for the level if any."""

    title: str
    unit: str
    key: str
    dashed: str | None = None


PANELS = (
    Panel("Prediction loss", "loss", "loss_level_{}", "position_only_loss_level_{}"),
    Panel("Effective rank", "dimensions", "effective_rank_level_{}"),
    Panel("Feature std", "0 collapsed, 1 isotropic", "feature_std_level_{}"),
    Panel("k-NN accuracy", "% of test images", "knn_level_{}"),
    Panel("Learning rate", "optim.lr", "lr"),
    Panel("Momentum", "optim.momentum", "momentum"),
)


def draw(rows: Rows) -> Picture:
    """Curves of the rows of a run's metrics.jsonl; what was never logged is left out."""
    panels = [panel for panel in PANELS if any(points(rows, key)[0].size for key in _keys(panel))]
    if not panels:
        raise HJEPAError("There are no curves yet: metrics.jsonl holds no logged step.")
    columns = min(COLUMNS, len(panels))
    lines = -(-len(panels) // columns)
    size = (WIDTH * columns / COLUMNS, 0.4 + 2.35 * lines)
    figure = Picture(figsize=size, facecolor="white")
    figure.set_layout_engine("constrained", w_pad=0.08, h_pad=0.08)
    for number, panel in enumerate(panels, 1):
        draw_panel(figure.add_subplot(lines, columns, number), panel, rows)
    handles = [
        Line2D([], [], color=COLOURS[level], marker=MARKERS[level], label=f"level {level}")
        for level in LEVELS
        if any(f"level_{level}" in key for row in rows for key in row)
    ]
    if any(panel.dashed and points(rows, panel.dashed.format(0))[0].size for panel in panels):
        words = "loss of knowing\nonly the position"
        handles.append(Line2D([], [], color="0.3", linestyle="--", label=words))
    if len(panels) < lines * columns:  # there is room beside the last one
        ax = figure.add_subplot(lines, columns, lines * columns)
        ax.set_axis_off()
        ax.legend(handles=handles, loc="center", frameon=False, fontsize=9)
    else:
        figure.legend(
            handles=handles, loc="outside lower center", ncols=5, frameon=False, fontsize=9
        )
    return figure


def draw_panel(ax: Axes, panel: Panel, rows: Rows) -> None:
    """The curves of one panel, a line per level."""
    by_level = "{}" in panel.key
    for level, key in enumerate(_keys(panel)):
        colour = COLOURS[level] if by_level else "0.3"
        steps, values = points(rows, key)
        every = max(1, len(steps) // 6)
        ax.plot(steps, values, color=colour, marker=MARKERS[level], markevery=every, markersize=4)
        if panel.dashed:
            ax.plot(*points(rows, panel.dashed.format(level)), color=colour, linestyle="--")
    ax.set_title(panel.title, loc="left", fontsize=10, weight="bold")
    ax.set_xlabel("step", fontsize=9)
    ax.set_ylabel(panel.unit, fontsize=9)
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


def _keys(panel: Panel) -> list[str]:
    """The panel's key at each level, or its only one."""
    return list(dict.fromkeys(panel.key.format(level) for level in LEVELS))
