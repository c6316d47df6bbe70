"""What one training step costs: GFLOP per image and memory, from the shapes alone."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from mlx.utils import tree_flatten

from hjepa_mlx.config import Config
from hjepa_mlx.masks import MaskSampler
from hjepa_mlx.models.hjepa import HJEPA

BACKWARD = 3  # forward and backward together cost three forwards
FLOAT = 4  # bytes
# Arrays kept for the backward pass, in units of [tokens, dim] a block: two norms, two residuals,
# qkv before and after the split into heads, attention in and out, and the MLP's 4 + 4.
KEPT_PER_BLOCK = 20
OVERHEAD = 1.25  # transient buffers; benchmarks/README.md compares the estimate with measurements


@dataclass(frozen=True)
class Costs:
    """GFLOP per image and step (a multiply-add counts as 2), tokens, and memory in GB."""

    target: float
    context: float
    predictor: float
    context_tokens: int
    grid_tokens: int
    predicted_cells: list[float]  # per level and image, mean over block shapes
    memory_gb: float
    weights: dict[str, int]  # of each network

    @property
    def total(self) -> float:
        """GFLOP per image of a whole step."""
        return self.target + self.context + self.predictor


def block_flop(tokens: float, dim: int) -> float:
    """FLOP of one transformer block's forward pass: projections, MLP and attention."""
    return 24 * tokens * dim**2 + 4 * tokens**2 * dim


def costs(config: Config, networks: HJEPA) -> Costs:
    """The costs of one training step of `networks`, which were built from `config`."""
    weights = {
        name: sum(w.size for w in dict(tree_flatten(getattr(networks, name).parameters())).values())
        for name in ("context_encoder", "target_encoder", "predictor")
    }
    trained = weights["context_encoder"] + weights["predictor"]
    model, sampler = config.model, MaskSampler(config)
    dim, depth, narrow = int(model.dim), int(model.depth), model.predictor_dim
    per_block = np.array([sampler.cells(shape) for shape in sampler.shapes])  # [shapes, L]
    cells = (sampler.targets * per_block.mean(0)).tolist()
    tokens, context = config.grid**2, sampler.context_tokens
    pixels = 3 * model.patch_size**2
    queries = sum(cells)
    used = max(int(block) for block in model.level_blocks)
    area = np.mean([shape.area for shape in sampler.shapes])
    target = 2 * tokens * pixels * dim + used * block_flop(tokens, dim) + 2 * queries * area * dim
    encode = 2 * context * pixels * dim + depth * block_flop(context, dim)
    predict = (
        2 * context * dim * narrow
        + model.predictor_depth * block_flop(context + queries, narrow)
        + 2 * queries * narrow * dim
    )
    batch = config.data.batch_size

    def kept(n: float, width: int, blocks: int, heads: int) -> float:
        return blocks * n * (KEPT_PER_BLOCK * width + 2 * heads * n)

    most = 2 if model.checkpoint_blocks else max(depth, model.predictor_depth)
    activations = kept(context, dim, min(most, depth), int(model.heads))
    narrow_blocks = min(most, model.predictor_depth)
    activations += kept(context + queries, narrow, narrow_blocks, max(1, narrow // 64))
    activations += kept(tokens, dim, 1, int(model.heads))  # the target encoder keeps one block's
    memory = FLOAT * (OVERHEAD * batch * activations + 5 * trained + 2 * weights["target_encoder"])
    giga = 1e9
    return Costs(
        target=target / giga,
        context=BACKWARD * encode / giga,
        predictor=BACKWARD * predict / giga,
        context_tokens=context,
        grid_tokens=tokens,
        predicted_cells=cells,
        memory_gb=memory / giga,
        weights=weights,
    )
