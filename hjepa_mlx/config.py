"""A whole recipe: its sections (sections.py), and the checks of one key against another."""

from __future__ import annotations

import os
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, model_validator
from rich.syntax import Syntax

from hjepa_mlx.sections import (
    Auto,
    Data,
    Finetune,
    Loss,
    Masks,
    Model,
    Optim,
    Run,
    Section,
    Views,
)
from hjepa_mlx.tables import Shown

LARGEST_GRID = 256  # patches a side: a token sees all others
LEVELS = 4  # three of patches, and the image
IMAGE_WEIGHT = 2.0  # of the image level in the loss, by default
SIZES = {  # dim, depth, heads: always 64 wide a head, which MLX's fused attention needs on Metal
    "nano": (128, 3, 2),
    "tiny": (192, 12, 3),
    "small": (384, 12, 6),
    "base": (768, 12, 12),
}


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
    views: Views = Field(default_factory=Views)
    loss: Loss = Field(default_factory=Loss)
    optim: Optim = Field(default_factory=Optim)
    finetune: Finetune = Field(default_factory=Finetune)
    run: Run = Field(default_factory=Run)

    @property
    def grid(self) -> int:
        """Patches along each side of the image."""
        return self.data.image_size // self.model.patch_size

    @property
    def position_grid(self) -> int:
        """Patches along each side of the image that the fixed position table was made for."""
        positions = self.model.positions
        return positions if isinstance(positions, int) else self.grid

    @property
    def level_pools(self) -> list[int]:
        """Patches along a cell's side, by level; the whole grid for the image level."""
        return self.pools(self.grid, self.grid)

    def pools(self, rows: int, columns: int) -> list[int]:
        """The same for a grid of any rows and columns."""
        whole = max(rows, columns)
        return [whole if pool == "image" else int(pool) for pool in self.model.level_pool]

    @property
    def level_sides(self) -> list[int]:
        """Cells along each side of the image, by level; those at its end may be smaller."""
        return [-(-self.grid // pool) for pool in self.level_pools]

    def cells(self, height: int, width: int) -> int:
        """Cells of all levels together in an image of `height` × `width` pixels."""
        rows, columns = height // self.model.patch_size, width // self.model.patch_size
        return sum(-(-rows // n) * -(-columns // n) for n in self.pools(rows, columns))

    @property
    def predicted(self) -> list[int]:
        """The levels that are predicted: those whose loss has a weight."""
        return [level for level, weight in enumerate(self.loss.level_weights) if weight]

    @property
    def repeated(self) -> str | None:
        """The image level, where it lies after the block of the level before: one mean for both."""
        blocks = [*self.model.level_blocks]
        image = [*self.model.level_pool][-1] == "image" and blocks[-1:] == blocks[-2:-1]
        return f"level_{len(blocks) - 1}" if image else None

    @property
    def masked(self) -> list[int]:
        """The levels of patches that are predicted: all but the image level."""
        return [level for level in self.predicted if self.model.level_pool[level] != "image"]

    @property
    def image_predicted(self) -> bool:
        """Whether the image level is predicted."""
        return self.masked != self.predicted

    @property
    def view_grid(self) -> int:
        """Patches along each side of a view; 0 if there are none."""
        seen = self.image_predicted and self.views.count
        return int(self.views.size) // self.model.patch_size if seen else 0

    def view_size(self, image_size: int) -> int:
        """Pixels along a view's side at another image size: as large a share, in whole patches."""
        patches = int(self.views.size) / self.data.image_size * image_size / self.model.patch_size
        return self.model.patch_size * max(1, round(patches))

    @property
    def stages(self) -> list[tuple[int, float]]:
        """(image size, share of the epochs) in order, `data.image_size` last."""
        first = list(self.data.progressive)
        return [*first, (self.data.image_size, 1 - sum(share for _, share in first))]

    def at_size(self, image_size: int) -> Config:
        """The resolved config for another image size: context and views keep their share."""
        other = self.model_copy(deep=True)
        other.data.image_size, other.data.progressive = image_size, []
        share = int(self.masks.context_tokens) / self.grid**2
        other.masks.context_tokens = max(1, round(share * other.grid**2))
        other.views.size = self.view_size(image_size)
        return other

    def with_batch(self, batch: int) -> Config:
        """The config with another batch size."""
        return self.model_copy(update={"data": self.data.model_copy(update={"batch_size": batch})})

    def __rich__(self) -> Syntax:
        return Syntax(self.to_yaml(), "yaml", theme="ansi_light", background_color="default")

    def to_yaml(self) -> str:
        """The config as YAML, in the schema's order."""
        return yaml.safe_dump(self.model_dump(), sort_keys=False, default_flow_style=None)

    @model_validator(mode="after")
    def _resolve(self) -> Config:
        if self.run.dir:
            self.run.dir = str(Path(os.path.expanduser(self.run.dir)))
        if self.data.dir:  # a run is evaluated and resumed from other folders too
            self.data.dir = str(Path(os.path.expanduser(self.data.dir)).absolute())
        if self.data.labels.endswith(".csv"):
            self.data.labels = str(Path(os.path.expanduser(self.data.labels)).absolute())
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
        if self.views.size == "auto":  # 48 of 224 pixels
            side = min(self.grid, max(3, round(3 / 14 * self.grid)))
            self.views.size = self.model.patch_size * side
        return self

    def _resolve_model(self) -> None:
        model = self.model
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
        if model.levels == "auto":
            model.levels = LEVELS if model.level_pool == "auto" else len(model.level_pool)
        levels = int(model.levels)
        usual: list[Any] = [*[1] * (levels - 1), "image" if levels > 1 else 1]
        if model.level_pool == "auto":
            model.level_pool = usual
        if len(model.level_pool) != levels:
            raise ValueError(
                f"model.level_pool={model.level_pool} is of {len(model.level_pool)} levels, but "
                f"model.levels={levels}. Set both, or one to auto: level_pool=auto is {usual}."
            )
        if model.level_blocks == "auto":
            image = model.level_pool[-1:] == ["image"]  # it shares the last block
            fine, depth = levels - image, int(model.depth)
            if depth < fine:
                asked = f"model.level_pool={model.level_pool} needs {fine} blocks"
                raise ValueError(f"{asked}; model.depth is {depth}.")
            ends = [round(depth * n / fine) for n in range(1, fine + 1)]
            model.level_blocks = ends + [depth] * image
        if self.loss.level_weights == "auto":  # the last level of each size of cell is predicted
            pairs = pairwise([*model.level_pool, None])
            weights = [IMAGE_WEIGHT if a == "image" else float(a != b) for a, b in pairs]
            self.loss.level_weights = weights

    def _rules(self) -> Iterator[tuple[bool, str]]:
        """Whether each rule between keys is broken, and the message if so; `auto` is resolved."""
        data, model, masks, optim = self.data, self.model, self.masks, self.optim
        size, patch, narrow = data.image_size, model.patch_size, model.predictor_dim
        stages = f"data.progressive={data.progressive}"
        for side, _ in self.stages:
            key = f"data.image_size={size}" if side == size else f"{stages}: {side}"
            yield side % patch > 0, f"{key} is not a multiple of model.patch_size={patch}."
        fine = f"{self.grid}×{self.grid} patches are too many: raise model.patch_size={patch}."
        yield self.grid > LARGEST_GRID, fine
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
            wanted = f"needs one item per level of model.level_pool={pools}. Or set {key}=auto."
            yield len(values) != len(pools), f"{key}={values} {wanted}"
            order = [self.grid if value == "image" else value for value in values]
            falls = values is not weights and order != sorted(order)
            yield falls, f"{key}={values} must not decrease: level 0 is the finest."
        blind = self.image_predicted and not self.masked and not self.views.count
        yield blind, "views.count=0: the image needs a view, or patches that are predicted too."
        seen = self.views.size
        odd = seen != "auto" and (int(seen) % patch > 0 or int(seen) > size)
        fits = f"a multiple of model.patch_size={patch}, no larger than data.image_size={size}"
        yield odd, f"views.size={seen} must be {fits}."
        whole = [*pools].count("image") > 1 or "image" in [*pools][:-1]
        yield whole, f"model.level_pool={pools}: only the last level can be the image."
        levels = list(zip(blocks, pools, strict=True))
        both = f"model.level_blocks={blocks} and model.level_pool={pools}"
        yield len(set(levels)) < len(levels), f"{both} make two levels the same; change one."
        yield not self.predicted, "loss.level_weights are all 0: at least one must be predicted."
        deep = int(blocks[-1]) > int(model.depth)
        yield deep, f"model.level_blocks={blocks} exceeds model.depth={model.depth}."
