"""Every table that the commands print, from plain values; and how things show in a notebook."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

WIDTH = 110  # characters, in a notebook
PAGE = "<pre style=\"line-height:1.3;font-family:Menlo,'DejaVu Sans Mono',monospace\">{code}</pre>"


def table(
    title: str, columns: Sequence[str], rows: Iterable[Sequence[Any]], caption: str | None = None
) -> Table:
    """A table of plain cells: the first column to the left, the others to the right.

    A row of one cell is a heading of the rows below it. Markup in cells is not interpreted.
    """
    found = Table(
        title=Text(title, style="bold"),
        title_justify="left",
        caption=caption and Text(caption),
        caption_justify="left",
        box=SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
    )
    for number, column in enumerate(columns):
        found.add_column(Text(column), justify="right" if number else "left", no_wrap=not number)
    for row in rows:
        found.add_row(*(Text(str(cell)) for cell in row), style="bold" if len(row) == 1 else None)
    return found


def number(value: float | None, digits: int = 1) -> str:
    """A figure, or a dash where there is none."""
    return "–" if value is None else f"{value:,.{digits}f}"


def span(pair: Sequence[float] | None) -> str:
    """Lowest to highest."""
    return f"{pair[0]:g}–{pair[1]:g}" if pair else "–"


def hours(value: float) -> str:
    """Hours in the unit that reads best: minutes, hours or days."""
    if value < 1:
        return f"{60 * value:.0f} min" if value >= 0.1 else f"{60 * value:.1f} min"
    return f"{value:.1f} h" if value < 72 else f"{value / 24:.1f} d"


def hour_span(pair: Sequence[float] | None) -> str:
    """Lowest to highest number of hours, in days where there are many."""
    if not pair:
        return "–"
    days = pair[0] >= 72
    return f"{span([value / 24 for value in pair])} d" if days else f"{span(pair)} h"


def level_name(level: str) -> str:
    """A level's name in the scores, as people read it."""
    return level.replace("_", " ")


def evaluation(scores: dict[str, Any]) -> list[Table]:
    """The tables of an evaluation's scores: accuracies, ranks and spread, promises."""
    found = [_accuracies(scores)] if scores.get("knn") else []
    rows: list[list[str]] = []
    for network, own in _networks(scores).items():
        rows.append([network])
        for level, figures in own["features"].items():
            ranks = [
                f"{number(figures.get(rank))} ({number(figures.get(f'{rank}_percent'), 0)}%)"
                for rank in ("effective_rank", "rankme")
            ]
            rows.append([f"  {level_name(level)}", *ranks, number(figures.get("feature_std"), 2)])
    title = f"{scores['protocol']['data']}: features of the test images"
    caption = "in brackets: % of the dimension"
    found.append(table(title, ["", "eff. rank", "RankMe", "std"], rows, caption))
    return found + ([_promises(scores)] if scores.get("promises") else [])


def _networks(scores: dict[str, Any]) -> dict[str, Any]:
    baselines = {"context_encoder": "context encoder", "random_init": "random init."}
    known = scores["baselines"]
    others = {name: known[key] for key, name in baselines.items() if key in known}
    return {"target encoder": scores, **others}


def _accuracies(scores: dict[str, Any]) -> Table:
    protocol = scores["protocol"]
    few = [key for key in scores if key.startswith("few_labels")]
    attentive = ["attentive"] if "attentive_probe" in scores else []
    shares = [f"{key.split('_')[2]} % labels" for key in few]
    rows: list[list[str]] = []
    for network, own in _networks(scores).items():
        rows.append([network])
        for level, knn in own["knn"].items():
            low, high = own["confidence_95"]["linear_probe"][level]
            cells = [f"{own['linear_probe'][level]:.1f} ± {(high - low) / 2:.1f}", number(knn)]
            cells += [number(own.get("attentive_probe", {}).get(level)) for _ in attentive]
            for key in few:
                reached = own.get(key, {}).get(level, {})
                spread = f" ± {reached['std']:.1f}" if reached.get("std") else ""
                cells.append(number(reached.get("mean")) + spread)
            rows.append([f"  {level_name(level)}", *cells])
    pixels = scores["baselines"]["pixels"]
    rows.append(["raw pixels", number(pixels["linear_probe"]), number(pixels["knn"])])
    images = protocol["bank_images"], protocol["query_images"]
    caption = "±: half a 95 % interval" + ("; of few labels, deviation of the draws" if few else "")
    if 0 < protocol.get("attentive_bank_images", 0) < images[0]:
        seen = protocol["attentive_bank_images"], protocol["attentive_query_images"]
        caption += ". Attentive: {:,} training and {:,} test images".format(*seen)
    return table(
        f"{protocol['data']}: accuracy in %, {images[0]:,} training and {images[1]:,} test images",
        ["", "linear probe", f"k-NN {protocol['k']}", *attentive, *shares],
        rows,
        caption,
    )


def _promises(scores: dict[str, Any]) -> Table:
    measures = {
        "linear_probe": "linear probe, %",
        "knn": "k-NN, %",
        "effective_rank_percent": "effective rank, % of dim",
    }
    rows = [
        [measures[row["measure"]], level_name(row["level"]), span(row["promised"]),
         number(row["measured"]), row["verdict"]]
        for row in scores["promises"]
    ]  # fmt: skip
    trained = f"{scores['trained']['model']} after {scores['trained']['epochs']:g} epochs"
    title = f"Promised for 100 epochs of ViT-S; this is {trained}"
    return table(title, ["", "level", "promised", "measured", "verdict"], rows)


class Shown:
    """For classes with `__rich__`: the same in a notebook, coloured."""

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, str]:
        return {"text/plain": text(self), "text/html": html(self)}


def text(renderable: Any) -> str:
    """A rich renderable as plain text."""
    return _printed(renderable).export_text()


def html(renderable: Any) -> str:
    """A rich renderable as a piece of HTML; markup in it is not interpreted."""
    return _printed(renderable).export_html(inline_styles=True, code_format=PAGE)


def _printed(renderable: Any) -> Console:
    console = Console(
        file=io.StringIO(),
        width=WIDTH,
        record=True,
        force_jupyter=False,
        markup=False,
        highlight=False,
    )
    console.print(renderable)
    return console
