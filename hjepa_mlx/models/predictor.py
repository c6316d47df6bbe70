"""The predictor: from the context to the target cells of all blocks and levels."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from hjepa_mlx.config import Config
from hjepa_mlx.models.vit import LayerNorm, blocks, checkpointed, grid_positions, trunc_normal

TOLD = {"tokens": ("tokens",), "mean": ("mean",), "both": ("tokens", "mean")}


class Predictor(nn.Module):
    """A narrow ViT over the projected context and one mask token per cell to predict.

    `model.predictor_context` is the part of the context that it sees: "tokens", at their
    positions; "mean", only their mean, as one token without a position; or "both", the tokens for
    the first half of each level's cells and the mean for the rest. To predict from the mean, the
    encoder must put the image's content into the mean, which evaluation reads. To predict from
    tokens, it may leave the content spread over them.
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        model, levels = config.model, len(config.masked)
        self.grid, self.dim = config.position_grid, model.predictor_dim
        self._told = TOLD[model.predictor_context]
        self._run = checkpointed if model.checkpoint_blocks else lambda block: block
        self.embed = nn.Linear(int(model.dim), self.dim)
        self.mask_token = trunc_normal((self.dim,))
        self.level_embed = trunc_normal((levels, self.dim))
        self.blocks = blocks(self.dim, model.predictor_depth, model.predictor_heads)
        self.norm = LayerNorm(self.dim)
        self.heads = [nn.Linear(self.dim, int(model.dim)) for _ in range(levels)]
        for linear in (self.embed, *self.heads):
            linear.weight = trunc_normal(linear.weight.shape)
            linear.bias = mx.zeros_like(linear.bias)

    def __call__(
        self, context: mx.array, indices: mx.array, centres: mx.array, cells: list[int], grid: int
    ) -> list[mx.array]:
        """Predict the features of every target cell.

        context: [B, K, D] from the context encoder; indices: [B, K] its patches of `grid` a side;
        centres: [B, Σ cells] half-cell positions of the cells to predict, level after level.
        Returns L arrays [B, cells[l], D].
        """
        # cell centres fall on patches or half-way between them: [(2·grid − 1)², dim]
        positions = grid_positions(grid, self.grid, self.dim, step=0.5)
        patches = indices // grid * (2 * (2 * grid - 1)) + indices % grid * 2
        starts = np.cumsum([0, *cells[:-1]])
        parts = []
        for part, told in enumerate(self._told):
            edges = np.outer([part, part + 1], cells) // len(self._told)  # of each level's cells
            own = [np.arange(*edge) + start for edge, start in zip(edges.T, starts, strict=True)]
            if told == "mean":
                x = self.embed(context.mean(1, keepdims=True))  # [B, 1, dim]
            else:
                x = self.embed(context)
                x = x + positions[patches].astype(x.dtype)  # [B, K, dim]
            places = positions[centres[:, mx.array(np.concatenate(own))]]
            parts.append(self._predict(x, places, list(map(len, own))))
        return [mx.concatenate(list(level), axis=1) for level in zip(*parts, strict=True)]

    def _predict(self, x: mx.array, places: mx.array, cells: list[int]) -> list[mx.array]:
        """Predictions [B, cells[l], D] at places [B, Σ cells, dim] from x [B, n, dim]."""
        told = x.shape[1]
        # no gather: on a GPU its gradient is a sum in any order, and no two runs are the same
        of_level = zip(self.level_embed, cells, strict=True)
        queries = mx.concatenate([mx.broadcast_to(row, (n, self.dim)) for row, n in of_level])
        queries = self.mask_token + queries  # [Σ cells, dim]
        queries = queries + places.astype(x.dtype)  # [B, Σ cells, dim]
        x = mx.concatenate([x, queries], axis=1)
        for block in self.blocks:
            x = self._run(block)(x)
        x = self.norm(x[:, told:])
        per_level = mx.split(x, np.cumsum(cells)[:-1].tolist(), axis=1)
        return [head(part) for head, part in zip(self.heads, per_level, strict=True)]
