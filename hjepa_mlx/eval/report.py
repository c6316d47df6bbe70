"""The evaluation of a run: every level beside random initialisation and raw pixels."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from hjepa_mlx.config import Config, config_names, load_config
from hjepa_mlx.data.pipeline import Skipped
from hjepa_mlx.data.source import Source
from hjepa_mlx.data.sources import SOURCES, open_source
from hjepa_mlx.errors import UsageError
from hjepa_mlx.eval.features import Encoder, Features, extract, mean_features, pixels
from hjepa_mlx.eval.knn import knn_accuracy
from hjepa_mlx.eval.rank import effective_rank
from hjepa_mlx.files import write_json
from hjepa_mlx.models.hjepa import HJEPA

K, TEMPERATURE = 20, 0.07  # DINO's protocol

Scores = dict[str, Any]


@dataclass(frozen=True)
class Report:
    """Scores by protocol and level; accuracies in per cent, ranks in dimensions."""

    scores: Scores

    def __rich__(self) -> Table:
        """The table: one row an encoder, one column a level."""
        protocol = self.scores["protocol"]
        table = Table(
            title=f"{protocol['data']}: {protocol['bank_images']:,} training images, "
            f"{protocol['query_images']:,} test images, k-NN with k={protocol['k']}",
            title_justify="left",
        )
        table.add_column("encoder")
        levels = list(self.scores["feature_rank"])
        for level in levels:
            table.add_column(f"{level.replace('_', ' ')}\nk-NN %", justify="right")
            table.add_column("\nrank", justify="right")
        baselines = self.scores["baselines"]
        for name, scores in (
            ("target encoder", self.scores),
            ("context encoder", baselines["context_encoder"]),
            ("random initialisation", baselines["random_init"]),
        ):
            cells = []
            for level in levels:
                cells.append(_format(scores["knn"].get(level)))
                cells.append(f"{scores['feature_rank'][level]:.1f}")
            table.add_row(name, *cells)
        table.add_row("raw pixels", _format(baselines["pixels"].get("knn")))
        return table

    def save(self, path: Path) -> None:
        """Write the scores as JSON."""
        write_json(path, self.scores)


def _format(accuracy: float | None) -> str:
    return "–" if accuracy is None else f"{accuracy:.1f}"


def evaluate(model: HJEPA, data: str | None = None, data_dir: str | None = None) -> Report:
    """Evaluate a model's frozen features on its own data set, or on `data` found in `data_dir`.

    data: name of a data set, or name or path of a config that has one.

    The bank is the training split, the queries are the test split. k-NN is left out for data
    without classes.
    """
    config = model.config.model_copy(deep=True)
    if data is not None:
        config.data.name, config.data.dir = _name_and_dir(data)
        config.data.limit = None
    if data_dir is not None:
        config.data.dir = data_dir
    bank, queries = open_source(config.data, "train"), open_source(config.data, "test")
    check_evaluable(bank, queries)
    encoders: list[Encoder] = [
        mean_features(model, "target"),
        mean_features(model, "context"),
        mean_features(HJEPA(model.config)),
        pixels,
    ]
    skipped = Skipped()
    bank_features = extract(encoders, bank, config, skipped)
    query_features = extract(encoders, queries, config, skipped)
    trained, context, random, pixel = map(_scores, bank_features, query_features)
    return Report(
        {
            **trained,
            "baselines": {
                "context_encoder": context,
                "random_init": random,
                "pixels": {"knn": pixel["knn"].get("pixels")},
            },
            "protocol": {
                "data": config.data.name,
                "bank_images": len(bank_features[0].by_name["level_0"]),
                "query_images": len(query_features[0].by_name["level_0"]),
                "skipped_images": len(skipped),
                "k": K,
                "temperature": TEMPERATURE,
                "features": "mean over the grid of each level",
                "feature_rank": "exp(entropy) of the centred covariance's eigenvalues, test images",
            },
        }
    )


def _name_and_dir(data: str) -> tuple[str, str | None]:
    if data == "folder" or all(name in SOURCES for name in data.split("+")):
        return data, None
    if data in config_names() or data.endswith((".yaml", ".yml")):
        config = load_config(data)
        return config.data.name, config.data.dir
    raise UsageError(
        f"No data set or config '{data}'. Data sets: {', '.join(SOURCES)}, folder; configs: "
        f"{', '.join(config_names())}."
    )


def check_evaluable(bank: Source, queries: Source) -> None:
    """Refuse what would only fail after the features have been computed."""
    if not len(queries):
        raise UsageError(
            f"{bank.name}: no image is left for evaluation; there have to be at least 10 in all, "
            f"there are {len(bank)}."
        )
    if bank.classes and len(bank) < K:
        raise UsageError(
            f"k-NN with k={K} needs at least {K} training images; there are {len(bank)}."
        )
    if bank.classes != queries.classes:
        raise UsageError(
            f"{bank.name}: training and test images have different classes "
            f"({len(bank.classes)} and {len(queries.classes)})."
        )


def _scores(bank: Features, queries: Features) -> Scores:
    knn = {}
    if len(bank.labels):
        for name, features in bank.by_name.items():
            knn[name] = knn_accuracy(
                features, bank.labels, queries.by_name[name], queries.labels, K, TEMPERATURE
            )
    rank = {name: effective_rank(x) for name, x in queries.by_name.items() if name != "pixels"}
    return {"knn": knn, "feature_rank": rank}


def quick_knn(model: HJEPA, bank: Source, queries: Source, config: Config) -> dict[str, float]:
    """k-NN of every level on these images only: what training logs every few epochs."""
    encoder = [mean_features(model)]
    (bank_features,) = extract(encoder, bank, config, Skipped())
    (query_features,) = extract(encoder, queries, config, Skipped())
    return {f"knn_{k}": v for k, v in _scores(bank_features, query_features)["knn"].items()}
