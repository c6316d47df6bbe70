"""The report of an evaluation: scores as JSON, as tables, and in a few words."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from hjepa_mlx.files import write_json
from hjepa_mlx.tables import Shown

Scores = dict[str, Any]
BASELINES = {"context_encoder": "context encoder", "random_init": "random init."}
MEASURES = {
    "linear_probe": "linear probe, %",
    "knn": "k-NN, %",
    "effective_rank_percent": "effective rank, % of dim",
}
NOTHING = (
    "No better than random initialisation by linear probe or k-NN: nothing that helps to tell "
    "these classes apart was learned. `hjepa-mlx viz` draws the curves."
)
VERDICTS = {  # linear probe and k-NN, beside random initialisation: 1 above, 0 not told apart
    (0, 1): "Better than random initialisation by k-NN, not clearly so by linear probe: images of "
    "a class have moved together, but what a linear map can use has not grown. Train longer.",
    (-1, 1): "Better than random initialisation by k-NN, worse by linear probe: images of a class "
    "have moved together, and something that a linear map could use was lost. Train longer.",
    (1, 0): "Better than random initialisation by linear probe, not clearly so by k-NN: images of "
    "a class have not moved together.",
    (1, -1): "Better than random initialisation by linear probe, worse by k-NN: images of a class "
    "have moved apart.",
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
        skipped = self.scores["protocol"].get("skipped_images")
        unread = [f"{skipped} images could not be read."] if skipped else []
        if not self.scores.get("linear_probe"):
            return ["No labels in this data set: k-NN and probes were left out.", *unread]
        level, best = _best(self.scores["linear_probe"])
        random = _best(self.scores["baselines"]["random_init"]["linear_probe"])[1]
        pixels = self.scores["baselines"]["pixels"]["linear_probe"]
        low, high = self.scores["confidence_95"]["linear_probe"][level]
        found = [
            f"Best by linear probe: {_words(level)}, {best:.1f} % (95 % interval {low:.1f}–"
            f"{high:.1f}); {best - random:+.1f} points against random initialisation, "
            f"{best - pixels:+.1f} against raw pixels."
        ]
        beside = self._beside_random("linear_probe"), self._beside_random("knn")
        if min(beside) < 1:
            found.append(VERDICTS.get(beside, NOTHING))
        stopped = [_words(k) for k, v in self.scores.get("probe_converged", {}).items() if not v]
        if stopped:
            found.append(f"The linear probe of {', '.join(stopped)} stopped before it converged.")
        return found + unread

    def _beside_random(self, kind: str) -> int:
        """1 when the best level is above random initialisation, −1 below, 0 not told apart."""
        level, _ = _best(self.scores[kind])
        random = _best(self.scores["baselines"]["random_init"][kind])[1]
        low, high = self.scores["confidence_95"][kind][level]
        return int(low > random) - int(high < random)

    def _accuracies(self) -> Table:
        protocol = self.scores["protocol"]
        few = [key for key in self.scores if key.startswith("few_labels")]
        attentive = "attentive_probe" in self.scores
        table = _table(
            f"{protocol['data']}: accuracy in %, {protocol['bank_images']:,} training and "
            f"{protocol['query_images']:,} test images",
            "linear probe",
            f"k-NN {protocol['k']}",
            *["attentive"] * attentive,
            *(f"{key.split('_')[2]} % labels" for key in few),
        )
        for encoder, scores in self._networks():
            table.add_row(encoder)
            for level in scores["knn"]:
                low, high = scores["confidence_95"]["linear_probe"][level]
                cells = [
                    f"{scores['linear_probe'][level]:.1f} ± {(high - low) / 2:.1f}",
                    _number(scores["knn"][level]),
                ]
                if attentive:
                    cells.append(_number(scores.get("attentive_probe", {}).get(level)))
                for key in few:
                    reached = scores.get(key, {}).get(level)
                    spread = f" ± {reached['std']:.1f}" if reached and reached["std"] else ""
                    cells.append(f"{reached['mean']:.1f}{spread}" if reached else "–")
                table.add_row("  " + _words(level), *cells)
        table.caption = "±: half a 95 % interval"
        if few:
            table.caption += "; of few labels, deviation of the draws"
        if protocol.get("attentive_bank_images", 0) in range(1, protocol["bank_images"]):
            table.caption += (
                f". Attentive: {protocol['attentive_bank_images']:,} training and "
                f"{protocol['attentive_query_images']:,} test images"
            )
        pixels = self.scores["baselines"]["pixels"]
        table.add_row("raw pixels", f"{pixels['linear_probe']:.1f}", f"{pixels['knn']:.1f}")
        return table

    def _spread(self) -> Table:
        """How features are spread, without labels."""
        columns = {
            "effective_rank": "eff. rank",
            "rankme": "RankMe",
            "feature_std": "std",
            "mean_cosine": "cosine",
            "uniformity": "uniform.",
            "alignment": "align.",
        }
        name = self.scores["protocol"]["data"]
        title = f"{name}: features of the test images (ranks also in % of the dimension)"
        table = _table(title, *columns.values())
        for encoder, scores in self._networks():
            table.add_row(encoder)
            for level, figures in scores["features"].items():
                cells = []
                for key in columns:
                    share = figures.get(f"{key}_percent")
                    per_cent = f" ({share:.0f}%)" if share is not None else ""
                    cells.append(_number(figures.get(key), 1 if per_cent else 2) + per_cent)
                table.add_row("  " + _words(level), *cells)
        return table

    def _promises(self) -> Table:
        trained = self.scores["trained"]
        title = (
            f"Promised for 100 epochs of ViT-S; this is {trained['model']} after "
            f"{trained['epochs']:g} epochs"
        )
        table = _table(title, "level", "promised", "measured", "verdict")
        for row in self.scores["promises"]:
            low, high = row["promised"]
            measured, level = f"{row['measured']:.1f}", _words(row["level"])
            verdict = row["verdict"]
            table.add_row(MEASURES[row["measure"]], level, f"{low:g}–{high:g}", measured, verdict)
        return table

    def _networks(self) -> Iterator[tuple[str, Scores]]:
        yield "target encoder", self.scores
        for key, name in BASELINES.items():
            if key in self.scores["baselines"]:
                yield name, self.scores["baselines"][key]


def _table(title: str, *columns: str) -> Table:
    table = Table(
        title=Text(title),
        title_justify="left",
        title_style="bold",
        box=SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
    )
    table.add_column("", no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right")
    return table


def _best(by_level: dict[str, float]) -> tuple[str, float]:
    return max(by_level.items(), key=lambda item: item[1])


def _words(level: str) -> str:
    return level.replace("_", " ")


def _number(value: float | None, places: int = 1) -> str:
    return "–" if value is None else f"{value:.{places}f}"
