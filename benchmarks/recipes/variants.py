"""What is compared: data sets, and variants of a recipe as lists of `--set` overrides.

Every variant sees the same number of images of a data set, but for those with a `share`, which get
about the FLOP of another. What no config key can say is said in Python: the network to start from,
and the masks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import isqrt, sqrt

import numpy as np

import hjepa_mlx as hj
from hjepa_mlx.masks import BlockShape, Masks, MaskSampler
from hjepa_mlx.rng import generator

import mlx.core as mx  # isort: skip  (after hjepa_mlx, which loads OpenBLAS)
import mlx.nn as nn  # isort: skip

BASELINE = "research/ijepa_fashion"
LEAST_CONTEXT = 5  # tokens: Meta's collator wants more than its min_keep of 4


@dataclass(frozen=True)
class Variant:
    """A recipe with overrides, and what makes network and masks, if not the package's own."""

    overrides: tuple[str, ...] = ()
    network: Callable[[hj.Config], hj.HJEPA] | None = None
    sampler: Callable[[hj.Config], MaskSampler] | None = None
    recipe: str = BASELINE
    trained: bool = True
    share: float = 1.0  # of the data set's epochs


class Collator(MaskSampler):
    """Masks as Meta's code draws them.

    A batch has one block shape, rounded from an area and an aspect that one random number sets.
    Blocks never reach the last row and column. The context is the first tokens of what is left, as
    many as in the batch's poorest image.
    """

    def __init__(self, config: hj.Config) -> None:
        super().__init__(config)
        self.area, self.aspect = config.masks.target_area, config.masks.target_aspect
        self.context_tokens = LEAST_CONTEXT

    def __call__(self, step: int, count: int) -> Masks:
        """`count` masks for step `step`."""
        rng = generator(self.seed, "collator", step)
        share = rng.random()
        area, aspect = (low + share * (high - low) for low, high in (self.area, self.aspect))
        patches = int(self.grid**2 * area)
        shape = BlockShape(round(sqrt(patches * aspect)), round(sqrt(patches / aspect)))
        if shape not in self._tables:
            self._tables[shape] = self._table(shape, {0: 1})
        return self.draw(rng, shape, count)

    def _positions(
        self, rng: np.random.Generator, shape: BlockShape, n: int
    ) -> tuple[np.ndarray, np.ndarray]:
        sides = np.array(shape)
        corners = rng.integers(0, self.grid - sides, (n, self.targets, 2))
        free = self._inside(np.zeros((n, 2), int), np.array([self.grid - 1, self.grid - 1]))
        for block in range(self.targets):
            free &= ~self._inside(corners[:, block], sides)
        return corners, free.reshape(n, -1)

    def _context(self, rng: np.random.Generator, free: np.ndarray) -> np.ndarray:
        in_order = np.argsort(~free, axis=1, kind="stable")
        return in_order[:, : free.sum(1).min()].astype(np.int32)


