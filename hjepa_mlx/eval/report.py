"""The report of an evaluation: scores as JSON, as tables, and in a few words."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.text import Text

from hjepa_mlx import tables
from hjepa_mlx.data.catalog import CATALOG
from hjepa_mlx.errors import counted
from hjepa_mlx.files import read_json, write_json
from hjepa_mlx.tables.evaluation import evaluation

RANK_TOLERANCE = 5.0  # the promise is "about 60 % of the dimension"
CLASSIFIER = "classifier.json"  # what `finetune` writes about a classifier
NOTHING = (
    "Not clearly better than random initialisation by linear probe or k-NN: the differences are "
    "within the 95 % intervals. `hjepa-mlx viz RUN` draws the curves."
)
BESIDE_RANDOM: dict[
    tuple[int, ...], str
] = {  # linear probe, k-NN: 1 above random initialisation, -1 below, 0 not clear
    (0, 1): "Better than random initialisation by k-NN, not clearly so by linear probe: images of "
    "a class lie closer together, but a linear map gains nothing. Train longer.",
    (-1, 1): "Better than random initialisation by k-NN, worse by linear probe: images of a class "
    "lie closer together, but some detail that a linear map could use is lost. Train longer.",
    (1, 0): "Better than random initialisation by linear probe, not clearly so by k-NN: images of "
    "a class lie no closer together.",
    (1, -1): "Better than random initialisation by linear probe, worse by k-NN: images of a class "
    "lie further apart.",
}


@dataclass(frozen=True)
class Report(tables.Shown):
    """Scores by protocol and level; accuracies in per cent, ranks in dimensions.

    `scores` is the content of eval.json; a report prints itself in a terminal and in a notebook.
    """

    scores: dict[str, Any]

    def save(self, path: Path) -> None:
        """Write the scores as JSON."""
        write_json(path, self.scores)

    def __rich__(self) -> Group:
        findings = [Text(f"• {line}") for line in self.findings()]
        return Group(*evaluation(self.scores), *findings)

    def findings(self) -> list[str]:
        """The figures in words."""
        skipped = self.scores["protocol"].get("skipped_images")
        unread = [f"{counted(skipped)} could not be read."] if skipped else []
        unread += [self.scores["protocol"]["gone"]] if "gone" in self.scores["protocol"] else []
        unread += (left_out := self.scores["protocol"].get("left_out", []))
        if not self.scores.get("linear_probe"):
            none = "This data set has no labels, so there are no k-NN and no probes."
            return unread if left_out else [none, *unread]
        level, best = _best(self.scores["linear_probe"])
        random, pixels = (self.scores["baselines"][name] for name in ("random_init", "pixels"))
        low, high = self.scores["confidence_95"]["linear_probe"][level]
        found = [
            f"Target encoder, best by linear probe: {tables.level_name(level)}, {best:.1f} % "
            f"(95 % interval {low:.1f}–{high:.1f}); "
            f"{best - _best(random['linear_probe'])[1]:+.1f} points against random initialisation, "
            f"{best - pixels['linear_probe']:+.1f} against raw pixels."
        ]
        signs = []  # 1 when the best level is above random initialisation, -1 below, 0 not clear
        for kind in ("linear_probe", "knn"):
            low, high = self.scores["confidence_95"][kind][_best(self.scores[kind])[0]]
            untrained = _best(random[kind])[1]
            signs.append(int(low > untrained) - int(high < untrained))
        if min(signs) < 1:
            found.append(BESIDE_RANDOM.get(tuple(signs), NOTHING))
        converged = self.scores.get("probe_converged", {})
        stopped = [tables.level_name(level) for level, ended in converged.items() if not ended]
        if stopped:
            found.append(f"The linear probe of {', '.join(stopped)} stopped before it converged.")
        return found + unread


def add_fine_tuned(scores: dict[str, Any], run: str | Path) -> None:
    """Add to a run's scores the accuracies that `finetune` left in its folder.

    Those on other data, and of the network at another step, are left out.
    """
    level = max(name for name in scores["features"] if name.startswith("level_"))
    for folder, own in (("finetuned", scores), ("scratch", scores["baselines"]["random_init"])):
        file = Path(run, folder, CLASSIFIER)
        try:
            found = dict(read_json(file)["scores"]) if file.is_file() else {}
        except (ValueError, LookupError, TypeError):  # damaged, which costs no evaluation
            continue
        if "fine_tuned" in found and found.get("run_step") == scores["trained"]["step"]:
            own["fine_tuned"] = {level: found["fine_tuned"]}
            interval = {level: found["confidence_95"]["fine_tuned"]}
            own.setdefault("confidence_95", {})["fine_tuned"] = interval


def promises(scores: dict[str, Any], pretrained_on: str) -> list[dict[str, Any]]:
    """Each promise made for pretraining on a data set of the catalog, beside what is known.

    Promised, nearest published (None where nothing is), measured, verdict.

    Accuracies are those of the best single level; the rank is that level's effective rank.
    """
    row = CATALOG.get(pretrained_on)
    if row is None or row.promise is None or not scores.get("linear_probe"):
        return []
    level, probe = _best(scores["linear_probe"], "level_")
    nearest, knn = _best(scores["knn"], "level_")
    rank = scores["features"][level]["effective_rank_percent"]
    about = row.promise.rank - RANK_TOLERANCE, row.promise.rank + RANK_TOLERANCE
    measures = (
        ("linear_probe", row.promise.linear_probe, probe, level),
        ("knn", row.promise.knn, knn, nearest),
        ("effective_rank_percent", about, rank, level),
    )
    published = row.published.model_dump() if row.published else {}
    return [
        {
            "measure": measure,
            "promised": [low, high],
            "published": published.get(measure),
            "measured": measured,
            "level": at,
            "verdict": "below" if measured < low else "above" if measured > high else "met",
            "published_of": published.get("of"),
        }
        for measure, (low, high), measured, at in measures
    ]


def _best(by_level: dict[str, float], prefix: str = "") -> tuple[str, float]:
    """The best level, or the best of those whose names begin with `prefix`; and its score."""
    named = (item for item in by_level.items() if item[0].startswith(prefix))
    return max(named, key=lambda item: item[1])
