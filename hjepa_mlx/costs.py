"""What one training step costs: FLOP, bytes and memory, from the shapes alone."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from mlx.utils import tree_flatten

from hjepa_mlx.config import Config
from hjepa_mlx.masks import MaskSampler
from hjepa_mlx.models.hjepa import HJEPA
from hjepa_mlx.models.predictor import TOLD

GIGA = 1e9
BACKWARD = 3  # forward and backward together cost three forwards
FLOAT = 4  # bytes
# Arrays kept for the backward pass, in units of [tokens, dim] a block: two norms, two residuals,
# qkv before and after the split into heads, attention in and out, and the MLP's 4 + 4.
KEPT_PER_BLOCK = 20
OVERHEAD = 1.25  # transient buffers; benchmarks/README.md compares the estimate with measurements
# Arrays a block reads and writes, in the same units: norms 4, qkv 4, attention in and out 4,
# projection 2, MLP 5 + 8 + 5, two residual additions 6.
MOVED_PER_BLOCK = 38
UPDATE_MOVES = 9  # AdamW and EMA read weight, gradient, two moments, target; write all but one


@dataclass(frozen=True)
class Part:
    """GFLOP (a multiply-add counts as 2) and GB moved, per image, of one part of the step."""

    gflop: float
    gigabytes: float


@dataclass(frozen=True)
class Costs:
    """One step at `data.image_size`: its parts, tokens, and memory in GB."""

    target: Part
    context: Part
    predictor: Part
    update: Part
    context_tokens: int
    grid_tokens: int
    predicted_cells: list[float]  # per predicted level and mask, mean over block shapes
    memory_gb: float
    weights: dict[str, int]  # of each network

    @property
    def parts(self) -> dict[str, Part]:
        """The parts by name."""
        return {name: getattr(self, name) for name in ("target", "context", "predictor", "update")}

    @property
    def gflop(self) -> float:
        """GFLOP per image of a whole step."""
        return sum(part.gflop for part in self.parts.values())


def block_flop(tokens: float, dim: int) -> float:
    """FLOP of one transformer block's forward pass: projections, MLP and attention."""
    return 24 * tokens * dim**2 + 4 * tokens**2 * dim


def costs(config: Config, networks: HJEPA) -> Costs:
    """The costs of one training step of `networks`, which were built from `config`."""
    model, sampler = config.model, MaskSampler(config)
    weights = {
        name: sum(w.size for w in dict(tree_flatten(getattr(networks, name).parameters())).values())
        for name in ("context_encoder", "target_encoder", "predictor")
    }
    trained = weights["context_encoder"] + weights["predictor"]
    dim, depth, heads = int(model.dim), int(model.depth), int(model.heads)
    narrow, narrow_heads = model.predictor_dim, model.predictor_heads
    per_block = np.array([sampler.cells(shape) for shape in sampler.shapes])  # [shapes, levels]
    cells = (sampler.targets * per_block.mean(0)).tolist()
    tokens, context, queries = config.grid**2, sampler.context_tokens, sum(cells)
    told = [1 if kind == "mean" else context for kind in TOLD[model.predictor_context]]
    passes = [n + queries / len(told) for n in told]  # tokens in each of the predictor's
    pixels, per_image = 3 * model.patch_size**2, config.masks.per_image
    batch = config.data.batch_size
    area = np.mean([shape.area for shape in sampler.shapes])
    used = int(model.level_blocks[config.predicted[-1]])

    target = 2 * tokens * pixels * dim + used * block_flop(tokens, dim)
    target += per_image * 2 * queries * area * dim
    # pixels have no gradient: the patch embedding's backward pass is one matmul, not two
    encode = 2 * 2 * context * pixels * dim + BACKWARD * depth * block_flop(context, dim)
    predict = 2 * sum(told) * dim * narrow + 2 * queries * narrow * dim
    predict += model.predictor_depth * sum(block_flop(n, narrow) for n in passes)

    def moved(n: float, width: int, blocks: int, heads: int, masks: int = 0) -> float:
        scores = 4 * heads * n if masks else 0  # attention is fused outside gradients
        read = 12 * width**2 * blocks / (batch * max(1, masks))  # weights
        return FLOAT * (blocks * n * (MOVED_PER_BLOCK * width + scores) + read)

    def kept(n: float, width: int, blocks: int, heads: int) -> float:
        return blocks * n * (KEPT_PER_BLOCK * width + 2 * heads * n)

    predictor = (narrow, model.predictor_depth, narrow_heads)
    most = 2 if model.checkpoint_blocks else max(depth, model.predictor_depth)
    activations = kept(context, dim, min(most, depth), heads)
    activations += sum(
        kept(n, narrow, min(most, model.predictor_depth), narrow_heads) for n in passes
    )
    activations = per_image * activations + kept(tokens, dim, 1, heads)  # one block of the target's
    memory = FLOAT * (OVERHEAD * batch * activations + 5 * trained + 2 * weights["target_encoder"])
    return Costs(
        target=Part(target / GIGA, moved(tokens, dim, used, heads) / GIGA),
        context=Part(
            per_image * encode / GIGA,
            per_image * BACKWARD * moved(context, dim, depth, heads, per_image) / GIGA,
        ),
        predictor=Part(
            per_image * BACKWARD * predict / GIGA,
            per_image * BACKWARD * sum(moved(n, *predictor, per_image) for n in passes) / GIGA,
        ),
        update=Part(0.0, FLOAT * UPDATE_MOVES * trained / batch / GIGA),
        context_tokens=context,
        grid_tokens=tokens,
        predicted_cells=cells,
        memory_gb=memory / GIGA,
        weights=weights,
    )


def average_gflop(config: Config, networks: HJEPA) -> float:
    """GFLOP per image over the whole run, whose first stages may be at a lower resolution."""
    return sum(share * costs(config.at_size(size), networks).gflop for size, share in config.stages)
