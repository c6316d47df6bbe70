"""What one training step costs: FLOP, bytes and memory, from the shapes alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from mlx.utils import tree_flatten

from hjepa_mlx.config import Config
from hjepa_mlx.masks import MaskSampler
from hjepa_mlx.models.hjepa import HJEPA
from hjepa_mlx.models.predictor import TOLD
from hjepa_mlx.optimizer import by_muon, muon_flop
from hjepa_mlx.views import rendering_flop
from hjepa_mlx.whitening import whitening_flop

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

    parts: dict[str, Part]  # target, context, views, predictor, update
    context_tokens: int
    grid_tokens: int
    predicted_cells: list[float]  # per predicted level and mask, mean over block shapes
    memory_gb: float
    weights: dict[str, int]  # of each network

    @property
    def gflop(self) -> float:
        """GFLOP per image of a whole step."""
        return sum(part.gflop for part in self.parts.values())


class _Stack(NamedTuple):
    """A stack of transformer blocks."""

    width: int
    depth: int
    heads: int

    def flop(self, tokens: float) -> float:
        """FLOP of a forward pass: projections, MLP and attention."""
        return self.depth * (24 * tokens * self.width**2 + 4 * tokens**2 * self.width)

    def learned(self, tokens: int, pixels: int) -> float:
        """FLOP of a pass and its gradients, from patches of so many numbers."""
        # pixels have no gradient: the patch embedding's backward pass is one matmul, not two
        return 2 * 2 * tokens * pixels * self.width + BACKWARD * self.flop(tokens)

    def moved(self, tokens: float, passes: float, fused: bool = False) -> float:
        """Bytes that a forward pass moves; the weights are read once for so many passes."""
        if not tokens:
            return 0.0
        scores = 0 if fused else 4 * self.heads * tokens
        weights = 12 * self.width**2 * self.depth / passes
        return FLOAT * (self.depth * tokens * (MOVED_PER_BLOCK * self.width + scores) + weights)

    def kept(self, tokens: float, most: int) -> float:
        """Numbers kept for the backward pass, by `most` blocks at once."""
        per_token = KEPT_PER_BLOCK * self.width + 2 * self.heads * tokens
        return min(most, self.depth) * tokens * per_token


def costs(config: Config, networks: HJEPA) -> Costs:
    """The costs of one training step of `networks`, which were built from `config`."""
    model, sampler = config.model, MaskSampler(config)
    trees = networks.parameters().items()
    weights = {k: sum(x.size for x in dict(tree_flatten(tree)).values()) for k, tree in trees}
    trained = sum(weights.values()) - weights["target_encoder"]
    dim, narrow = int(model.dim), model.predictor_dim
    encoder = _Stack(dim, int(model.depth), int(model.heads))
    looked_at = encoder._replace(depth=int(model.level_blocks[config.predicted[-1]]))
    predictor = _Stack(narrow, model.predictor_depth, model.predictor_heads)
    per_block = np.array([sampler.cells(shape) for shape in sampler.shapes])  # [shapes, levels]
    cells = (sampler.targets * per_block.mean(0)).tolist()
    tokens, queries, seen = config.grid**2, sum(cells), config.view_grid**2
    context = sampler.context_tokens if config.masked else 0
    told = [1 if kind == "mean" else context for kind in TOLD[model.predictor_context]]
    passes = [n + queries / len(told) for n in told if queries]  # tokens in the predictor's
    pixels, masks, batch = 3 * model.patch_size**2, config.masks.per_image, config.data.batch_size
    views, area = config.views.count, np.mean([shape.area for shape in sampler.shapes])
    image = BACKWARD * 2 * weights.get("image_predictor", 0)

    target = 2 * tokens * pixels * dim + looked_at.flop(tokens) + masks * 2 * queries * area * dim
    read = BACKWARD * encoder.moved(context, batch * masks)
    target += whitening_flop(batch, dim) / batch if config.image_predicted else 0
    asked = sum(predictor.moved(n, batch * masks) for n in passes)
    look = rendering_flop(config.view_grid * model.patch_size, config.data.image_size)
    look += encoder.learned(seen, pixels) + image + BACKWARD * 2 * weights.get("projector", 0)
    predict = 2 * sum(told) * dim * narrow + 2 * queries * narrow * dim if queries else 0
    predict = BACKWARD * (predict + sum(map(predictor.flop, passes)))
    predict += image if config.masked else 0
    most = 2 if model.checkpoint_blocks else max(encoder.depth, predictor.depth)
    kept = encoder.kept(context, most) + sum(predictor.kept(n, most) for n in passes)
    kept = masks * kept + views * encoder.kept(seen, most)
    kept += encoder.kept(tokens, 1)  # of the target encoder, one block
    floats = OVERHEAD * batch * kept + 5 * trained + 2 * weights["target_encoder"]
    update = sum(muon_flop(x.shape) for x in by_muon(config, networks)) / config.optim.accumulate
    parts = {  # FLOP, bytes
        "target": (target, looked_at.moved(tokens, batch, fused=True)),
        "context": (masks * encoder.learned(context, pixels), masks * read),
        "views": (views * look, views * BACKWARD * encoder.moved(seen, batch * views)),
        "predictor": (masks * predict, masks * BACKWARD * asked),
        "update": (update / batch, FLOAT * UPDATE_MOVES * trained / batch),
    }
    return Costs(
        {name: Part(flop / GIGA, moved / GIGA) for name, (flop, moved) in parts.items()},
        context_tokens=context,
        grid_tokens=tokens,
        predicted_cells=cells,
        memory_gb=FLOAT * floats / GIGA,
        weights=weights,
    )


def average_gflop(config: Config, networks: HJEPA) -> float:
    """GFLOP per image over the whole run, whose first stages may be at a lower resolution."""
    return sum(share * costs(config.at_size(size), networks).gflop for size, share in config.stages)
