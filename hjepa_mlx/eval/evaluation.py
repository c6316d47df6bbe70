"""The evaluation of a model: every protocol at every level, beside three baselines."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from shlex import quote
from typing import Any

import mlx.core as mx
import numpy as np

from hjepa_mlx import backend
from hjepa_mlx.config import Config
from hjepa_mlx.data.pipeline import Skipped
from hjepa_mlx.data.source import SOURCES, Source, check_same_classes, open_source
from hjepa_mlx.errors import UsageError
from hjepa_mlx.eval.arrays import HELD_OUT, check_finite, interval
from hjepa_mlx.eval.features import (
    Encoder,
    Features,
    drop_equal_channels,
    extract,
    model_features,
    pixels,
)
from hjepa_mlx.eval.knn import K
from hjepa_mlx.eval.protocols import Protocol, Scores, class_scores, level_scores, token_scores
from hjepa_mlx.eval.report import Report, promises
from hjepa_mlx.models.hjepa import HJEPA
from hjepa_mlx.progress import bar
from hjepa_mlx.recipes import config_names, load_config
from hjepa_mlx.rng import generator

TOKEN_BYTES = 4e9  # of the tokens of a network and a split that the attentive probe may look at
NETWORKS = ("target_encoder", "context_encoder", "random_init")
ACCURACIES = ("knn", "linear_probe", "attentive_probe")


def evaluate(
    model: HJEPA,
    data: str | None = None,
    data_dir: str | None = None,
    protocol: Protocol | None = None,
) -> Report:
    """Evaluate a model's frozen features on its own data set, or on `data` found in `data_dir`.

    data: name of a data set, or name or path of a config that has one. Probes and k-NN learn from
    the training split; the test split is classified once. Without classes only the label-free
    figures are made.
    """
    protocol = protocol or Protocol()
    config = config_for(model.config, data, data_dir)
    sources = open_source(config.data, "train"), open_source(config.data, "test")
    check_evaluable(*sources, protocol.k)
    tokens = bool(sources[0].classes) and protocol.attentive_images != 0
    backend.set_memory_limits()
    skipped, make = Skipped(), _encoders(model, tokens)
    train, test = (
        extract(make, source, config, skipped, _token_images(source, config, cap))
        for source, cap in zip(sources, (protocol.attentive_images, None), strict=True)
    )
    drop_equal_channels(train[-1], test[-1])
    scores = _scores(train, test, protocol)
    own = scores.pop("target_encoder")
    described = {
        **protocol.described(),
        "data": config.data.name,
        "bank_images": len(train[0]),
        "query_images": len(test[0]),
        "attentive_bank_images": len(train[0].token_rows) if tokens else 0,
        "attentive_query_images": len(test[0].token_rows) if tokens else 0,
        "skipped_images": len(skipped),
    }
    promised = promises(own, model.config.data.name) if data is None else []
    more = {"promises": promised, "protocol": described, "trained": _trained(model)}
    return Report({**own, **more, "baselines": scores})


def _token_images(source: Source, config: Config, cap: int | None) -> np.ndarray:
    """Which images [N] the attentive probe looks at: a fixed random choice, all where they fit."""
    N = len(source)
    cells = sum(side**2 for side in config.level_sides)
    count = min(int(TOKEN_BYTES / (2 * cells * int(config.model.dim))), N if cap is None else cap)
    chosen = np.zeros(N, bool)
    chosen[generator(0, "attentive probe").permutation(N)[:count]] = True
    return chosen


def _encoders(model: HJEPA, tokens: bool) -> Callable[[], list[Encoder]]:
    """Makes the encoders of NETWORKS, and pixels; those with an attentive probe give tokens."""
    high, low = mx.random.state[0].tolist()  # type: ignore[index]
    random = type(model)(model.config)
    mx.random.seed((high << 32) | low)  # the caller's random numbers go on undisturbed
    # Threads cannot evaluate each other's arrays; those of a model just built are not yet.
    mx.eval(model.parameters(), random.parameters())
    return lambda: [
        model_features(model, "target", tokens),
        model_features(model, "context"),
        model_features(random, "target", tokens),
        pixels,
    ]


def _scores(train: list[Features], test: list[Features], protocol: Protocol) -> dict[str, Scores]:
    """Scores by network, kind and level; every level of every network is a job of its own."""
    for features in test[:-1]:
        for x in features.pooled.values():
            check_finite(x)
    jobs: list[tuple[str, str, Callable[[], Scores]]] = []
    if len(train[0].labels):  # pixels first: their probe takes longest
        job = partial(class_scores, train[-1], test[-1], "pixels", protocol)
        jobs.append(("pixels", "pixels", job))
    for network, own, asked in zip(NETWORKS, train, test, strict=False):
        few = network != "context_encoder"
        for level in own.pooled:
            jobs.append((network, level, partial(level_scores, own, asked, level, protocol, few)))
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
            if network == "pixels":
                scores[network] = {kind: found[kind] for kind in ("knn", "linear_probe")}
            else:
                _add(scores[network], level, found, test[0])
            mx.clear_cache()
            advance(1)
    return scores


def _add(scores: Scores, level: str, found: Scores, test: Features) -> None:
    """Enter the scores of a level, and the intervals of its accuracies, in those of a network."""
    for kind, value in found.items():
        scores.setdefault(kind, {})[level] = value
        if kind in ACCURACIES:
            count = len(test.token_rows) if kind == "attentive_probe" else len(test)
            intervals = scores.setdefault("confidence_95", {}).setdefault(kind, {})
            intervals[level] = interval(value, count)


def _trained(model: HJEPA) -> dict[str, Any]:
    """The checkpoint and model that the scores belong to."""
    c, origin = model.config, model.origin
    size = f"{c.model.size} ({c.model.dim} wide, {c.model.depth} blocks)"
    return {
        "run": origin.run if origin else None,
        "step": origin.step if origin else 0,
        "epochs": origin.epoch if origin else 0,
        "images": c.data.name,
        "model": f"ViT {size}, patch {c.model.patch_size} at {c.data.image_size}",
    }


def config_for(own: Config, data: str | None, data_dir: str | None) -> Config:
    """A run's config with another data set: by name, or by name or path of a config that has it."""
    config = own.model_copy(deep=True)
    if data is not None:
        config.data.name, config.data.dir = _name_and_dir(data)
        config.data.limit = None
    if data_dir is not None:
        config.data.dir = data_dir
    return config


def _name_and_dir(data: str) -> tuple[str, str | None]:
    if data == "folder" or all(name in SOURCES for name in data.split("+")):
        return data, None
    if data in config_names() or data.endswith((".yaml", ".yml")):
        config = load_config(data)
        return config.data.name, config.data.dir
    hint = f" For images: --data folder --data-dir {quote(data)}." if Path(data).is_dir() else ""
    raise UsageError(
        f"No data set or config '{data}'.{hint} Data sets: {', '.join(SOURCES)}, folder; configs: "
        f"{', '.join(config_names())}."
    )


def check_evaluable(train: Source, test: Source, k: int = K) -> None:
    """Refuse data that would only fail after the features have been computed."""
    if not len(test):
        raise UsageError(
            f"{train.name}: no image is left for evaluation. It needs at least 10 images in all; "
            f"there are {len(train)}."
        )
    least = max(k, HELD_OUT)
    if train.classes and len(train) < least:
        who = f"k-NN with k={k}" if k >= HELD_OUT else "The linear probe"
        raise UsageError(f"{who} needs at least {least} training images; there are {len(train)}.")
    check_same_classes(train, test)
