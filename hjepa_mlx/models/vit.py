"""The Vision Transformer that is both context and target encoder (and, narrow, the predictor).

Pre-norm blocks, fixed 2-D sin-cos positions or a learned table, no class token. Parameters are
named as in timm and I-JEPA, so that published weights map by name; `patch_embed.proj.weight` is
[D, p·p·3], rows of a patch's pixels in (row, column, channel) order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from math import isqrt
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from hjepa_mlx.config import Config
from hjepa_mlx.models.cpu import kernels


def sincos_positions(positions: np.ndarray, dim: int) -> mx.array:
    """Fixed 2-D position table of I-JEPA (its first half encodes columns, its second rows).

    positions: [..., 2] (row, column) in patches, fractions allowed. Returns [N, dim] float32.
    """
    positions = positions.reshape(-1, 2)
    omega = 1.0 / 10000 ** (np.arange(dim // 4) / (dim / 4))
    halves = []
    for axis in (1, 0):
        angle = positions[:, axis, None] * omega
        halves += [np.sin(angle), np.cos(angle)]
    return mx.array(np.concatenate(halves, 1).astype(np.float32))


@lru_cache(maxsize=16)
def grid_positions(
    grid: int | tuple[int, int], trained: int, dim: int, step: float = 1.0
) -> mx.array:
    """Table of places from the first patch's centre to the last one's, `step` patches apart.

    grid: patches along each side, or rows and columns. A grid of another size than the encoder was
    built for (`trained`) covers the same image, so its places are stretched to that one's, rows and
    columns each. Returns [n·m, dim] in raster order, n = (rows − 1)/step + 1.
    """
    sides = (grid, grid) if isinstance(grid, int) else grid
    places = [(np.arange(0, n - 1 + step, step) + 0.5) * trained / n - 0.5 for n in sides]
    return sincos_positions(np.stack(np.meshgrid(*places, indexing="ij"), -1), dim)


def resize_matrix(old: int, new: int) -> np.ndarray:
    """Antialiased linear interpolation from `old` samples to `new`: [new, old], rows sum to 1."""
    centres = (np.arange(new) + 0.5) * old / new - 0.5
    weights = 1 - np.abs(np.arange(old) - centres[:, None]) / max(1, old / new)
    weights = np.maximum(weights, 0)
    return weights / weights.sum(1, keepdims=True)


def stretched(table: mx.array, grid: int | tuple[int, int]) -> mx.array:
    """A position table [n², D] resized to a grid of so many patches a side, or rows and columns."""
    side, sides = isqrt(len(table)), (grid, grid) if isinstance(grid, int) else grid
    if sides == (side, side):
        return table
    rows, columns = (mx.array(resize_matrix(side, n).astype(np.float32)) for n in sides)
    x = rows @ table.reshape(side, -1)  # [rows, n·D]
    return (columns @ x.reshape(sides[0], side, -1)).reshape(-1, table.shape[1])


def patchify(images: mx.array, patch_size: int, mean: list[float], std: list[float]) -> mx.array:
    """Images [B, H, W, 3] uint8 to normalised patches [B, H/p · W/p, p·p·3] float32.

    mean, std: of red, green and blue, where 1 is full intensity.
    """
    B, H, W, C = images.shape
    rows, columns = H // patch_size, W // patch_size
    x = (images.astype(mx.float32) - mx.array(mean) * 255) / (mx.array(std) * 255)
    x = x.reshape(B, rows, patch_size, columns, patch_size, C).swapaxes(2, 3)
    return x.reshape(B, rows * columns, patch_size * patch_size * C)


def take_tokens(x: mx.array, indices: mx.array) -> mx.array:
    """Gather tokens: x [B, N, D], indices [B·V, K] give [B·V, K, D], V masks per image."""
    taken = mx.take_along_axis(x, indices.reshape(len(x), -1, 1), axis=1)
    return taken.reshape(*indices.shape, -1)


def trunc_normal(shape: Sequence[int]) -> mx.array:
    """Normal numbers of deviation 0.02, cut at two deviations; that leaves a deviation of 0.0176.

    I-JEPA's are cut at 100 deviations. Measured to learn no better (docs/experiments.md).
    """
    return 0.02 * mx.random.truncated_normal(-2.0, 2.0, tuple(shape))


def checkpointed(block: nn.Module) -> Callable[[mx.array], mx.array]:
    """`block`, without keeping its activations: they are computed again for the gradient.

    MLX evaluates in any order; here the gradients of the weights come before the block below.
    """

    def run(x: mx.array) -> mx.array:
        own = block.trainable_parameters()
        weights: dict
        weights, x = _together(own, x)  # type: ignore[misc]
        block.update(weights)
        y: mx.array = nn.utils.checkpoint(block)(x)
        block.update(own)
        return y

    return run


@mx.custom_function
def _together(weights: dict, x: mx.array) -> tuple[dict, mx.array]:
    return weights, x


@_together.vjp
def _together_vjp(_inputs: Any, gradients: tuple[dict, mx.array], _outputs: Any) -> Any:
    of_weights, of_x = gradients
    (of_x,) = mx.depends([of_x], [*dict(tree_flatten(of_weights)).values()])
    return of_weights, of_x


class LayerNorm(nn.Module):
    """LayerNorm over the last axis, with a weight and a bias."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight, self.bias = mx.ones(dim), mx.zeros(dim)
        self._norm = kernels().layer_norm

    def __call__(self, x: mx.array) -> mx.array:
        """[B, N, dim] to [B, N, dim]."""
        return self._norm(x, self.weight, self.bias)


