"""The schema of a recipe: every key, its default, and the checks of one key against another.

The defaults are those of the ImageNet recipes; a recipe states only its own choices (recipes.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator
from rich.syntax import Syntax

from hjepa_mlx.tables import Shown

SIZES = {  # dim, depth, heads: always 64 wide a head, which MLX's fused attention needs on Metal
    "nano": (128, 3, 2),
    "tiny": (192, 12, 3),
    "small": (384, 12, 6),
    "base": (768, 12, 12),
}
LEVEL_WEIGHTS = (1.0, 0.7, 0.5, 0.35)  # finest level first; one more item allows one more level


def _ordered(pair: list[float]) -> list[float]:
    if pair[0] > pair[1]:
        raise ValueError("it should be [low, high]")
    return pair


Auto = Literal["auto"]
Fraction = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]

_two = Field(min_length=2, max_length=2)
Pair = Annotated[list[Annotated[float, Field(ge=0)]], _two]
UnitPair = Annotated[list[Fraction], _two]
Areas = Annotated[list[Annotated[float, Field(gt=0, le=1)]], _two, AfterValidator(_ordered)]
Aspects = Annotated[list[Positive], _two, AfterValidator(_ordered)]
Stage = Annotated[tuple[Count, Annotated[float, Field(gt=0, lt=1)]], Field(strict=False)]
_three = Field(min_length=3, max_length=3)
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
    images.
    """

    name: str = "folder"
    dir: str | None = None
    image_size: Count = 224
    progressive: list[Stage] = []
    batch_size: Annotated[int, Field(ge=2)] = 128
    limit: Count | None = None
    crop_scale: Areas = [0.3, 1.0]
    flip: bool = True
    workers: Auto | Count = "auto"

    def whole(self, name: str) -> Data:
        """The data set `name` alone, in the same folder and without a limit."""
        return self.model_copy(update={"name": name, "limit": None})


class Model(Section):
    """Encoder, levels and predictor; give `size`, or `dim`, `depth` and `heads`.

    level_blocks: the transformer block, from 1, after which each level lies. level_pool: patches
    along a cell's side. predictor_context: the predictor sees the context's tokens, only their
    mean, or both: the tokens for the first half of each level's cells, the mean for the rest.
    image_mean, image_std: of red, green and blue, to normalise images; ImageNet's by default.
    """

    size: Literal["nano", "tiny", "small", "base", "custom"] = "small"
    dim: Auto | Count = "auto"
    depth: Auto | Count = "auto"
    heads: Auto | Count = "auto"
    patch_size: Count = 16
    image_mean: Mean = [0.485, 0.456, 0.406]
    image_std: Deviation = [0.229, 0.224, 0.225]
    levels: Annotated[int, Field(ge=1, le=len(LEVEL_WEIGHTS))] = 3
    level_blocks: Auto | list[Count] = "auto"
    level_pool: Auto | list[Count] = "auto"
    predictor_dim: Count = 192
    predictor_depth: Count = 6
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

    targets: Count = 4
    target_area: Areas = [0.15, 0.2]
    target_aspect: Aspects = [0.75, 1.5]
    context_area: Areas = [0.85, 1.0]
    context_tokens: Auto | Count = "auto"
    per_image: Count = 1


class Loss(Section):
    """Prediction loss and the optional regularisers' weights (0: off).

    level_weights: a level of weight 0 is not predicted, only evaluated after training.
    """

    kind: str = "smooth_l1"  # a name in losses.py
    level_weights: Auto | list[Annotated[float, Field(ge=0)]] = "auto"
    vicreg: Annotated[float, Field(ge=0)] = 0.2
    sigreg: Annotated[float, Field(ge=0)] = 0.0


