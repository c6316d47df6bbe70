"""What is compared: data sets, and variants of a recipe as lists of `--set` overrides.

Every variant sees the same number of images of a data set. What no config key can say is said in
Python: the network to start from.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import hjepa_mlx as hj
from hjepa_mlx.models.vit import trunc_normal

BASELINE = "research/ijepa_fashion"


@dataclass(frozen=True)
class DataSet:
    """Overrides for every variant; what is pretrained on is `train` of its folder `test`."""

    overrides: tuple[str, ...] = ()


@dataclass(frozen=True)
class Variant:
    """A recipe with overrides; `network` makes the network to start from, if not the usual one."""

    overrides: tuple[str, ...] = ()
    network: Callable[[hj.Config], hj.HJEPA] | None = None
    recipe: str = BASELINE
    trained: bool = True


def small_patches(config: hj.Config) -> hj.HJEPA:
    """The patch embedding as Meta's code leaves it: normal with deviation 0.02."""
    model = hj.HJEPA(config)
    projection = model.context_encoder.patch_embed.proj
    projection.weight = trunc_normal(projection.weight.shape)
    model.target_encoder.update(model.context_encoder.parameters())
    return model


IMAGENET_STATS = ("model.image_mean=[0.485,0.456,0.406]", "model.image_std=[0.229,0.224,0.225]")

DATA_SETS = {
    "demo": DataSet(),  # comes with the package
    "fashion": DataSet(),
    "photographs": DataSet(
        (
            *IMAGENET_STATS,
            "data.name=folder",
            "data.image_size=64",
            "model.patch_size=8",
            "optim.epochs=31",
            "optim.warmup_epochs=3.1",
        )
    ),
}

# A smaller network, for choosing among many: width 128, 3 blocks, 0.2 GFLOP an image
NANO = (
    "model.dim=128",
    "model.depth=3",
    "model.heads=2",
    "model.predictor_dim=64",
    "model.predictor_depth=2",
    "model.levels=3",
    "masks.context_tokens=14",
)
# At the baseline's network and no more FLOP: three levels, a weak VICReg, smaller batches, half of
# the cells predicted from the mean of the context
CHOSEN = (
    "data.batch_size=32",
    "model.predictor_dim=96",
    "model.predictor_depth=2",
    "model.predictor_context=both",
    "masks.context_tokens=14",
    "loss.vicreg=0.2",
)

VARIANTS = {
    "baseline": Variant(),
    "baseline_imagenet_stats": Variant(IMAGENET_STATS),
    "baseline_0.02": Variant(network=small_patches),
    "untrained": Variant(trained=False),
    "untrained_0.02": Variant(network=small_patches, trained=False),
    "nano": Variant(NANO),
    "chosen": Variant((*CHOSEN, "model.levels=3")),
    "chosen_imagenet_stats": Variant(
        (*CHOSEN, *IMAGENET_STATS, "model.levels=3", "data.batch_size=64")
    ),
    "chosen_1_level": Variant((*CHOSEN, "model.levels=1")),
    "demo": Variant(recipe="demo"),
    "demo_half_lr": Variant(("optim.lr=1e-3",), recipe="demo"),
    "demo_double_lr": Variant(("optim.lr=4e-3",), recipe="demo"),
    "demo_collapsing": Variant(
        ("optim.momentum=[0,0]", "loss.vicreg=0", "optim.lr=4e-3"), recipe="demo"
    ),
}
