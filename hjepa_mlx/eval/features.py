"""Features: what the frozen encoder makes of a data set's images, one vector an image and level."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from hjepa_mlx.config import Config
from hjepa_mlx.data.pipeline import Skipped, evaluation_images
from hjepa_mlx.data.sources import Source
from hjepa_mlx.errors import HJEPAError
from hjepa_mlx.models.hjepa import HJEPA

BATCH = 128
PIXEL_SIDE = 32  # the pixel baseline looks at images reduced to about this


@dataclass(frozen=True)
class Features:
    """Features of N images by name, each [N, D] float32, and the images' labels [N]."""

    by_name: dict[str, np.ndarray]
    labels: np.ndarray


Encoder = Callable[[np.ndarray], dict[str, mx.array]]  # [B, S, S, 3] uint8 to named [B, D]


def mean_features(model: HJEPA, encoder: str = "target") -> Encoder:
    """An encoder that gives each level's features averaged over the grid: level_0, level_1, …"""

    def means(images: mx.array) -> list[mx.array]:
        return [level.mean(1) for level in model.encode(images, encoder)]

    compiled = mx.compile(means, inputs=[model.state]) if model.config.compile else means

    def encode(images: np.ndarray) -> dict[str, mx.array]:
        return {f"level_{number}": x for number, x in enumerate(compiled(mx.array(images)))}

    return encode


def pixels(images: np.ndarray) -> dict[str, mx.array]:
    """The pixel baseline: images [B, S, S, 3] reduced to about 32×32 and flattened."""
    B, S = images.shape[:2]
    factor = max(1, S // PIXEL_SIDE)
    side = S // factor
    x = images[:, : side * factor, : side * factor].astype(np.float32)
    x = x.reshape(B, side, factor, side, factor, 3).mean((2, 4)) / 255
    return {"pixels": mx.array(x.reshape(B, -1))}


def extract(
    encoders: Sequence[Encoder], source: Source, config: Config, skipped: Skipped
) -> list[Features]:
    """Run every encoder over every readable image of `source`, reading the images once."""
    outputs: list[list[dict[str, np.ndarray]]] = [[] for _ in encoders]
    indices: list[int] = []
    batch: list[np.ndarray] = []

    def flush() -> None:
        images = np.stack(batch + [batch[-1]] * (BATCH - len(batch)))  # one shape: one compilation
        for output, encode in zip(outputs, encoders, strict=True):
            named = encode(images)
            mx.eval(named)
            output.append({name: np.array(x)[: len(batch)] for name, x in named.items()})
        batch.clear()

    for index, image in evaluation_images(source, config, skipped):
        indices.append(index)
        batch.append(image)
        if len(batch) == BATCH:
            flush()
    if batch:
        flush()
    if not indices:
        raise HJEPAError(
            f"{source.name}: none of the {len(source)} images can be read. {skipped.first()}"
        )
    labels = source.labels[indices] if source.classes else source.labels
    return [
        Features({name: np.concatenate([o[name] for o in output]) for name in output[0]}, labels)
        for output in outputs
    ]
