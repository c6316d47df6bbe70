"""The k-NN that training logs every few epochs: on a subset, at a bounded share of the time."""

from __future__ import annotations

import time

from hjepa_mlx.config import Config
from hjepa_mlx.costs import costs
from hjepa_mlx.data.pipeline import Skipped
from hjepa_mlx.data.source import Source
from hjepa_mlx.eval.features import Encoder, Features, extract, model_features
from hjepa_mlx.eval.knn import knn_accuracy
from hjepa_mlx.models.hjepa import HJEPA

BANK, QUERIES = 5000, 1000  # images


class QuickKNN:
    """k-NN of every level of the target encoder, on a fixed subset of the two splits.

    All its calls together may take `run.eval_share` of the training time; at 1, as much as they
    want.
    """

    def __init__(self, model: HJEPA, train: Source, test: Source, config: Config) -> None:
        self.model, self.config, self.share = model, config, config.run.eval_share
        self.sources = [train.some(BANK, "quick k-NN"), test.some(QUERIES, "quick k-NN")]
        first = costs(config.at_size(config.stages[0][0]), model)  # training begins at this size
        self._relative_cost = costs(config, model).target.gflop / first.gflop  # of an image
        self.spent = self.longest = 0.0  # seconds

    def affordable(self, elapsed: float, images: int) -> bool:
        """Whether one more keeps within the share, `elapsed` seconds and `images` into the run.

        Before the first one, an image is taken to cost the target encoder's share of a step's FLOP.
        """
        if self.share >= 1:
            return True
        cost = self._relative_cost * elapsed / max(1, images)
        expected = self.longest or cost * sum(map(len, self.sources))
        return self.spent + expected <= self.share * elapsed

    def __call__(self) -> dict[str, float]:
        """Accuracy in per cent: knn_level_0, knn_level_1, …"""
        began = time.monotonic()
        bank, queries = map(self._features, self.sources)
        found = {
            f"knn_{level}": knn_accuracy(x, bank.labels, queries.by_name[level], queries.labels)
            for level, x in bank.by_name.items()
        }
        seconds = time.monotonic() - began
        self.spent += seconds
        self.longest = max(self.longest, seconds)
        return found

    def _features(self, source: Source) -> Features:
        def encoders() -> list[Encoder]:
            return [model_features(self.model)]  # with the weights of now

        how = {"shown": False, "parallel": False}  # beside the training's bar and step
        (features,) = extract(encoders, source, self.config, Skipped(), **how)
        return features
