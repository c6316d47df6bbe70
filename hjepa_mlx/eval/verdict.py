"""What a data set promises beside what was measured."""

from __future__ import annotations

from typing import Any

from hjepa_mlx.data.catalog import CATALOG

RANK_TOLERANCE = 5.0  # the promise is "about 60 % of the dimension"


def verdicts(scores: dict[str, Any], pretrained_on: str) -> list[dict[str, Any]]:
    """Each promise made for pretraining on a data set of the catalog: promised, measured, verdict.

    Accuracies are those of the best single level; the rank is that level's effective rank.
    """
    row = CATALOG.get(pretrained_on)
    if row is None or row.promise is None or not scores["linear_probe"]:
        return []
    promise = row.promise
    found = []
    for measure, promised in (("linear_probe", promise.linear_probe), ("knn", promise.knn)):
        level, measured = _best(scores[measure])
        found.append(_verdict(measure, promised, measured, level))
    level, _ = _best(scores["linear_probe"])
    about = (promise.rank - RANK_TOLERANCE, promise.rank + RANK_TOLERANCE)
    measured = scores["features"][level]["effective_rank_percent"]
    found.append(_verdict("effective_rank_percent", about, measured, level))
    return found


def _best(by_level: dict[str, float]) -> tuple[str, float]:
    single = {name: value for name, value in by_level.items() if name.startswith("level_")}
    return max(single.items(), key=lambda item: item[1])


def _verdict(
    measure: str, promised: tuple[float, float], measured: float, level: str
) -> dict[str, Any]:
    low, high = promised
    verdict = "below" if measured < low else "above" if measured > high else "met"
    return {
        "measure": measure,
        "promised": [low, high],
        "measured": measured,
        "level": level,
        "verdict": verdict,
    }
