"""The predictor: from context tokens to the target cells of all blocks and levels, in one pass."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from hjepa_mlx.models.vit import blocks, grid_positions, trunc_normal


class Predictor(nn.Module):
    """A narrow ViT over the projected context and one mask token per cell to predict.

    from_mean: of the context only the mean of its tokens is projected, as one token without a
    position. What is to be predicted anywhere must then be in the mean, which is what evaluation
    uses; with all tokens it may stay spread over them.
    """

    def __init__(
        self,
        grid: int,
        levels: int,
        encoder_dim: int,
        dim: int,
        depth: int,
        from_mean: bool = False,
        checkpoint: bool = False,
    ) -> None:
        super().__init__()
        self._run = nn.utils.checkpoint if checkpoint else lambda block: block
        heads = max(1, dim // 64)
        self.embed = nn.Linear(encoder_dim, dim)
        self.mask_token = trunc_normal((dim,))
        self.level_embed = trunc_normal((levels, dim))
        self.blocks = blocks(dim, depth, heads)
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.heads = [nn.Linear(dim, encoder_dim) for _ in range(levels)]
        for linear in (self.embed, *self.heads):
            linear.weight = trunc_normal(linear.weight.shape)
            linear.bias = mx.zeros_like(linear.bias)
        self.grid, self.dim, self.from_mean = grid, dim, from_mean

    def __call__(
        self, context: mx.array, indices: mx.array, centres: mx.array, cells: list[int], grid: int
    ) -> list[mx.array]:
        """Predict the features of every target cell.

        context: [B, K, D] from the context encoder; indices: [B, K] its patches of `grid` a side;
        centres: [B, Σ cells] half-cell positions of what is predicted, level after level.
        Returns L arrays [B, cells[l], D].
        """
        # cell centres fall on patches or half-way between them: [(2·grid − 1)², dim]
        positions = grid_positions(grid, self.grid, self.dim, step=0.5)
        if self.from_mean:
            x = self.embed(context.mean(1, keepdims=True))  # [B, 1, dim]
        else:
            patches = indices // grid * (2 * (2 * grid - 1)) + indices % grid * 2
            x = self.embed(context)
            x = x + positions[patches].astype(x.dtype)  # [B, K, dim]
        told = x.shape[1]
        levels = np.repeat(np.arange(len(cells)), cells)
        queries = self.mask_token + self.level_embed[mx.array(levels)]  # [Σ cells, dim]
        queries = queries + positions[centres].astype(x.dtype)  # [B, Σ cells, dim]
        x = mx.concatenate([x, queries], axis=1)
        for block in self.blocks:
            x = self._run(block)(x)
        x = self.norm(x[:, told:])
        per_level = mx.split(x, np.cumsum(cells)[:-1].tolist(), axis=1)
        return [head(part) for head, part in zip(self.heads, per_level, strict=True)]
