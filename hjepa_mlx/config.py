"""The one schema: strict YAML recipes, dotted overrides, and errors that name the nearest key.

A recipe states its main choices and whatever else differs from the defaults below. `load_config`
returns it resolved; that form is printed by `--dry-run` and saved with each run.
"""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from rich.syntax import Syntax

from hjepa_mlx.errors import UsageError, did_you_mean
from hjepa_mlx.tables import Shown

SIZES = {  # dim, depth, heads: always 64 wide a head, which MLX's fused attention needs on Metal
    "nano": (128, 3, 2),
    "tiny": (192, 12, 3),
    "small": (384, 12, 6),
    "base": (768, 12, 12),
}
LEVEL_WEIGHTS = (1.0, 0.7, 0.5, 0.35)

Auto = Literal["auto"]
Fraction = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]

_two = Field(min_length=2, max_length=2)
Pair = Annotated[list[Annotated[float, Field(ge=0)]], _two]
UnitPair = Annotated[list[Fraction], _two]
Areas = Annotated[list[Annotated[float, Field(gt=0, le=1)]], _two]
Aspects = Annotated[list[Positive], _two]
Stage = Annotated[tuple[Count, Annotated[float, Field(gt=0, lt=1)]], Field(strict=False)]
_three = Field(min_length=3, max_length=3)
Mean = Annotated[list[Fraction], _three]
Deviation = Annotated[list[Positive], _three]
Betas = Annotated[list[Annotated[float, Field(ge=0, lt=1)]], _two]


class Section(BaseModel):
    """A part of the config: no unknown keys, no silent conversions, also on assignment."""

    model_config = ConfigDict(extra="forbid", strict=True, validate_assignment=True)


class Data(Section):
    """What is trained on, as square images of `image_size` pixels.

    progressive: [image size, share of the epochs] of what is trained first, at lower resolution.
    crop_scale: of the random resized crop, fractions of an image's area. limit: images.
    """

    name: str = "folder"
    weights: Auto | list[Positive] = "auto"
    dir: str | None = None
    image_size: Count = 224
    progressive: list[Stage] = []
    batch_size: Annotated[int, Field(ge=2)] = 128
    limit: Count | None = None
    crop_scale: Areas = [0.3, 1.0]
    flip: bool = True
    workers: Auto | Count = "auto"

    def whole(self, name: str) -> Data:
        """The same place's data set `name` alone, without a limit."""
        return self.model_copy(update={"name": name, "weights": "auto", "limit": None})


