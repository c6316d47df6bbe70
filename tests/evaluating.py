"""Shared by the tests of evaluation: features, pictures, networks and runs to evaluate."""

import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from PIL import Image

import hjepa_mlx as hj
from hjepa_mlx import checkpoint, runs
from hjepa_mlx.config import Config
from hjepa_mlx.eval.features import Features

Arrays = tuple[np.ndarray, np.ndarray]  # features [N, D] and labels [N]
LEVELS = ["level_0", "level_1", "level_2"]
ALL = {*LEVELS, "whitened"}
QUICK = hj.Protocol(draws=0, attentive_images=0)
COLOURS = {"blue": (30, 30, 220), "green": (30, 220, 30), "red": (220, 30, 30)}


def clusters(seed: int, count: int, spread: float, classes: int = 5, dim: int = 16) -> Arrays:
    """Images around one centre a class; every class has its share."""
    centres = np.random.default_rng(0).normal(size=(classes, dim))
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.arange(count) % classes)
    x = centres[labels] + spread * rng.normal(size=(count, dim))
    return x.astype(np.float32), labels


def made(x: np.ndarray, labels: np.ndarray, tokens: np.ndarray | None = None) -> Features:
    """Features of one level, as `extract` would give them."""
    rows, by_level = np.arange(len(x)), {} if tokens is None else {"level_0": tokens}
    return Features({"level_0": x}, by_level, labels, rows, rows)


def cosine(queries: np.ndarray, bank: np.ndarray) -> np.ndarray:
    """[Q, N] in float64."""
    a, b = queries.astype(np.float64), bank.astype(np.float64)
    return (a @ b.T) / np.linalg.norm(a, axis=1)[:, None] / np.linalg.norm(b, axis=1)


def pictures(root: Path, count: int, classes: tuple[str, ...] = tuple(COLOURS)) -> Path:
    """A folder a class with `count` noisy 16×16 pictures of one colour."""
    rng = np.random.default_rng(zlib.crc32(root.name.encode()))
    for name in classes:
        (root / name).mkdir(parents=True)
        for number in range(count):
            noise = rng.integers(-30, 30, (16, 16, 3))
            pixels = np.clip(COLOURS[name] + noise, 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(root / name / f"{number:03d}.png")
    return root


def network(tiny_config: Callable[..., Config], **data: Any) -> hj.HJEPA:
    """A tiny model for 16×16 images, whose two encoders and random initialisation all differ."""
    model, *others = (
        hj.HJEPA(tiny_config(seed=seed, data={"image_size": 16, **data})) for seed in range(3)
    )
    model.target_encoder.update(others[0].target_encoder.parameters())
    model.context_encoder.update(others[1].context_encoder.parameters())
    mx.eval(model.parameters())
    return model


def saved(model: hj.HJEPA, folder: Path) -> str:
    """A run folder with the model in a checkpoint."""
    config = model.config.model_copy(deep=True)
    config.run.dir = str(folder)
    run = runs.create(config)
    step = hj.Step(model, config)
    state = {"epoch": 2.5, "images": 90, "position": [0, 0], "window": [], "milestone": True,
             "own_parts": {"loss_fn": None, "sampler": None, "model": None}}  # fmt: skip
    checkpoint.save(run.checkpoints, step, 7, state, 3)
    return str(folder)
