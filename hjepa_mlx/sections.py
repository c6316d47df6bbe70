"""The sections of a recipe: every key, its type and its default.

The defaults are those of the ImageNet recipes; a recipe states only its own choices (recipes.py).
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field


def _ordered(pair: list[float]) -> list[float]:
    if pair[0] > pair[1]:
        raise ValueError("it should be [low, high]")
    return pair


def _absolute(place: str) -> str:
    """A path that holds in other folders too; the name of a repository as it is."""
    return place if place.startswith("hf:") else str(Path(os.path.expanduser(place)).absolute())


Auto = Literal["auto"]
Fraction = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]
Few = Annotated[int, Field(ge=1, le=1000)]  # a run's config may come from others
Side = Annotated[int, Field(ge=1, le=4096)]  # pixels or patches
Width = Annotated[int, Field(ge=1, le=65_536)]

_two = Field(min_length=2, max_length=2)
Pair = Annotated[list[Annotated[float, Field(ge=0)]], _two]
UnitPair = Annotated[list[Fraction], _two]
Areas = Annotated[list[Annotated[float, Field(gt=0, le=1)]], _two, AfterValidator(_ordered)]
Aspects = Annotated[list[Positive], _two, AfterValidator(_ordered)]
Stage = Annotated[tuple[Count, Annotated[float, Field(gt=0, lt=1)]], Field(strict=False)]
_three, _levels = Field(min_length=3, max_length=3), Field(min_length=1, max_length=8)
Mean = Annotated[list[Fraction], _three]
Deviation = Annotated[list[Positive], _three]
Betas = Annotated[list[Annotated[float, Field(ge=0, lt=1)]], _two]


class Section(BaseModel):
    """A part of the config: no unknown keys, no silent conversions, also on assignment."""

    model_config = ConfigDict(extra="forbid", strict=True, validate_assignment=True)


class Data(Section):
    """The images to train on, squares of `image_size` pixels.

    progressive: [image size, share of the epochs] of the first stages, at a lower resolution.
    crop_scale: area of the random resized crop, as fractions of the image. limit: use so many
    images. Of a folder: labels: auto, folders, none or a .csv file of path,label. bits: that 16-bit
    greys use. listing: 1 chooses and splits images as versions without `labels` did.
    """

    name: str = "folder"
    dir: str | None = None
    image_size: Side = 224
    progressive: list[Stage] = []
    batch_size: Annotated[int, Field(ge=2)] = 128
    limit: Count | None = None
    labels: Annotated[str, Field(pattern=r"^(auto|folders|none)$|\.csv$")] = "auto"
    bits: Auto | Annotated[int, Field(ge=8, le=16)] = "auto"
    listing: Literal[1, 2] = 2
    crop_scale: Areas = [0.3, 1.0]
    flip: bool = True
    workers: Auto | Few = "auto"

    def whole(self, name: str) -> Data:
        """The data set `name` alone, in the same folder and without a limit."""
        return self.model_copy(update={"name": name, "limit": None})


class Model(Section):
    """Encoder, levels and predictor; give `size`, or `dim`, `depth` and `heads`.

    levels: as many as `level_pool` has, or 4. level_pool: patches along a cell's side; "image" for
    the top level, one cell that is the whole picture, predicted from the masked contexts.
    By default the last level is the image, the others are of single patches. level_blocks: the
    transformer block, from 1, after which each level lies.
    predictor_context: the predictor sees the context's tokens, only their mean, or both: the tokens
    for the first half of each level's cells, the mean for the rest.
    image_mean, image_std: of red, green and blue, to normalise images; ImageNet's by default.
    init: weights to start from: a run, a file, a folder or hf:USER/NAME. positions: `sincos`, the
    fixed table; a number, that of so many patches a side, stretched over the image; or `learned`.
    With `init`, `sincos` becomes what the weights were trained with.
    """

    size: Literal["nano", "tiny", "small", "base", "custom"] = "small"
    dim: Auto | Width = "auto"
    depth: Auto | Few = "auto"
    heads: Auto | Few = "auto"
    patch_size: Side = 16
    positions: Literal["sincos", "learned"] | Side = "sincos"
    init: Annotated[str, AfterValidator(_absolute)] | None = None
    image_mean: Mean = [0.485, 0.456, 0.406]
    image_std: Deviation = [0.229, 0.224, 0.225]
    levels: Auto | Annotated[int, Field(ge=1, le=8)] = "auto"
    level_blocks: Auto | list[Count] = "auto"
    level_pool: Auto | Annotated[list[Count | Literal["image"]], _levels] = "auto"
    predictor_dim: Width = 192
    predictor_depth: Few = 6
    predictor_context: Literal["tokens", "mean", "both"] = "both"
    checkpoint_blocks: bool = False

    @property
    def predictor_heads(self) -> int:
        """Attention heads of the predictor: as many as have at least 64 dimensions, or one."""
        return max(1, self.predictor_dim // 64)


class Masks(Section):
    """How target and context blocks are drawn.

    Areas are fractions of the grid, aspects height / width, `targets` is blocks per mask.
    per_image: masks drawn for one pass of the target encoder (data2vec 2.0, arXiv 2212.07525).
    """

    targets: Few = 4
    target_area: Areas = [0.15, 0.2]
    target_aspect: Aspects = [0.75, 1.5]
    context_area: Areas = [0.85, 1.0]
    context_tokens: Auto | Count = "auto"
    per_image: Few = 1


class Views(Section):
    """The small crops from which the image level is predicted, beside the masked contexts.

    count: crops an image. size: pixels along their side; 48 of 224 by default. area: fractions of
    the training crop that they are cut from. colour: strength of changes in brightness, contrast,
    saturation and hue, 0 for none. grey, blur: the share of views without colour, and of blurred
    ones. Mirrored where `data.flip` says.
    """

    count: Annotated[int, Field(ge=0, le=1000)] = 1
    size: Auto | Side = "auto"
    area: Areas = [0.1, 0.6]
    colour: Fraction = 0.0
    grey: Fraction = 0.0
    blur: Fraction = 0.0


class Loss(Section):
    """Prediction loss and the optional regularisers' weights (0: off).

    level_weights: a level of weight 0 is not predicted, only evaluated after training. vicreg and
    sigreg act on the mean of a masked context's features, and on a projection of a view's to
    `projection` dimensions (0: on that mean itself).
    """

    kind: str = "smooth_l1"  # a name in losses.py
    level_weights: Auto | list[Annotated[float, Field(ge=0)]] = "auto"
    vicreg: Annotated[float, Field(ge=0)] = 0.2
    sigreg: Annotated[float, Field(ge=0)] = 0.0
    projection: Annotated[int, Field(ge=0, le=65_536)] = 512


class Optim(Section):
    """The optimizer and the schedules of its values over the steps (optimizer.py, schedules.py).

    kind: muon for the matrices of transformer blocks and AdamW for the rest, or adamw for all.
    lr: linear warm-up over `warmup_epochs` (may be fractional), then a cosine to `final_lr`;
    weight_decay and the target's momentum: [start, end]. betas: of AdamW. grad_clip: of the global
    norm, 0: off. accumulate: batches per update.
    """

    kind: Literal["muon", "adamw"] = "muon"
    epochs: Count = 100
    warmup_epochs: Annotated[float, Field(ge=0)] = 10.0
    lr: Positive = 1.0e-3
    final_lr: Annotated[float, Field(ge=0)] = 1.0e-6
    betas: Betas = [0.9, 0.95]
    weight_decay: Pair = [0.04, 0.4]
    momentum: UnitPair = [0.996, 1.0]
    grad_clip: Annotated[float, Field(ge=0)] = 3.0
    accumulate: Count = 1


class Earlier(Section):
    """A stage of a run that ended, at `step`, where a longer one began; `lr`: of its last step.

    accumulate: none in runs of earlier versions.
    """

    step: int
    epoch: float
    lr: float
    epochs: int
    batch_size: int
    accumulate: int | None = None
    image_size: int


class Finetune(Section):
    """Training an encoder and a linear head on labels (finetune.py), after pretraining.

    epochs: 0 keeps the encoder as it is. lr: of the head; it rises in the first tenth of the steps
    and falls to 0 as a cosine. layer_decay: a block's share of the next one's learning rate.
    crop_scale, flip: as in `data`. mixup: of its beta distribution (arXiv 1710.09412), 0: off.
    """

    epochs: Annotated[int, Field(ge=0)] = 10
    lr: Positive = 3.0e-4
    layer_decay: Annotated[float, Field(gt=0, le=1)] = 0.75
    weight_decay: Annotated[float, Field(ge=0)] = 0.05
    crop_scale: Areas = [0.3, 1.0]
    flip: bool = True
    label_smoothing: Fraction = 0.1
    mixup: Annotated[float, Field(ge=0)] = 0.0


class Run(Section):
    """Where a run is kept and how often it reports, evaluates and saves.

    log_every: steps. eval_every_epochs: 0 is never. keep_last: checkpoints beside the final one.
    rank_timeout_minutes: a run on several ranks ends when one makes no step for so long.
    trackers: get every logged row too (trackers.py).
    history: earlier stages of a run that was made longer; `hjepa-mlx train RUN --epochs N` adds it.
    """

    dir: str | None = None
    log_every: Count = 10
    checkpoint_minutes: Positive = 15
    keep_last: Count = 3
    eval_every_epochs: Annotated[int, Field(ge=0)] = 1
    final_eval: bool = True
    rank_timeout_minutes: Positive = 10
    trackers: list[Literal["tensorboard", "wandb"]] = []
    history: list[Earlier] = []