class Model(Section):
    """Encoder, levels and predictor; give `size`, or `dim`, `depth` and `heads`.

    level_blocks: after which block, from 1, each level lies. level_pool: patches along a cell's
    side. predictor_context: what the predictor sees of the context: its tokens, only their mean, or
    the tokens for the first half of each level's cells and the mean for the rest.
    image_mean, image_std: of red, green and blue, for normalising images; by default ImageNet's.
    """

    size: Literal["nano", "tiny", "small", "base", "custom"] = "small"
    dim: Auto | Count = "auto"
    depth: Auto | Count = "auto"
    heads: Auto | Count = "auto"
    patch_size: Count = 16
    image_mean: Mean = [0.485, 0.456, 0.406]
    image_std: Deviation = [0.229, 0.224, 0.225]
    levels: Annotated[int, Field(ge=1, le=4)] = 3
    level_blocks: Auto | list[Count] = "auto"
    level_pool: Auto | list[Count] = "auto"
    predictor_dim: Count = 192
    predictor_depth: Count = 6
    predictor_context: Literal["tokens", "mean", "both"] = "tokens"
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

    level_weights: a level of weight 0 is only looked at after training, never predicted.
    """

    kind: str = "smooth_l1"  # a name in losses.py
    level_weights: Auto | list[Annotated[float, Field(ge=0)]] = "auto"
    vicreg: Annotated[float, Field(ge=0)] = 0.0
    sigreg: Annotated[float, Field(ge=0)] = 0.0


class Optim(Section):
    """AdamW and the schedules of its values over the steps (schedules.py, step.py).

    lr: linear warm-up over `warmup_epochs` (may be fractional), then a cosine to `final_lr`;
    weight_decay and the target's momentum: [start, end]. grad_clip: of the global norm, 0: off.
    accumulate: batches per update.
    """

    epochs: Count = 100
    warmup_epochs: Annotated[float, Field(ge=0)] = 10
    lr: Positive = 1.0e-3
    final_lr: Annotated[float, Field(ge=0)] = 1.0e-6
    betas: Betas = [0.9, 0.95]
    weight_decay: Pair = [0.04, 0.4]
    momentum: UnitPair = [0.996, 1.0]
    grad_clip: Annotated[float, Field(ge=0)] = 3.0
    accumulate: Count = 1


class Run(Section):
    """Where a run is kept and how often it reports, checks and saves.

    log_every, signals_every: in steps. milestone_epochs, eval_every_epochs: 0: never. keep_last:
    checkpoints, beside milestones and the last. eval_share: of the training time.
    """

    dir: str | None = None
    log_every: Count = 10
    signals_every: Count = 100
    checkpoint_minutes: Positive = 15
    keep_last: Count = 3
    milestone_epochs: Annotated[int, Field(ge=0)] = 25
    eval_every_epochs: Annotated[int, Field(ge=0)] = 0
    eval_share: Fraction = 0.02
    final_eval: bool = True


class Config(Shown, Section):
    """A whole recipe."""

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


class _Loader(yaml.SafeLoader):
    """SafeLoader that reads 3e-4 as a number, as YAML 1.2 does, and refuses a key given twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """The mapping of a node whose keys differ."""
        keys = [key.value for key, _ in node.value]
        twice = [key for number, key in enumerate(keys) if key in keys[:number]]
        if twice:
            raise yaml.YAMLError(f"'{twice[0]}' is given twice in one section{node.start_mark}")
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?$"),
    list("-+.0123456789"),
)
# An integer also matches the pattern above: integers are tried first.
for _first in "-+0123456789":
    _resolvers = _Loader.yaml_implicit_resolvers[_first]
    _resolvers.sort(key=lambda resolver: resolver[0] != "tag:yaml.org,2002:int")


def config_folder() -> Path:
    """The folder of the recipes that come with the package."""
    inside = Path(__file__).parent / "configs"  # in a wheel
    return inside if inside.is_dir() else Path(__file__).parent.parent / "configs"


def config_names() -> list[str]:
    """Names of the recipes that come with the package."""
    folder = config_folder()
    return sorted(str(p.relative_to(folder).with_suffix("")) for p in folder.rglob("*.yaml"))


def find_config(name_or_path: str) -> Path:
    """The YAML file of a recipe given by name or by path, or of a run given by its folder."""
    path, names = Path(name_or_path), config_names()
    if name_or_path in names:
        return config_folder() / f"{name_or_path}.yaml"
    if (path / "config.yaml").is_file():
        return path / "config.yaml"
    if path.suffix in (".yaml", ".yml"):
        if path.is_file():
            return path
        raise UsageError(f"Config file {path} does not exist.")
    hint = did_you_mean(name_or_path, names)
    raise UsageError(
        f"No config named '{name_or_path}'.{hint} There are: {', '.join(names)}; "
        "or give the path of a .yaml file."
    )


def load_config(name_or_path: str | Path, overrides: list[str] | None = None) -> Config:
    """Read a recipe, apply `a.b=value` overrides, check and resolve it.

    What is `auto` is settled then: change in the overrides what something else follows from (model,
    image size, masks), or set that to "auto" again. Raises UsageError with one line that names the
    key, what was given and what is allowed.
    """
    path = find_config(str(name_or_path))
    try:
        tree = yaml.load(path.read_text(), Loader=_Loader) or {}
    except (yaml.YAMLError, ValueError) as error:
        raise UsageError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(tree, dict):
        raise UsageError(f"{path} must hold 'key: value' lines; it holds a {type(tree).__name__}.")
    tree = {key: {} if value is None else value for key, value in tree.items()}
    tree.setdefault("name", re.sub(r"[^\w.-]", "-", path.stem))
    for override in overrides or []:
        _override(tree, override)
    return resolve(parse(tree))