class Attention(nn.Module):
    """Multi-head self-attention."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self._attention = kernels().attention

    def __call__(self, x: mx.array) -> mx.array:
        """[B, N, D] to [B, N, D]."""
        B, N, D = x.shape
        qkv = self.qkv(x).reshape(B, N, 3 * self.heads, D // self.heads)
        q, k, v = (part.swapaxes(1, 2) for part in mx.split(qkv, 3, axis=2))  # [B, H, N, D/H]
        return self.proj(self._attention(q, k, v).swapaxes(1, 2).reshape(B, N, D))


class MLP(nn.Module):
    """Two linear layers with GELU between them."""

    def __init__(self, dim: int, hidden: int, out: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, out)
        self._gelu = kernels().gelu

    def __call__(self, x: mx.array) -> mx.array:
        """[…, dim] to […, out]."""
        return self.fc2(self._gelu(self.fc1(x)))


class Block(nn.Module):
    """Pre-norm transformer block number `number` (from 1), which sets its initial scale."""

    def __init__(self, dim: int, heads: int, number: int) -> None:
        super().__init__()
        self.norm1 = LayerNorm(dim)
        self.attn = Attention(dim, heads)
        self.norm2 = LayerNorm(dim)
        self.mlp = MLP(dim, 4 * dim, dim)
        for linear in (self.attn.qkv, self.attn.proj, self.mlp.fc1, self.mlp.fc2):
            linear.weight = trunc_normal(linear.weight.shape)
            linear.bias = mx.zeros_like(linear.bias)
        for linear in (self.attn.proj, self.mlp.fc2):  # as in BEiT; I-JEPA's code undoes it
            linear.weight = linear.weight / (2 * number) ** 0.5

    def __call__(self, x: mx.array) -> mx.array:
        """[B, N, D] to [B, N, D]."""
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


def blocks(dim: int, depth: int, heads: int) -> list[Block]:
    """A stack of transformer blocks."""
    return [Block(dim, heads, number) for number in range(1, depth + 1)]


class PatchEmbed(nn.Module):
    """Linear embedding of patches, initialised so that they are heard beside the positions.

    Xavier-uniform over the flattened kernel, as in MAE: with I-JEPA's 0.02 the tokens of small
    patches drown in the position table (RMS 0.14 against 0.71 at patch 4).
    """

    def __init__(self, patch_size: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Linear(patch_size * patch_size * 3, dim)
        self.proj.weight = nn.init.glorot_uniform()(self.proj.weight, 1.0)
        self.proj.bias = mx.zeros_like(self.proj.bias)

    def __call__(self, patches: mx.array) -> mx.array:
        """[B, N, p·p·3] to [B, N, D]."""
        return self.proj(patches)


class VisionTransformer(nn.Module):
    """ViT over any subset of an image's patches."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        model = config.model
        self.grid, self.dim = config.position_grid, int(model.dim)
        self._run = checkpointed if model.checkpoint_blocks else lambda block: block
        self.patch_embed = PatchEmbed(model.patch_size, self.dim)
        self.blocks = blocks(self.dim, int(model.depth), int(model.heads))
        self.norm = LayerNorm(self.dim)
        if model.positions == "learned":
            self.pos_embed = self.positions(self.grid)

    def positions(self, grid: int | tuple[int, int]) -> mx.array:
        """The positions of a grid of any size or shape, [patches, D] in raster order."""
        if "pos_embed" in self:
            return stretched(self.pos_embed, grid)
        return grid_positions(grid, self.grid, self.dim)

    def __call__(
        self,
        patches: mx.array,
        indices: mx.array | None = None,
        after: Sequence[int] | None = None,
        grid: tuple[int, int] | None = None,
    ) -> list[mx.array]:
        """Features after each block numbered in `after` (from 1; default: the last block).

        patches: [B, N, p·p·3] as `patchify` gives them, of any `grid` of rows and columns (default:
        a square); indices: [B·V, K] looks only at those. Returns one [B, N, D] or [B·V, K, D] per
        item of `after`; the last block's passes the final norm.
        """
        after = after or [len(self.blocks)]
        positions = self.positions(grid or isqrt(patches.shape[1]))
        if indices is not None:
            patches, positions = take_tokens(patches, indices), positions[indices]
        x = self.patch_embed(patches)
        x = x + positions.astype(x.dtype)  # [B, N, D]
        outputs = {0: x}
        for number, block in enumerate(self.blocks[: max(after)], 1):
            x = self._run(block)(x)
            outputs[number] = x
        if len(self.blocks) in outputs:
            outputs[len(self.blocks)] = self.norm(x)
        return [outputs[number] for number in after]
