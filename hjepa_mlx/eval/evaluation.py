"""The evaluation of a model: every protocol at every level, beside three baselines."""

from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from shlex import quote
from typing import Any

import mlx.core as mx
import numpy as np

from hjepa_mlx import backend
from hjepa_mlx.config import Config
from hjepa_mlx.data.folder import record_of
from hjepa_mlx.data.frame import Frame
from hjepa_mlx.data.pipeline import Skipped
from hjepa_mlx.data.source import SOURCES, Source, open_sources
from hjepa_mlx.errors import UsageError
from hjepa_mlx.eval import attentive_probe, features, linear_probe, rank
from hjepa_mlx.eval.arrays import HELD_OUT, accuracy, check_finite, interval
from hjepa_mlx.eval.features import Encoder, Features
from hjepa_mlx.eval.knn import TEMPERATURE, K, knn_accuracy
from hjepa_mlx.eval.labels import check_evaluable, few_labels, judged
from hjepa_mlx.eval.report import Report, add_fine_tuned, promises
from hjepa_mlx.models.hjepa import HJEPA
from hjepa_mlx.progress import bar
from hjepa_mlx.recipes import config_names, load_config
from hjepa_mlx.rng import generator
from hjepa_mlx.sections import Data
from hjepa_mlx.step import random_key, reseed

TOKEN_BYTES = 4e9  # of the tokens of a network and a split that the attentive probe may look at
FEW_LABELS = (0.01, 0.1)  # shares of the training labels
NETWORKS = ("target_encoder", "context_encoder", "random_init")

Scores = dict[str, Any]


@dataclass(frozen=True)
class Protocol:
    """The settings of an evaluation; the defaults are the field's.

    draws: of few labels; 0 leaves them out. attentive_images: training images for the attentive
    probe, at most; 0 leaves it out. image_size, fit: as in `embed`. Raises UsageError.
    """

    k: int = K
    temperature: float = TEMPERATURE
    draws: int = 5
    attentive_images: int | None = None
    image_size: int | tuple[int, int] | None = None
    fit: str = "crop"

    def __post_init__(self) -> None:
        if self.k < 1 or not 0 < self.temperature < math.inf or self.draws < 0:
            raise UsageError("k and temperature must be positive and finite, draws at least 0.")
        if self.attentive_images is not None and not (
            self.attentive_images == 0 or self.attentive_images >= HELD_OUT
        ):
            raise UsageError(
                f"attentive_images={self.attentive_images}: the attentive probe needs at least "
                f"{HELD_OUT} training images; 0 leaves it out."
            )


def evaluate(
    model: HJEPA,
    data: str | None = None,
    data_dir: str | None = None,
    protocol: Protocol | None = None,
) -> Report:
    """Evaluate a model's frozen features on its own data set, or on `data` found in `data_dir`.

    data: name of a data set, or name or path of a config that has one. Probes and k-NN learn from
    the training split; the test split is classified once. Without classes, or with too few images
    to judge them, only the label-free figures are made.
    """
    protocol = protocol or Protocol()
    config = config_for(model.config, data, data_dir)
    frame = Frame.of(config, protocol.image_size, protocol.fit)
    run = model.origin.run if model.origin else None
    record = record_of(run, model.config.data, config.data)
    opened = open_sources(config.data, record, ("train", "test"))
    *sources, left_out = judged(opened["train"], opened["test"], protocol.k)
    check_evaluable(*sources)
    tokens = bool(sources[0].classes) and protocol.attentive_images != 0
    backend.set_memory_limits()
    skipped, make = Skipped(), _encoders(model, tokens)
    room = int(TOKEN_BYTES / (2 * config.cells(*frame[:2]) * int(config.model.dim)))
    train, test = (
        features.extract(make, source, config, skipped, _token_images(source, room, cap), frame)
        for source, cap in zip(sources, (protocol.attentive_images, None), strict=True)
    )
    features.drop_equal_channels(train[-1], test[-1])
    scores = _scores(train, test, protocol, config.repeated)
    own = scores.pop("target_encoder")
    described = {
        **_described(protocol),
        "data": config.data.name,
        "bank_images": len(train[0]),
        "query_images": len(test[0]),
        "attentive_bank_images": len(train[0].token_rows) if tokens else 0,
        "attentive_query_images": len(test[0].token_rows) if tokens else 0,
        "skipped_images": len(skipped),
        **frame._asdict(),
        "left_out": left_out,
    }
    if (folder := opened["test"].folder) and folder.gone:
        described["gone"] = folder.gone
    usual = data is None and frame == Frame.of(config)
    own["promises"] = promises(own, model.config.data.name) if usual else []
    own |= {"protocol": described, "trained": _trained(model), "baselines": scores}
    if run and record and frame == Frame.of(config):
        add_fine_tuned(own, run)
    return Report(own)