class BlockByBlock(hj.HJEPA):
    """I-JEPA's networks as in Meta's code.

    The predictor takes a pass a block and has as many heads as the encoder. What initialises last
    there gives every linear layer deviation 0.02 and so undoes the smaller scale of later blocks.
    """

    def __init__(self, config: hj.Config) -> None:
        super().__init__(config)
        for block in self.predictor.blocks:
            block.attn.heads = int(config.model.heads)
        for network in (self.context_encoder, self.predictor):
            for name, linear in network.named_modules():
                if isinstance(linear, nn.Linear) and name != "patch_embed.proj":
                    linear.weight = mx.random.normal(linear.weight.shape, scale=0.02)
        self.target_encoder.update(self.context_encoder.parameters())

    def predict(
        self, patches: mx.array, indices: mx.array, centres: mx.array, cells: list[int]
    ) -> tuple[list[mx.array], mx.array]:
        """As HJEPA's, of the one level."""
        (context,) = self.context_encoder(patches, indices)
        M, (n,) = self.config.masks.targets, cells
        grid = isqrt(patches.shape[1])
        (predictions,) = self.predictor(
            mx.repeat(context, M, axis=0),
            mx.repeat(indices, M, axis=0),
            centres.reshape(-1, n // M),
            [n // M],
            grid,
        )
        return [predictions.reshape(len(context), n, -1)], context


class SmallPatches(BlockByBlock):
    """The same, its patch embedding too as Meta's code leaves it."""

    def __init__(self, config: hj.Config) -> None:
        super().__init__(config)
        projection = self.context_encoder.patch_embed.proj
        projection.weight = mx.random.normal(projection.weight.shape, scale=0.02)
        self.target_encoder.update(self.context_encoder.parameters())


IMAGENET_STATS = ("model.image_mean=[0.485,0.456,0.406]", "model.image_std=[0.229,0.224,0.225]")

# The predictor sees the context's tokens only, and no VICReg: plain I-JEPA
PLAIN = ("model.predictor_context=tokens", "loss.vicreg=0")

PICTURES = (*IMAGENET_STATS, "data.name=folder")
PHOTOGRAPHS = (*PICTURES, "data.image_size=64", "model.patch_size=8")

# Overrides for every variant
DATA_SETS: dict[str, tuple[str, ...]] = {
    "demo": ("data.name=demo",),  # comes with the package
    "fashion": (),
    "fashion_short": ("optim.epochs=5", "optim.warmup_epochs=0.5"),
    "photographs": (*PHOTOGRAPHS, "optim.epochs=31", "optim.warmup_epochs=3.1"),
    "photographs_long": (*PHOTOGRAPHS, "optim.epochs=155", "optim.warmup_epochs=15.5"),
    "pictures": (*PICTURES, "optim.epochs=15", "optim.warmup_epochs=1.5"),
    "pictures_long": (*PICTURES, "optim.epochs=75", "optim.warmup_epochs=7.5"),
}
# Of data sets that have another's images
FOLDERS = {
    "fashion_short": "fashion",
    "photographs_long": "photographs",
    "pictures_long": "pictures",
}
ONE_TRAINING = ("pictures",)  # folders whose two splits are trained on the same images


def targets(pools: list[int]) -> tuple[str, ...]:
    """Levels of targets in cells of so many patches, finest first; coarser ones weigh less."""
    weights = [1.0, 0.7, 0.5, 0.35][: len(pools)]
    return (
        f"model.levels={len(pools)}",
        f"model.level_pool={pools}",
        f"loss.level_weights={weights}",
    )


TARGETS_3 = targets([1, 2, 4])

# A smaller network, for choosing among many: width 128, 3 blocks, 0.2 GFLOP an image
NANO = (
    "model.dim=128",
    "model.depth=3",
    "model.heads=2",
    "model.predictor_dim=64",
    "model.predictor_depth=2",
    *TARGETS_3,
    "masks.context_tokens=14",
)
# At the baseline's network and no more FLOP: three levels, a weak VICReg, small batches at half the
# rate, half of the cells predicted from the mean of the context
CHOSEN = (
    "data.batch_size=16",
    "optim.lr=5e-4",
    "model.predictor_dim=96",
    "model.predictor_depth=2",
    "model.predictor_context=both",
    "masks.context_tokens=14",
    "loss.vicreg=0.2",
)
SMALL = (*CHOSEN, *NANO)  # what was chosen, of the smaller network
TARGETS_4 = targets([1, 1, 2, 4])  # 8x8 patches would not fit a block
GRID_14 = ("data.image_size=28", "model.patch_size=2", "masks.context_tokens=22")
MASKS_2 = ("masks.per_image=2", "masks.context_tokens=20")
GRID_14_56 = (*GRID_14, "data.image_size=56", "model.patch_size=4")  # for the photographs
# Only the last block predicted, three read: the training of one level
READ_3 = ("model.levels=3", "model.level_pool=[1,1,1]", "loss.level_weights=[0,0,1]")
# The image level over the last block, beside what READ_3 predicts
IMAGE = (
    "model.levels=4",
    "model.size=custom",
    "model.level_blocks=[1,2,3,3]",
    "model.level_pool=[1,1,1,image]",
    "loss.level_weights=[0,0,1,2]",
    "views.count=0",
)
# It is predicted from a crop as well; a batch of 32 is too small for more than 128 directions
VIEW = ("views.count=1", "views.size=16", "loss.projection=128")
ALONE = (*VIEW, "loss.level_weights=[0,0,0,2]")
# Muon for the matrices of the blocks; larger batches, since an update costs matrix products too
MUON = ("optim.kind=muon", "data.batch_size=32", "optim.lr=1e-3")
# Of the epochs of small_read_3, for as many FLOP
MUON_SHARE, MUON_VIEW_SHARE, MUON_ALONE_SHARE = 11 / 15, 8.5 / 15, 13 / 15

VARIANTS = {
    "baseline": Variant(PLAIN),
    "ijepa": Variant(PLAIN, network=BlockByBlock, sampler=Collator),
    "ijepa_0.02": Variant(PLAIN, network=SmallPatches, sampler=Collator),
    "baseline_imagenet_stats": Variant((*PLAIN, *IMAGENET_STATS)),
    "untrained": Variant(PLAIN, trained=False),
    "untrained_ijepa": Variant(PLAIN, network=BlockByBlock, trained=False),
    "untrained_ijepa_0.02": Variant(PLAIN, network=SmallPatches, trained=False),
    "untrained_small": Variant((*SMALL, *READ_3), trained=False),
    "nano": Variant((*PLAIN, *NANO)),
    "small": Variant(SMALL),
    "small_read_3": Variant((*SMALL, *READ_3)),
    "small_muon": Variant((*SMALL, *READ_3, *MUON)),  # as many pictures as small_read_3
    "small_muon_flop": Variant((*SMALL, *READ_3, *MUON), share=MUON_SHARE),
    "small_image": Variant((*SMALL, *IMAGE, *MUON), share=MUON_SHARE),
    "small_image_view": Variant((*SMALL, *IMAGE, *MUON, *VIEW), share=MUON_VIEW_SHARE),
    "small_image_view_32": Variant(
        (*SMALL, *IMAGE, *MUON, *VIEW, "views.size=32"), share=MUON_VIEW_SHARE
    ),
    "small_image_alone": Variant((*SMALL, *IMAGE, *MUON, *ALONE), share=MUON_ALONE_SHARE),
    "small_image_alone_32": Variant(
        (*SMALL, *IMAGE, *MUON, *ALONE, "views.size=32"), share=MUON_ALONE_SHARE
    ),
    "small_2_levels": Variant((*SMALL, *targets([1, 2]))),
    "small_depth_4": Variant((*SMALL, "model.depth=4")),
    "small_depth_4_levels_4": Variant((*SMALL, "model.depth=4", *TARGETS_4)),
    "small_grid_14_context_22": Variant((*SMALL, *GRID_14)),
    "small_grid_14_1_level": Variant((*SMALL, *GRID_14, *targets([1]))),
    "small_grid_14_read_3": Variant((*SMALL, *GRID_14, *READ_3)),
    "small_grid_14_2_masks": Variant((*SMALL, *GRID_14, *READ_3, "masks.per_image=2")),
    "small_grid_14_muon": Variant((*SMALL, *GRID_14, *READ_3, *MUON)),
    "small_grid_14_muon_2_masks": Variant((*SMALL, *GRID_14, *READ_3, *MUON, *MASKS_2)),
    "small_grid_14_image": Variant(
        (*SMALL, *GRID_14, *IMAGE, *MUON, *MASKS_2, "masks.context_tokens=19")
    ),
    "small_grid_14_image_alone": Variant(
        (*SMALL, *GRID_14, *IMAGE, *MUON, *ALONE, "views.size=14", "views.count=2")
    ),
    "small_grid_14_56": Variant((*SMALL, *GRID_14_56)),
    "small_grid_14_56_read_3": Variant((*SMALL, *GRID_14_56, *READ_3)),
    "small_grid_14_context_43": Variant((*SMALL, *GRID_14, "masks.context_tokens=43")),
    "small_context_10": Variant((*SMALL, "masks.context_tokens=10")),
    "small_areas_10_15": Variant((*SMALL, "masks.target_area=[0.1,0.15]")),
    "small_areas_20_25": Variant(
        (*SMALL, "masks.target_area=[0.2,0.25]", "masks.context_tokens=10")
    ),
    "small_predictor_depth_4": Variant((*SMALL, "model.predictor_depth=4")),
    "small_predictor_dim_128": Variant((*SMALL, "model.predictor_dim=128")),
    "small_2_masks": Variant((*SMALL, "masks.per_image=2")),
    "small_sigreg_no_ema": Variant(
        (*SMALL, "optim.momentum=[0,0]", "loss.vicreg=0", "loss.sigreg=0.1")
    ),
    "chosen": Variant((*CHOSEN, *TARGETS_3)),
    "chosen_batch_32": Variant((*CHOSEN, *TARGETS_3, "data.batch_size=32", "optim.lr=1e-3")),
    "chosen_batch_64_imagenet_stats": Variant(
        (*CHOSEN, *IMAGENET_STATS, *TARGETS_3, "data.batch_size=64", "optim.lr=1e-3")
    ),
    "chosen_1_level": Variant((*CHOSEN, *targets([1]))),
    "chosen_read_3": Variant((*CHOSEN, *READ_3)),
    "demo": Variant(recipe="demo"),
    "demo_3_targets": Variant(TARGETS_3, recipe="demo"),
    "demo_half_lr": Variant(("optim.lr=2.5e-4",), recipe="demo"),
    "demo_double_lr": Variant(("optim.lr=1e-3",), recipe="demo"),
    "demo_collapsing": Variant(
        ("optim.momentum=[0,0]", "loss.vicreg=0", "optim.lr=4e-3"), recipe="demo"
    ),
}
