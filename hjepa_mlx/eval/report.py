"""The report of an evaluation: scores as JSON, as tables, and in a few words."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from hjepa_mlx.files import write_json
from hjepa_mlx.notebook import Shown

Scores = dict[str, Any]
BASELINES = {"context_encoder": "context encoder", "random_init": "random initialisation"}
MEASURES = {
    "linear_probe": "linear probe, best level",
    "knn": "k-NN, best level",
    "effective_rank_percent": "effective rank, % of dimension",
}


@dataclass(frozen=True)
class Report(Shown):
    """Scores by protocol and level; accuracies in per cent, ranks in dimensions.

    `scores` is what `save` writes; a report prints itself in a terminal and in a notebook.
    """

    scores: Scores

    def save(self, path: Path) -> None:
        """Write the scores as JSON."""
        write_json(path, self.scores)

    def __rich__(self) -> Group:
        parts: list[RenderableType] = []
        if self.scores.get("knn"):
            parts.append(self._accuracies())
        parts.append(self._spread())
        if self.scores.get("promises"):
            parts.append(self._promises())
        parts += [Text(f"• {line}") for line in self.findings()]
        return Group(*parts)

    def findings(self) -> list[str]:
        """What the figures say, in words."""
        if not self.scores.get("linear_probe"):
            return ["No labels in this data set: k-NN and probes were left out."]
        level, best = _best(self.scores["linear_probe"])
        random = _best(self.scores["baselines"]["random_init"]["linear_probe"])[1]
        pixels = self.scores["baselines"]["pixels"]["linear_probe"]
        low, high = self.scores["confidence_95"]["linear_probe"][level]
        found = [
            f"Best by linear probe: {_words(level)}, {best:.1f} % (95 % interval {low:.1f}–"
            f"{high:.1f}); {best - random:+.1f} points against random initialisation, "
            f"{best - pixels:+.1f} against raw pixels."
        ]
        knn = _best(self.scores["knn"])[1]
        random_knn = _best(self.scores["baselines"]["random_init"]["knn"])[1]
        if low <= random or knn <= random_knn:
            found.append(
                "Not clearly better than random initialisation: little that helps to tell these "
                "classes apart was learned. Train longer, and see `hjepa-mlx viz` for the curves."
            )
        if self.scores["protocol"].get("skipped_images"):
            found.append(f"{self.scores['protocol']['skipped_images']} images could not be read.")
        return found

    def _accuracies(self) -> Table:
        protocol = self.scores["protocol"]
        few = [key for key in self.scores if key.startswith("few_labels")]
        table = _table(
            f"{protocol['data']}: accuracy in %; {protocol['bank_images']:,} training images, "
            f"{protocol['query_images']:,} test images",
            "linear probe",
            f"k-NN k={protocol['k']}",
            *["attentive"] * ("attentive_probe" in self.scores),
            *(f"{key.split('_')[2]} % of labels" for key in few),
        )
        for encoder, scores in self._networks():
            for number, level in enumerate(scores["knn"]):
                low, high = scores["confidence_95"]["linear_probe"][level]
                cells = [
                    f"{scores['linear_probe'][level]:.1f} ± {(high - low) / 2:.1f}",
                    _number(scores["knn"][level]),
                ]
                if "attentive_probe" in self.scores:
                    cells.append(_number(scores.get("attentive_probe", {}).get(level)))
                for key in few:
                    reached = scores.get(key, {}).get(level)
                    words = f"{reached['mean']:.1f} ± {reached['std']:.1f}" if reached else "–"
                    cells.append(words)
                table.add_row("" if number else encoder, _words(level), *cells)
            table.add_section()
        pixels = self.scores["baselines"]["pixels"]
        table.add_row("raw pixels", "", f"{pixels['linear_probe']:.1f}", f"{pixels['knn']:.1f}")
        return table

    def _spread(self) -> Table:
        """How features are spread, without labels."""
        columns = {
            "effective_rank": "effective rank",
            "rankme": "RankMe",
            "feature_std": "std",
            "mean_cosine": "mean cosine",
            "uniformity": "uniformity",
            "alignment": "alignment",
        }
        table = _table(
            f"{self.scores['protocol']['data']}: features of the test images", *columns.values()
        )
        for encoder, scores in self._networks():
            for number, (level, figures) in enumerate(scores["features"].items()):
                cells = []
                for key in columns:
                    share = figures.get(f"{key}_percent")
                    per_cent = f" ({share:.0f} %)" if share is not None else ""
                    places = 1 if per_cent else 2
                    cells.append(_number(figures.get(key), places) + per_cent)
                table.add_row("" if number else encoder, _words(level), *cells)
            table.add_section()
        return table

    def _promises(self) -> Table:
        trained = self.scores["trained"]
        table = _table(
            f"Promised for 100 epochs of ViT-S; this is {trained['model']} after "
            f"{trained['epochs']:g} epochs",
            "promised",
            "measured",
            "verdict",
        )
        for row in self.scores["promises"]:
            low, high = row["promised"]
            table.add_row(
                MEASURES[row["measure"]],
                _words(row["level"]),
                f"{low:g}–{high:g}",
                f"{row['measured']:.1f}",
                row["verdict"],
            )
        return table

    def _networks(self) -> Iterator[tuple[str, Scores]]:
        yield "target encoder", self.scores
        for key, name in BASELINES.items():
            if key in self.scores["baselines"]:
                yield name, self.scores["baselines"][key]


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold")
    table.add_column("")
    table.add_column("")
    for column in columns:
        table.add_column(column, justify="right")
    return table


def _best(by_level: dict[str, float]) -> tuple[str, float]:
    return max(by_level.items(), key=lambda item: item[1])


def _words(level: str) -> str:
    return level.replace("_", " ")


def _number(value: float | None, places: int = 1) -> str:
    return "–" if value is None else f"{value:.{places}f}"