def _token_images(source: Source, room: int, cap: int | None) -> np.ndarray:
    """Which images [N] the attentive probe looks at: a fixed random choice, all where they fit."""
    chosen = np.zeros(len(source), bool)
    chosen[generator(0, "attentive probe").permutation(len(source))[:room][:cap]] = True
    return chosen


def _encoders(model: HJEPA, tokens: bool) -> Callable[[], list[Encoder]]:
    """Makes the encoders of NETWORKS, and pixels; those with an attentive probe give tokens."""
    key = random_key()
    random = type(model)(model.config)
    reseed(key)  # the caller's random numbers go on undisturbed
    # Threads cannot evaluate each other's arrays; those of a model just built are not yet.
    mx.eval(model.parameters(), random.parameters())
    return lambda: [
        features.model_features(model, "target", tokens),
        features.model_features(model, "context"),
        features.model_features(random, "target", tokens),
        features.pixels,
    ]


def _scores(
    train: list[Features], test: list[Features], protocol: Protocol, repeated: str | None
) -> dict[str, Scores]:
    """Scores by network, kind and level; every level of every network is a job of its own.

    repeated: a level with the features of the level before, and so with its scores.
    """
    levels = [*train[0].pooled]
    before = levels[levels.index(repeated) - 1] if repeated else None
    for own in test[:-1]:
        for x in own.pooled.values():
            check_finite(x)
    jobs: list[tuple[str, str, Callable[[], Scores]]] = []
    if len(train[0].labels):  # pixels first: their probe takes longest
        for own, asked in zip(train, test, strict=True):
            features.whiten(own, asked, repeated)
        pixels = partial(class_scores, train[-1], test[-1], "pixels", protocol)
        whitened = partial(neighbours, train[-1], test[-1], features.WHITENED, protocol)
        jobs += [("pixels", "pixels", pixels), ("pixels", features.WHITENED, whitened)]
    for network, own, asked in zip(NETWORKS, train, test, strict=False):
        settings = replace(protocol, draws=0) if network == "context_encoder" else protocol
        for level in own.pooled:
            if level != repeated:
                jobs.append((network, level, partial(level_scores, own, asked, level, settings)))
        for level in own.tokens:
            jobs.append((network, level, partial(token_scores, own, asked, level)))
    scores: dict[str, Scores] = {network: {} for network in (*NETWORKS, "pixels")}
    with (
        bar("Probing", len(jobs), "probes") as advance,
        backend.computing_threads() as threads,
        ThreadPoolExecutor(threads) as pool,
    ):
        run = pool.map if threads > 1 else map  # a GPU's work stays in this thread
        results = run(lambda job: job[2](), jobs)
        for (network, level, _), found in zip(jobs, results, strict=True):
            for kind, value in found.items():
                by_level = scores[network].setdefault(kind, {})
                by_level[level] = value
                if level == before:  # tokens differ, and come later
                    by_level[repeated] = value
            mx.clear_cache()
            advance(1)
    if baseline := scores["pixels"]:
        scores["pixels"] = {kind: baseline[kind]["pixels"] for kind in ("knn", "linear_probe")}
        scores["pixels"]["knn_whitened"] = baseline["knn"][features.WHITENED]
        for network in NETWORKS:
            scores[network]["confidence_95"] = _intervals(scores[network], test[0])
    return scores


def _intervals(scores: Scores, test: Features) -> Scores:
    """The 95 % interval of every accuracy, by kind and level."""
    images = {"attentive_probe": len(test.token_rows), "knn": len(test), "linear_probe": len(test)}
    return {
        kind: {level: interval(value, count) for level, value in scores[kind].items()}
        for kind, count in images.items()
        if kind in scores
    }