class Optim(Section):
    """AdamW and the schedules of its values over the steps (schedules.py, step.py).

    lr: linear warm-up over `warmup_epochs` (may be fractional), then a cosine to `final_lr`;
    weight_decay and the target's momentum: [start, end]. grad_clip: of the global norm, 0: off.
    accumulate: batches per update.
    """

    epochs: Count = 100
    warmup_epochs: Annotated[float, Field(ge=0)] = 10.0
    lr: Positive = 1.0e-3
    final_lr: Annotated[float, Field(ge=0)] = 1.0e-6
    betas: Betas = [0.9, 0.95]
    weight_decay: Pair = [0.04, 0.4]
    momentum: UnitPair = [0.996, 1.0]
    grad_clip: Annotated[float, Field(ge=0)] = 3.0
    accumulate: Count = 1


class Run(Section):
    """Where a run is kept and how often it reports, evaluates and saves.

    log_every: steps. eval_every_epochs: 0 is never. keep_last: checkpoints beside the final one.
    """

    dir: str | None = None
    log_every: Count = 10
    checkpoint_minutes: Positive = 15
    keep_last: Count = 3
    eval_every_epochs: Annotated[int, Field(ge=0)] = 1
    final_eval: bool = True


class Config(Shown, Section):
    """A whole recipe. Building one checks it and replaces each `auto` that results depend on.

    `precision`, `compile` and `data.workers` depend on the machine and may stay "auto".
    """

    name: Annotated[str, Field(pattern=r"^[\w.-]+$")] = "custom"
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    precision: Literal["auto", "float32", "float16", "bfloat16"] = "auto"
    compile: Auto | bool = "auto"
    data: Data = Field(default_factory=Data)
    model: Model = Field(default_factory=Model)
    masks: Masks = Field(default_factory=Masks)
    loss: Loss = Field(default_factory=Loss)
    optim: Optim = Field(default_factory=Optim)
    run: Run = Field(default_factory=Run)

    @property
    def grid(self) -> int:
        """Patches along each side of the image."""
        return self.data.image_size // self.model.patch_size

    @property
    def level_sides(self) -> list[int]:
        """Cells along each side of the image, by level; those at its end may be smaller."""
        return [-(-self.grid // int(pool)) for pool in self.model.level_pool]

    @property
    def predicted(self) -> list[int]:
        """The levels that are predicted: those whose loss has a weight."""
        return [level for level, weight in enumerate(self.loss.level_weights) if weight]

    @property
    def stages(self) -> list[tuple[int, float]]:
        """(image size, share of the epochs) in order, `data.image_size` last."""
        first = list(self.data.progressive)
        return [*first, (self.data.image_size, 1 - sum(share for _, share in first))]

    def at_size(self, image_size: int) -> Config:
        """The resolved config for another image size: the context keeps its share of the grid."""
        other = self.model_copy(deep=True)
        other.data.image_size, other.data.progressive = image_size, []
        share = int(self.masks.context_tokens) / self.grid**2
        other.masks.context_tokens = max(1, round(share * other.grid**2))
        return other

    def __rich__(self) -> Syntax:
        return Syntax(self.to_yaml(), "yaml", theme="ansi_light", background_color="default")

    def to_yaml(self) -> str:
        """The config as YAML, in the schema's order."""
        return yaml.safe_dump(self.model_dump(), sort_keys=False, default_flow_style=None)

    @model_validator(mode="after")
    def _resolve(self) -> Config:
        if self.run.dir:
            self.run.dir = str(Path(self.run.dir).expanduser())
        if self.data.dir:  # a run is evaluated and resumed from other folders too
            self.data.dir = str(Path(self.data.dir).expanduser().absolute())
        self._resolve_model()
        for broken, message in self._rules():
            if broken:
                raise ValueError(message)
        masks = self.masks
        if masks.context_tokens == "auto":
            # Target blocks land independently: on average this share of the context block is left.
            # 0.7 of it leaves few images to be drawn again (I-JEPA's truncation keeps 0.68: 56/82).
            left = (1 - sum(masks.target_area) / 2) ** masks.targets * sum(masks.context_area) / 2
            masks.context_tokens = max(1, int(0.7 * left * self.grid**2))
        return self

    def _resolve_model(self) -> None:
        model, levels = self.model, self.model.levels
        if model.size != "custom":
            size = dict(zip(("dim", "depth", "heads"), SIZES[model.size], strict=True))
            given = {key: getattr(model, key) for key in size if getattr(model, key) != "auto"}
            if given != {key: size[key] for key in given}:
                if len(given) == len(size) and model.level_blocks != "auto":  # resolved before
                    raise ValueError(
                        f"model.size={model.size} contradicts model.dim={model.dim}, depth and "
                        "heads. Set these to auto, or model.size to custom."
                    )
                model.size = "custom"
            for key in size.keys() - given.keys():
                setattr(model, key, size[key])
        if "auto" in (model.dim, model.depth, model.heads):
            raise ValueError("model.size=custom needs model.dim, model.depth and model.heads.")
        if (depth := int(model.depth)) < levels:
            raise ValueError(f"model.levels={levels} needs as many blocks; model.depth is {depth}.")
        if model.level_blocks == "auto":
            model.level_blocks = [round(depth * n / levels) for n in range(1, levels + 1)]
        if model.level_pool == "auto":
            model.level_pool = [2**level for level in range(levels)]
        if self.loss.level_weights == "auto":
            self.loss.level_weights = list(LEVEL_WEIGHTS[:levels])

    def _rules(self) -> Iterator[tuple[bool, str]]:
        """Whether each rule between keys is broken, and the message if so; `auto` is resolved."""
        data, model, masks, optim = self.data, self.model, self.masks, self.optim
        size, patch, narrow = data.image_size, model.patch_size, model.predictor_dim
        stages = f"data.progressive={data.progressive}"
        for side, _ in self.stages:
            key = f"data.image_size={size}" if side == size else f"{stages}: {side}"
            yield side % patch > 0, f"{key} is not a multiple of model.patch_size={patch}."
        larger = any(side >= size for side, _ in data.progressive)
        yield larger, f"{stages}: the first stages must be smaller than data.image_size={size}."
        full = sum(share for _, share in data.progressive) >= 1
        yield full, f"{stages}: the shares must add up to less than 1; the rest is at {size}."
        for key, dim in (("dim", int(model.dim)), ("predictor_dim", narrow)):
            yield dim % 4 > 0, f"model.{key}={dim} must be a multiple of 4 (2-D positions)."
        heads = model.predictor_heads
        split = f"model.predictor_dim={narrow} does not divide into {heads} heads"
        yield narrow % heads > 0, f"{split}; use {64 * heads} or {64 * (heads + 1)}."
        uneven = int(model.dim) % int(model.heads) > 0
        yield uneven, f"model.dim={model.dim} is not a multiple of model.heads={model.heads}."
        alone = model.predictor_context == "both" and masks.targets < 2
        yield alone, "model.predictor_context=both needs masks.targets of at least 2 to share."
        epochs = f"optim.warmup_epochs={optim.warmup_epochs:g} must be less than optim.epochs"
        yield optim.warmup_epochs >= optim.epochs, f"{epochs}={optim.epochs}."
        blocks, pools, weights = model.level_blocks, model.level_pool, self.loss.level_weights
        keys = ("model.level_blocks", "model.level_pool", "loss.level_weights")
        for key, values in zip(keys, (blocks, pools, weights), strict=True):
            few = len(values) != model.levels
            yield few, f"{key}={values} needs one item per level; model.levels={model.levels}."
            falls = values is not weights and values != sorted(values)
            yield falls, f"{key}={values} must not decrease: level 0 is the finest."
        levels = list(zip(blocks, pools, strict=True))
        both = f"model.level_blocks={blocks} and model.level_pool={pools}"
        yield len(set(levels)) < len(levels), f"{both} make two levels the same; change one."
        yield not self.predicted, "loss.level_weights are all 0: at least one must be predicted."
        deep = int(blocks[-1]) > int(model.depth)
        yield deep, f"model.level_blocks={blocks} exceeds model.depth={model.depth}."