def parse(tree: dict[str, Any]) -> Config:
    """Check a tree of plain values against the schema."""
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise UsageError(_explain(error)) from None


def _override(tree: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise UsageError(f"--set {override!r}: write it as key=value, e.g. optim.lr=3e-4.")
    try:
        value = yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, ValueError):
        raise UsageError(f"--set {override!r}: the value is not valid YAML.") from None
    *sections, last = key.strip().split(".")
    for section in sections:
        tree = tree.setdefault(section, {})
        if not isinstance(tree, dict):
            raise UsageError(f"--set {override!r}: '{section}' is a value, not a section.")
    tree[last] = value


def dotted_keys(section: type[BaseModel] = Config, prefix: str = "") -> list[str]:
    """Every key of the schema, e.g. 'optim.lr'."""
    keys: list[str] = []
    for name, field in section.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            keys += dotted_keys(kind, f"{prefix}{name}.")
        else:
            keys.append(prefix + name)
    return keys


def _explain(error: ValidationError) -> str:
    """One line for the first thing that is wrong."""
    first = error.errors(include_url=False)[0]
    # pydantic puts union members' types into the location; keep the schema's own names
    location = [str(part) for part in first["loc"]]
    known = dotted_keys()
    if first["type"] == "extra_forbidden":
        key = ".".join(location)
        same_name = [k for k in known if k.split(".")[-1] == location[-1]]
        near = same_name or difflib.get_close_matches(key, [*Config.model_fields, *known], 1, 0.4)
        hint = f" Did you mean '{near[0]}'?" if near else ""
        return f"Unknown config key '{key}'.{hint}"
    while len(location) > 1 and ".".join(location) not in known:
        location.pop()
    key = ".".join(location)
    reasons = [
        e["msg"]
        for e in error.errors(include_url=False)
        if e["loc"][: len(location)] == first["loc"][: len(location)]
    ]
    reason = "; or ".join(dict.fromkeys(reasons)).replace("Input should", "it should")
    return f"Config key '{key}': {reason} (given: {_given(error, location)!r})."


def _given(error: ValidationError, location: list[str]) -> Any:
    matches = [e for e in error.errors() if [str(p) for p in e["loc"]][: len(location)] == location]
    return min(matches, key=lambda e: len(e["loc"]))["input"]


def resolve(config: Config) -> Config:
    """Replace each `auto` that results depend on, and check fields against each other.

    `precision`, `compile` and `data.workers` depend on the machine and may stay "auto": `train`
    settles the first two (`timing.py`), the pipeline the third.
    """
    config = config.model_copy(deep=True)
    if config.run.dir:
        config.run.dir = str(Path(config.run.dir).expanduser())
    if config.data.dir:  # a run is evaluated and resumed from other folders too
        config.data.dir = str(Path(config.data.dir).expanduser().absolute())
    _resolve_model(config)
    _check_sizes(config)
    _check_levels(config)
    _check_ranges(config)
    masks = config.masks
    if masks.context_tokens == "auto":
        # Target blocks land independently, so this share of the context block is left on average;
        # 0.7 of it leaves few images to be drawn again (I-JEPA's truncation keeps 0.68: 56 of 82).
        left = (1 - sum(masks.target_area) / 2) ** masks.targets * sum(masks.context_area) / 2
        masks.context_tokens = max(1, int(0.7 * left * config.grid**2))
    return config