def class_scores(train: Features, test: Features, level: str, protocol: Protocol) -> Scores:
    """k-NN and linear probe of a level's pooled features, in per cent."""
    probe = linear_probe.fit(train.pooled[level], train.labels)
    return {
        **neighbours(train, test, level, protocol),
        "linear_probe": accuracy(probe.predict(test.pooled[level]), test.labels),
        "probe_setting": {"l2": probe.l2},
        "probe_converged": probe.converged,
    }


def neighbours(train: Features, test: Features, level: str, protocol: Protocol) -> Scores:
    """k-NN of a level's pooled features, in per cent."""
    x, queries = train.pooled[level], test.pooled[level]
    k, temperature = protocol.k, protocol.temperature
    return {"knn": knn_accuracy(x, train.labels, queries, test.labels, k, temperature)}


def level_scores(train: Features, test: Features, level: str, protocol: Protocol) -> Scores:
    """Every score of a level's pooled features, by kind; without labels only the ranks.

    Whatever is fitted or chosen sees `train` only. Whitened features have no rank of their own.
    """
    scores: Scores = {}
    if level != features.WHITENED:
        described = rank.describe(test.pooled[level])
        scores = {"features": described, "feature_rank": described["effective_rank"]}
    if len(train.labels):
        scores |= class_scores(train, test, level, protocol)
        for share in FEW_LABELS if protocol.draws else ():
            key = f"few_labels_{100 * share:.0f}_percent"
            scores[key] = few_labels(train, test, level, share, protocol.draws)
    return scores


def token_scores(train: Features, test: Features, level: str) -> Scores:
    """The attentive probe of a level's tokens, in per cent."""
    probe = attentive_probe.fit(train.tokens[level], train.token_labels)
    return {"attentive_probe": accuracy(probe.predict(test.tokens[level]), test.token_labels)}


def _described(protocol: Protocol) -> dict[str, Any]:
    """The settings, and the meaning of each figure, for the JSON."""
    return {
        "k": protocol.k,
        "temperature": protocol.temperature,
        "linear_probe": "logistic_regression on standardised features, settings chosen on "
        f"every {HELD_OUT}th training image",
        "attentive_probe": "one cross-attention query (AIM) on normalised tokens",
        "few_labels": f"mean and deviation of {protocol.draws} draws, C = 1",
        "features": "mean over the grid of each level; whitened: all levels side by side, whitened "
        "by the training images (covariance shrunk by OAS)",
        "feature_rank": "exp(entropy) of the centred covariance's eigenvalues, test images",
        "rankme": "exp(entropy) of the singular values, not centred, test images",
    }


def _trained(model: HJEPA) -> dict[str, Any]:
    """The checkpoint and model that the scores belong to."""
    c, origin = model.config, model.origin
    image = [f"level_{n}" for n, pool in enumerate(c.model.level_pool) if pool == "image"]
    size = f"{c.model.size} ({c.model.dim} wide, {c.model.depth} blocks)"
    return {
        "run": origin.run if origin else None,
        "step": origin.step if origin else 0,
        "epochs": origin.epoch if origin else 0,
        "images": c.data.name,
        "image_level": image[0] if image else None,
        "model": f"ViT {size}, patch {c.model.patch_size} at {c.data.image_size}",
    }


def config_for(own: Config, data: str | None, data_dir: str | None) -> Config:
    """A run's config with another data set: by name, or by name or path of a config that has it."""
    config = own.model_copy(deep=True)
    if data is not None:
        other = _data(data)  # another set has labels, bits and a way of listing of its own
        for key in ("name", "dir", "labels", "bits", "listing"):
            setattr(config.data, key, getattr(other, key))
        config.data.limit = None
    if data_dir is not None:
        config.data.dir = data_dir
    return config


def _data(data: str) -> Data:
    if data == "folder" or all(name in SOURCES for name in data.split("+")):
        return Data(name=data)
    if data in config_names() or data.endswith((".yaml", ".yml")):
        return load_config(data).data
    hint = f" For images: --data folder --data-dir {quote(data)}." if Path(data).is_dir() else ""
    raise UsageError(
        f"No data set or config '{data}'.{hint} Data sets: {', '.join(SOURCES)}, folder; configs: "
        f"{', '.join(config_names())}."
    )
