"""H-JEPA: context encoder, EMA target encoder and predictor, with targets at several levels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import isqrt

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from hjepa_mlx.config import Config
from hjepa_mlx.errors import HJEPAError, check_choice
from hjepa_mlx.masks import pooling
from hjepa_mlx.models.predictor import Predictor
from hjepa_mlx.models.vit import MLP, VisionTransformer, patchify, take_tokens
from hjepa_mlx.views import render

ENCODERS = "target", "context"
WIDE = 1536  # of the hidden layer between a mean of features and what is predicted from it


@dataclass(frozen=True)
class Origin:
    """Where trained weights come from."""

    run: str
    step: int
    epoch: float


class HJEPA(nn.Module):
    """The networks of a run, built from its config; both encoders start equal.

    predictor: of the masked levels. image_predictor and projector: of the image level.

    The weights come from `config.seed`, so the same config gives the same; MLX's global random
    numbers start anew from it.
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        model = config.model
        self.config = config
        self.origin: Origin | None = None  # untrained
        self.level_blocks = tuple(int(block) for block in model.level_blocks)
        mx.random.seed(config.seed)
        self.context_encoder = VisionTransformer(config)
        self.target_encoder = VisionTransformer(config)
        self.target_encoder.update(self.context_encoder.parameters())
        self.target_encoder.freeze()
        if config.masked:
            self.predictor = Predictor(config)
        dim = int(model.dim)
        if config.image_predicted:
            self.image_predictor = MLP(dim, WIDE, dim)
        spread = config.loss.vicreg or config.loss.sigreg
        if config.view_grid and config.loss.projection and spread:
            self.projector = MLP(dim, WIDE, config.loss.projection)
            self.projector.fc2.pop("bias")  # VICReg takes the mean off, so it would only wander

    def patches(self, images: mx.array | np.ndarray) -> mx.array:
        """Images [B, H, W, 3] uint8 as the encoders see them: patches [B, H/p · W/p, p·p·3]."""
        model = self.config.model
        return patchify(mx.array(images), model.patch_size, model.image_mean, model.image_std)

    def targets(
        self, patches: mx.array, indices: mx.array, pool: tuple[mx.array, ...]
    ) -> list[mx.array]:
        """The targets to predict: features of the target encoder, pooled inside target blocks.

        patches: [B, N, p·p·3]; indices: [B·V, M, h·w]; pool: [n_l, h·w] of each masked level. One
        pass serves V masks per image. Returns [B·V, M·n_l, D] float32 of each, every cell
        normalised (LayerNorm without affine); last, if the image level is predicted, the mean over
        the picture, likewise [B, 1, D].
        """
        rows, M, A = indices.shape
        targets = []
        blocks = [self.level_blocks[level] for level in self.config.predicted]
        features = self.target_encoder(patches, after=blocks)
        for x, matrix in zip(features, pool):  # noqa: B905 (the image level has no matrix)
            x = take_tokens(x, indices.reshape(rows, M * A))
            x = x.reshape(rows, M, A, -1).astype(mx.float32)  # [B·V, M, h·w, D]
            x = (matrix @ x).reshape(rows, M * matrix.shape[0], -1)  # [B·V, M·n_l, D]
            targets.append(x)
        if self.config.image_predicted:
            targets.append(features[-1].astype(mx.float32).mean(1, keepdims=True))
        return [mx.fast.layer_norm(x, None, None, 1e-5) for x in targets]

    def predict(
        self, patches: mx.array, indices: mx.array, centres: mx.array, cells: list[int]
    ) -> tuple[list[mx.array], mx.array]:
        """Predictions per level, [B·V, cells[l], D], and the context's features [B·V, K, D].

        patches: [B, N, p·p·3]; indices: [B·V, K]; centres: [B·V, Σ cells].
        """
        (context,) = self.context_encoder(patches, indices)
        grid = isqrt(patches.shape[1])
        return self.predictor(context, indices, centres, cells, grid), context

    def views(self, images: mx.array, views: Sequence[mx.array]) -> mx.array:
        """Views of images [B, S, S, 3] as the context encoder sees them: [V, n, p·p·3]."""
        return self.patches(render(images, views, self.config.view_size(images.shape[1])))

    def encode(
        self, images: mx.array | np.ndarray, encoder: str = "target", grid: bool = False
    ) -> list[mx.array]:
        """Features of each level, finest first, of the target (or "context") encoder.

        images: [B, H, W, 3] uint8, H and W any multiples of the patch size; positions are stretched
        to the trained image's. Returns L arrays [B, n_l, D]: the output of block d_l averaged over
        cells of `level_pool[l]` patches, in raster order; with `grid`, [B, rows, columns, D].
        """
        images = mx.array(images)
        p = self.config.model.patch_size
        H, W, C = images.shape[1:] if images.ndim == 4 else (0, 0, 0)
        if C != 3 or H * W == 0 or H % p or W % p or images.dtype != mx.uint8:
            raise HJEPAError(
                f"encode() takes uint8 images of shape [B, height, width, 3], sides multiples of "
                f"the patch size {p}; these are {images.dtype} {list(images.shape)}."
            )
        check_choice("encoder", encoder, ENCODERS)
        vit = self.target_encoder if encoder == "target" else self.context_encoder
        rows, columns, levels = H // p, W // p, []
        features = vit(self.patches(images), after=self.level_blocks, grid=(rows, columns))
        for x, size in zip(features, self.config.pools(rows, columns), strict=True):
            x = _pooling(rows, columns, size) @ x
            levels.append(x.reshape(len(x), -(-rows // size), -1, x.shape[2]) if grid else x)
        return levels


@lru_cache(maxsize=16)
def _pooling(rows: int, columns: int, size: int) -> mx.array:
    return mx.array(pooling(rows, columns, size)[0])