def _resolve_model(config: Config) -> None:
    model = config.model
    if model.size != "custom":
        size = dict(zip(("dim", "depth", "heads"), SIZES[model.size], strict=True))
        given = {key: getattr(model, key) for key in size if getattr(model, key) != "auto"}
        if any(given[key] != size[key] for key in given):
            if len(given) == len(size) and model.level_blocks != "auto":  # was resolved before
                raise UsageError(
                    f"model.size={model.size} contradicts model.dim={model.dim}, "
                    f"depth={model.depth} and heads={model.heads}: set these to auto, or the size "
                    "to custom."
                )
            model.size = "custom"
        for key, value in size.items():
            if key not in given:
                setattr(model, key, value)
    if "auto" in (model.dim, model.depth, model.heads):
        raise UsageError("model.size=custom needs model.dim, model.depth and model.heads.")
    depth, levels = int(model.depth), model.levels
    if depth < levels:
        raise UsageError(f"model.levels={levels} needs at least as many blocks; depth is {depth}.")
    if model.level_blocks == "auto":
        model.level_blocks = [round(depth * (level + 1) / levels) for level in range(levels)]
    if model.level_pool == "auto":
        model.level_pool = [2**level for level in range(levels)]
    if config.loss.level_weights == "auto":
        config.loss.level_weights = list(LEVEL_WEIGHTS[:levels])


def _check_sizes(config: Config) -> None:
    data, model = config.data, config.model
    for key, size in (
        ("image_size", data.image_size),
        *(("progressive", first) for first, _ in data.progressive),
    ):
        if size % model.patch_size:
            raise UsageError(
                f"data.{key}: {size} is not a multiple of model.patch_size={model.patch_size}."
            )
    if any(first >= data.image_size for first, _ in data.progressive):
        raise UsageError(
            f"data.progressive={data.progressive}: what is trained first has to be smaller than "
            f"data.image_size={data.image_size}."
        )
    if sum(share for _, share in data.progressive) >= 1:
        raise UsageError(
            f"data.progressive={data.progressive}: the shares of the epochs must add up to less "
            f"than 1; the rest is trained at data.image_size={data.image_size}."
        )
    for key, value in (("dim", model.dim), ("predictor_dim", model.predictor_dim)):
        if int(value) % 4:
            raise UsageError(f"model.{key}={value} must be a multiple of 4 (2-D positions).")
    if model.predictor_dim % (heads := model.predictor_heads):
        raise UsageError(
            f"model.predictor_dim={model.predictor_dim} does not divide into {heads} heads; "
            f"use {64 * heads} or {64 * (heads + 1)}."
        )
    if model.predictor_context == "both" and config.masks.targets < 2:
        raise UsageError("model.predictor_context=both needs masks.targets of at least 2 to share.")
    if int(model.dim) % int(model.heads):
        raise UsageError(f"model.dim={model.dim} is not a multiple of model.heads={model.heads}.")


def _check_levels(config: Config) -> None:
    model = config.model
    for key, values in (
        ("model.level_blocks", model.level_blocks),
        ("model.level_pool", model.level_pool),
        ("loss.level_weights", config.loss.level_weights),
    ):
        if len(values) != model.levels:
            raise UsageError(
                f"{key}={values} needs one item per level; model.levels={model.levels}."
            )
        if key.startswith("model") and list(values) != sorted(values):
            raise UsageError(f"{key}={values} must not decrease: level 0 is the finest.")
    pairs = list(zip(model.level_blocks, model.level_pool, strict=True))
    if len(set(pairs)) < len(pairs):
        raise UsageError(
            f"model.level_blocks={model.level_blocks} and model.level_pool={model.level_pool} make "
            "two levels the same; give them different blocks or pooling."
        )
    if not config.predicted:
        raise UsageError("loss.level_weights are all 0: at least one level must be predicted.")
    if int(model.level_blocks[-1]) > int(model.depth):
        raise UsageError(f"model.level_blocks={model.level_blocks} exceeds depth {model.depth}.")


def _check_ranges(config: Config) -> None:
    data, optim = config.data, config.optim
    if optim.warmup_epochs >= optim.epochs:
        raise UsageError(
            f"optim.warmup_epochs={optim.warmup_epochs:g} must be less than "
            f"optim.epochs={optim.epochs}."
        )
    for key, pair in (
        ("data.crop_scale", data.crop_scale),
        ("masks.target_area", config.masks.target_area),
        ("masks.target_aspect", config.masks.target_aspect),
        ("masks.context_area", config.masks.context_area),
    ):
        if pair[0] > pair[1]:
            raise UsageError(f"{key}={pair} must be [low, high].")
