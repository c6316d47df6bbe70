"""Attention maps: where the target encoder looks."""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from hjepa_mlx.models.hjepa import HJEPA
from hjepa_mlx.viz.canvas import Picture, maps

HEADS = 6  # rows at most


def draw(model: HJEPA, images: np.ndarray) -> Picture:
    """The attention that each patch of the images [B, S, S, 3] uint8 gets, one column each.

    In the block of the coarsest level, over all heads and by head; brightest where it is largest.
    """
    grid, given = model.config.grid, received(model, images)
    B, heads, _ = given.shape
    given = given.reshape(B, heads, grid, grid)
    rows = {"all heads": given.mean(1)} | {f"head {n}": given[:, n] for n in range(heads)}
    rows = dict(list(rows.items())[: 1 + HEADS]) if heads > 1 else {"attention": given[:, 0]}
    return maps(images, grid, "Attention: the patches looked at", rows)[0]


def received(model: HJEPA, images: np.ndarray) -> np.ndarray:
    """Attention that each patch gets from all patches on average: [B, heads, N], sums to 1."""
    encoder, number = model.target_encoder, model.level_blocks[-1]
    (x,) = encoder(model.patches(images), after=[number - 1])
    block = encoder.blocks[number - 1]
    heads = block.attn.heads
    B, N, D = x.shape
    qkv = block.attn.qkv(block.norm1(x)).reshape(B, N, 3 * heads, D // heads)
    q, k, _ = (part.swapaxes(1, 2) for part in mx.split(qkv, 3, axis=2))  # [B, H, N, D/H]
    weights = mx.softmax(q @ k.swapaxes(2, 3) * (D // heads) ** -0.5, axis=-1)
    return np.array(weights.mean(2), np.float32)
