"""A plain PyTorch I-JEPA training step: the peer that `compare.py` sets beside this project's.

Written from the paper (arXiv 2301.08243, sections 3 and A.1) on timm's transformer block: ViT-S/16
without class token, context encoder on context tokens only, predictor once per target block, masks
of one block shape a batch with the context cut to the batch's smallest. Eager, float32, fused
AdamW, scaled_dot_product_attention, heads of 64 in the predictor too.
"""

from __future__ import annotations

import copy
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Block
from torch import nn

TARGETS = 4  # blocks an image; areas, aspects: I-JEPA, section 3 and table 6
TARGET_AREA, TARGET_ASPECT, CONTEXT_AREA = (0.15, 0.2), (0.75, 1.5), (0.85, 1.0)
LEAST_CONTEXT = 10  # tokens; an image with fewer is drawn again
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def draw_masks(
    rng: np.random.Generator, batch: int, grid: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token indices of context [B, K] and target blocks [B, M, A], one block shape a batch."""
    tokens = np.arange(grid**2).reshape(grid, grid)
    target_sides = _sides(rng, grid, TARGET_AREA, TARGET_ASPECT)
    context_sides = _sides(rng, grid, CONTEXT_AREA, (1.0, 1.0))
    contexts: list[np.ndarray] = []
    targets: list[np.ndarray] = []
    while len(contexts) < batch:
        blocks = np.stack([_block(rng, tokens, target_sides) for _ in range(TARGETS)])
        context = np.setdiff1d(_block(rng, tokens, context_sides), blocks)
        if len(context) >= LEAST_CONTEXT:
            contexts.append(context)
            targets.append(blocks)
    least = min(map(len, contexts))
    context = np.stack([context[:least] for context in contexts])  # in raster order
    return torch.from_numpy(context), torch.from_numpy(np.stack(targets))


def _sides(
    rng: np.random.Generator, grid: int, area: tuple[float, float], aspect: tuple[float, float]
) -> np.ndarray:
    size, ratio = rng.uniform(*area) * grid**2, rng.uniform(*aspect)
    return np.sqrt([size * ratio, size / ratio]).round().astype(int).clip(1, grid)


def _block(rng: np.random.Generator, tokens: np.ndarray, sides: np.ndarray) -> np.ndarray:
    top, left = rng.integers(0, len(tokens) - sides + 1)
    return tokens[top : top + sides[0], left : left + sides[1]].ravel()


def positions(grid: int, dim: int) -> torch.Tensor:
    """Fixed sines and cosines of column and row, [grid², dim]."""
    angles = torch.arange(grid)[:, None] * 10000 ** (-torch.arange(dim // 4) / (dim // 4))
    line = torch.cat([angles.sin(), angles.cos()], 1)  # [grid, dim/2]
    return torch.cat([line.repeat(grid, 1), line.repeat_interleave(grid, 0)], 1)


def blocks(dim: int, depth: int) -> nn.Sequential:
    """Transformer blocks with heads of 64."""
    norm = partial(nn.LayerNorm, eps=1e-6)
    heads = max(1, dim // 64)
    return nn.Sequential(*[Block(dim, heads, qkv_bias=True, norm_layer=norm) for _ in range(depth)])


def take(x: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """Tokens [B, n, D] of x [B, N, D] at indices [B, n]."""
    return x.gather(1, indices[..., None].expand(-1, -1, x.shape[-1]))


def patchify(images: torch.Tensor, patch: int) -> torch.Tensor:
    """Normalised pixels [B, N, p·p·3] of uint8 images [B, S, S, 3]."""
    B, S = images.shape[:2]
    x = (images / 255 - torch.tensor(MEAN)) / torch.tensor(STD)
    x = x.reshape(B, S // patch, patch, S // patch, patch, 3).transpose(2, 3)
    return x.reshape(B, (S // patch) ** 2, -1)


class Encoder(nn.Module):
    """A ViT over all patches, or over the indexed ones only."""

    def __init__(self, grid: int, patch: int, dim: int, depth: int) -> None:
        super().__init__()
        self.embed = nn.Linear(3 * patch**2, dim)
        self.blocks = blocks(dim, depth)
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.register_buffer("positions", positions(grid, dim))

    def forward(self, patches: torch.Tensor, indices: torch.Tensor | None = None) -> torch.Tensor:
        """Features [B, n, D] of patches [B, N, p·p·3]."""
        if indices is None:
            x = self.embed(patches) + self.positions
        else:
            x = self.embed(take(patches, indices)) + self.positions[indices]
        return self.norm(self.blocks(x))


class Predictor(nn.Module):
    """A narrow ViT over the context and the mask tokens of one target block."""

    def __init__(self, grid: int, encoder_dim: int, dim: int, depth: int) -> None:
        super().__init__()
        self.embed = nn.Linear(encoder_dim, dim)
        self.mask_token = nn.Parameter(0.02 * torch.randn(dim))
        self.blocks = blocks(dim, depth)
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.head = nn.Linear(dim, encoder_dim)
        self.register_buffer("positions", positions(grid, dim))

    def forward(
        self, context: torch.Tensor, indices: torch.Tensor, targets: torch.Tensor
    ) -> torch.Tensor:
        """Predictions [B·M, A, D] of targets [B, M, A] from context [B, K, D] at indices [B, K]."""
        K, M = context.shape[1], targets.shape[1]
        x = self.embed(context) + self.positions[indices]
        queries = self.mask_token + self.positions[targets.flatten(0, 1)]  # [B·M, A, P]
        x = torch.cat([x.repeat_interleave(M, 0), queries], 1)
        return self.head(self.norm(self.blocks(x)[:, K:]))


class Step:
    """One update: targets → context → prediction → loss → AdamW → EMA."""

    def __init__(
        self,
        size: int = 224,
        patch: int = 16,
        dim: int = 384,
        depth: int = 12,
        predictor_dim: int = 192,
        predictor_depth: int = 6,
        lr: float = 1e-4,
    ) -> None:
        torch.manual_seed(0)
        self.patch, self.grid = patch, size // patch
        self.context_encoder = Encoder(self.grid, patch, dim, depth)
        self.predictor = Predictor(self.grid, dim, predictor_dim, predictor_depth)
        self.trained = nn.ModuleList([self.context_encoder, self.predictor])
        for module in self.trained.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        self.target_encoder = copy.deepcopy(self.context_encoder).requires_grad_(False)
        weights = list(self.trained.parameters())
        groups = [
            {"params": [w for w in weights if w.ndim > 1], "weight_decay": 0.04},
            {"params": [w for w in weights if w.ndim == 1], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=lr, fused=True)

    def __call__(
        self,
        images: torch.Tensor,
        context: torch.Tensor,
        targets: torch.Tensor,
        momentum: float = 0.996,
    ) -> float:
        """Update once; the loss. images: [B, S, S, 3] uint8."""
        B, M, A = targets.shape
        patches = patchify(images, self.patch)
        with torch.no_grad():
            truth = self.target_encoder(patches)
            truth = F.layer_norm(truth, truth.shape[-1:])
            truth = take(truth, targets.flatten(1)).reshape(B * M, A, -1)
        features = self.context_encoder(patches, context)
        loss = F.smooth_l1_loss(self.predictor(features, context, targets), truth)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        with torch.no_grad():
            theirs = list(self.context_encoder.parameters())
            torch._foreach_lerp_(list(self.target_encoder.parameters()), theirs, 1 - momentum)
        return loss.item()
