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
from hjepa_mlx.eval import protocols
from hjepa_mlx.eval.accuracy import HELD_OUT, check_finite
from hjepa_mlx.eval.features import (
    Encoder,
    Features,
    drop_equal_channels,
    extract,
    model_features,
    pixels,
)
from hjepa_mlx.eval.knn import K
from hjepa_mlx.eval.protocols import Protocol, Scores
from hjepa_mlx.eval.rank import alignment
from hjepa_mlx.eval.report import Report
from hjepa_mlx.eval.verdict import verdicts
from hjepa_mlx.models.hjepa import HJEPA
from hjepa_mlx.progress import bar
from hjepa_mlx.recipes import config_names, load_config
from hjepa_mlx.rng import generator

ALIGNED = 256  # test images whose random crop is compared with the whole
TARGET = "target_encoder"
ENCODERS = (TARGET, "context_encoder", "random_init", "pixels")
FULLY_EVALUATED = (TARGET, "random_init")  # with few labels and the attentive probe too


def evaluate(
    model: HJEPA,
    data: str | None = None,
    data_dir: str | None = None,
    protocol: Protocol | None = None,
) -> Report:
    """Evaluate a model's frozen features on its own data set, or on `data` found in `data_dir`.

    data: name of a data set, or name or path of a config that has one. Probes and bank learn from
    the training split; the test split is looked at once. Without classes only the label-free
    figures are made.
    """
    protocol = protocol or Protocol()
    config = config_for(model.config, data, data_dir)
    train, test = open_source(config.data, "train"), open_source(config.data, "test")
    check_evaluable(train, test, protocol.k)
    strides = _token_strides(train, test, config, protocol)
    backend.set_memory_limits()
    skipped = Skipped()
    encoders = _encoders(model)
    learnt_from, judged_on = (
        extract(partial(encoders, tokens=bool(strides)), source, config, skipped, stride)
        for source, stride in zip((train, test), strides or (1, 1), strict=True)
    )
    drop_equal_channels(learnt_from[-1], judged_on[-1])
    scores = _scores(learnt_from, judged_on, protocol)
    for name, by_level in _alignment(encoders, test, judged_on, config, skipped).items():
        for level, value in by_level.items():
            scores[name]["features"][level]["alignment"] = value
    result = scores.pop(TARGET)
    kinds = scores["pixels"].keys() & {"knn", "linear_probe"}
    scores["pixels"] = {kind: scores["pixels"][kind]["pixels"] for kind in sorted(kinds)}
    return Report(
        {
            **result,
            "promises": verdicts(result, model.config.data.name if data is None else ""),
            "baselines": scores,
            "protocol": {
                **protocol.described(),
                "data": config.data.name,
                "bank_images": len(learnt_from[0]),
                "query_images": len(judged_on[0]),
                "attentive_bank_images": len(learnt_from[0].token_labels) if strides else 0,
                "attentive_query_images": len(judged_on[0].token_labels) if strides else 0,
                "skipped_images": len(skipped),
            },
            "trained": _trained(model),
        }
    )


def _token_strides(
    train: Source, test: Source, config: Config, protocol: Protocol
) -> tuple[int, int] | None:
    """Of how many images one has its tokens kept, in training and test; None: no tokens at all."""
    if not train.classes or not protocol.token_gb:
        return None
    cells = sum(side**2 for side in config.level_sides)
    learnt, judged = (
        protocol.token_stride(len(source), cells, int(config.model.dim)) for source in (train, test)
    )
    kept = -(-len(train) // learnt)
    if kept < HELD_OUT:
        raise UsageError(
            f"token_gb={protocol.token_gb:g} holds the tokens of {kept} training images, and the "
            f"attentive probe needs at least {HELD_OUT}: give more, or 0 to leave it out."
        )
    return learnt, judged


def _encoders(model: HJEPA) -> Callable[..., list[Encoder]]:
    """Makes the encoders named in ENCODERS; those that get an attentive probe give tokens."""
    high, low = mx.random.state[0].tolist()  # type: ignore[index]
    random = type(model)(model.config)
    mx.random.seed((high << 32) | low)  # the caller's random numbers go on as if nothing had been
    # Threads cannot evaluate each other's arrays; those of a model just built are not yet.
    mx.eval(model.parameters(), random.parameters())

    def make(tokens: bool = False) -> list[Encoder]:
        return [
            model_features(model, "target", tokens),
            model_features(model, "context"),
            model_features(random, "target", tokens),
            pixels,
        ]

    return make


def _scores(
    learnt_from: list[Features], judged_on: list[Features], protocol: Protocol
) -> dict[str, Scores]:
    """Scores by encoder, protocol and level; every level of every encoder is a job of its own."""
    jobs: list[tuple[str, str, Callable[[], Scores]]] = []
    of_each = [*zip(ENCODERS, learnt_from, judged_on, strict=True)]
    for encoder, train, test in reversed(of_each):  # pixels first: their probe takes longest
        few = encoder in FULLY_EVALUATED
        for name in train.by_name:
            check_finite(test.by_name[name], "The evaluation")
            job = partial(protocols.level_scores, train, test, name, protocol, few)
            jobs.append((encoder, name, job))
        for name in train.tokens:
            jobs.append((encoder, name, partial(protocols.token_scores, train, test, name)))
    scores: dict[str, Scores] = {encoder: {} for encoder in ENCODERS}
    with (
        bar("Probing", len(jobs), "of them") as advance,
        backend.computing_threads() as threads,
        ThreadPoolExecutor(threads) as pool,
    ):
        run = pool.map if threads > 1 else map  # what a GPU computes stays in this thread
        results = run(lambda job: job[2](), jobs)
        for (encoder, name, _), result in zip(jobs, results, strict=True):
            _merge(scores[encoder], name, result)
            mx.clear_cache()
            advance(1)
    return scores


def _merge(scores: Scores, name: str, result: Scores) -> None:
    """Put {protocol: value} of one level into {protocol: {level: value}}."""
    for kind, value in result.items():
        if kind == "confidence_95":
            _merge(scores.setdefault(kind, {}), name, value)
        else:
            scores.setdefault(kind, {})[name] = value


def _alignment(
    encoders: Callable[..., list[Encoder]],
    test: Source,
    judged_on: list[Features],
    config: Config,
    skipped: Skipped,
) -> dict[str, dict[str, float]]:
    """Alignment of each network's features of test images and of a random crop of each."""
    few = np.sort(generator(0, "aligned").permutation(len(test))[:ALIGNED])
    crops = extract(lambda: encoders()[:-1], test.take(few), config, skipped, cropped=True)
    found = {}
    for name, whole, cropped in zip(ENCODERS, judged_on, crops, strict=False):
        rows = np.searchsorted(whole.indices, few[cropped.indices])
        found[name] = {
            level: alignment(whole.by_name[level][rows], x) for level, x in cropped.by_name.items()
        }
    return found


def _trained(model: HJEPA) -> dict[str, Any]:
    """What was trained, for how long: so that scores are not taken for another checkpoint's."""
    c = model.config
    return {
        "run": model.origin.run if model.origin else None,
        "step": model.origin.step if model.origin else 0,
        "epochs": model.origin.epoch if model.origin else 0,
        "images": c.data.name,
        "model": f"ViT {c.model.size} ({c.model.dim} wide, {c.model.depth} blocks), patch "
        f"{c.model.patch_size} at {c.data.image_size}",
    }


def config_for(own: Config, data: str | None, data_dir: str | None) -> Config:
    """A run's config with another data set: by name, or by name or path of a config that has it."""
    config = own.model_copy(deep=True)
    if data is not None:
        config.data.name, config.data.dir = _name_and_dir(data)
        config.data.limit, config.data.weights = None, "auto"
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
    """Refuse what would only fail after the features have been computed."""
    if not len(test):
        raise UsageError(
            f"{train.name}: no image is left for evaluation; there have to be at least 10 in all, "
            f"there are {len(train)}."
        )
    least = max(k, HELD_OUT)
    if train.classes and len(train) < least:
        what = f"k-NN with k={k}" if k >= HELD_OUT else "The linear probe"
        raise UsageError(f"{what} needs at least {least} training images; there are {len(train)}.")
    check_same_classes(train, test)
