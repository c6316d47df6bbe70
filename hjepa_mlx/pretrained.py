"""A network that starts from other weights: what fits is taken, and a table says what was not."""

from __future__ import annotations

import re
from math import isqrt

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from hjepa_mlx import weights
from hjepa_mlx.config import Config
from hjepa_mlx.errors import HJEPAError, UsageError
from hjepa_mlx.models.hjepa import HJEPA
from hjepa_mlx.models.vit import grid_positions, resize_matrix, stretched
from hjepa_mlx.weights import ENCODERS, NETWORKS, Weights

POSITION_ERROR = 5e-3  # a sin-cos table that was saved in bfloat16 is off by so much
LEFT_OUT = "left out: "

Outcomes = list[tuple[str, str]]  # name of a weight or setting, and what became of it


def start(config: Config, model: HJEPA | None = None, init: bool = True) -> tuple[HJEPA, list[str]]:
    """The network to start from: `model` or a new one, with the weights of `model.init` (`init`).

    Sets `model.positions` of `config` as those weights need it. Returns also the lines of a table.
    """
    if not init or not config.model.init:
        return HJEPA(config) if model is None else model, []
    try:
        found = weights.read(config.model.init)
        config.model.positions = _positions(found, config)  # type: ignore[assignment]
        model = HJEPA(config) if model is None else model
        return model, _lines(found, put(found, model))
    except (LookupError, *weights.WRONG) as error:
        where = f"{config.model.init} holds weights or settings of an unknown form"
        raise HJEPAError(f"{where}: {error}.") from error


def put(found: Weights, model: HJEPA, whole: bool = False) -> Outcomes:
    """Put weights into `model`, one by one; those of a single encoder into both.

    Patch embeddings are resampled to another patch size and learned positions to another grid.
    UsageError if no block fits, if it is known that the heads or the activation are others, or if
    an encoder lacks a weight (`whole`).
    """
    arrays, config = dict(found.arrays), model.config
    if not any(name.startswith(NETWORKS) for name in arrays):
        arrays = {network + name: array for network in ENCODERS for name, array in arrays.items()}
    outcomes = [*_settings(found, config), *_without_meaning(arrays, found.config, config)]
    own_weights, taken = dict(tree_flatten(model.parameters())), {}
    for name, own in own_weights.items():
        array, how = _fitted(name, arrays.pop(name, None), own.shape)
        if array is not None:
            taken[name] = mx.array(array)
        outcomes.append((name, how))
    if not any(".blocks." in name for name in taken if name.startswith(ENCODERS)):
        why = next((f"{name}: {how}" for name, how in outcomes if " there, " in how), "other names")
        raise UsageError(
            f"Nothing of {found.path} fits ({why}). Set model.size=custom and model.dim, "
            "model.depth and model.heads as there."
        )
    lacking = sorted(name for name in own_weights.keys() - taken if name.startswith(ENCODERS))
    if whole and lacking:
        raise UsageError(f"{found.path} is not a whole export: it lacks {lacking[0]}.")
    model.load_weights(list(taken.items()), strict=False)  # shapes were compared above
    mx.eval(model.parameters())
    return outcomes + [(name, f"{LEFT_OUT}there is no such weight here") for name in arrays]


def _fitted(
    name: str, array: np.ndarray | None, shape: tuple[int, ...]
) -> tuple[np.ndarray | None, str]:
    """A weight in the shape that it has here, or None; and how."""
    if array is None:
        return None, "starts as new"
    if array.shape == shape:
        return array, "loaded"
    if array.ndim == 2 and name.endswith("patch_embed.proj.weight") and len(array) == shape[0]:
        old, new = isqrt(array.shape[1] // 3), isqrt(shape[1] // 3)
        if 3 * old**2 == array.shape[1]:
            return resampled(array, new), f"resampled from patches of {old} pixels to {new}"
    if array.ndim == 2 and name.endswith("pos_embed") and array.shape[1:] == shape[1:]:
        old, new = isqrt(len(array)), isqrt(shape[0])
        if old**2 == len(array):
            return np.array(stretched(mx.array(array), new)), f"stretched from {old}² to {new}²"
    return None, f"{LEFT_OUT}{list(array.shape)} there, {list(shape)} here"


def resampled(weight: np.ndarray, patch_size: int) -> np.ndarray:
    """A patch embedding [D, p·p·3] for patches of another size, [D, q·q·3].

    A resized patch gets the embedding of the original one, as nearly as can be: w' = pinv(Bᵀ)·w,
    where B resizes patches (FlexiViT, arXiv 2212.08013, section 3.4).
    """
    D, old = len(weight), isqrt(weight.shape[1] // 3)
    inverse = np.linalg.pinv(resize_matrix(old, patch_size)).T  # [q, p]
    pixels = weight.reshape(D, old, old, 3).astype(np.float64)
    found = np.einsum("ai,bj,dijc->dabc", inverse, inverse, pixels)
    return found.reshape(D, -1).astype(np.float32)


def _positions(found: Weights, config: Config) -> int | str:
    """`model.positions` for these weights, unless it was given."""
    asked, then = config.model.positions, found.config
    grids = {then.position_grid} if then else set()
    table = next((x for name, x in found.arrays.items() if name.endswith("pos_embed")), None)
    if asked != "sincos" or (table is None and not then):
        return asked
    if table is not None:
        side = isqrt(len(table))
        if table.shape != (side**2, int(config.model.dim)):
            return asked
        fixed = {g: np.array(grid_positions(side, g, table.shape[1])) for g in {side, *grids}}
        grids = {g for g, x in fixed.items() if np.abs(table - x).max() < POSITION_ERROR}
    if not grids:
        return "learned"
    return asked if config.grid in grids else min(grids)


def _settings(found: Weights, config: Config) -> Outcomes:
    """Settings that weights don't show: those that must be equal, and those that should be."""
    model, there = config.model, found.settings
    heads = there.get("num_attention_heads", there.get("model_args", {}).get("num_heads"))
    mean = there.get("pretrained_cfg", {}).get("mean")
    if found.config:
        heads, mean = found.config.model.heads, found.config.model.image_mean
    outcomes = [] if heads else [("model.heads", f"not in the file; {model.heads} assumed")]
    if heads and heads != model.heads:
        raise UsageError(f"{found.path} has {heads} attention heads: set model.heads={heads}.")
    if there.get("hidden_act", "gelu") != "gelu":
        raise UsageError(f"{found.path} has the activation {there['hidden_act']}; here it is gelu.")
    if mean not in (None, model.image_mean):
        outcomes.append(("model.image_mean", f"{mean} there, {model.image_mean} here"))
    if model.positions != "learned":
        side, grid = config.position_grid, config.grid
        more = "" if side == grid else f", stretched over {grid}²"
        outcomes.append(("positions", f"the sin-cos table of {side}²{more}"))
    return outcomes


def _without_meaning(arrays: dict[str, np.ndarray], then: Config | None, now: Config) -> Outcomes:
    """Take out weights that mean something else here, whatever their shapes."""
    reasons = {} if now.model.positions == "learned" else {"pos_embed": "the fixed table is used"}
    if then and _predicted(then) != _predicted(now):
        names = ("predictor.heads.", "predictor.level_embed")
        reasons |= dict.fromkeys(names, "it predicts other levels")
    if then and then.model.level_blocks[-1] != now.model.level_blocks[-1]:
        reasons["image_predictor."] = "it predicts the image after another block"
    found = [(name, why) for name in arrays for key, why in reasons.items() if key in name]
    for name, _ in found:
        del arrays[name]
    return [(name, LEFT_OUT + why) for name, why in found]


def _predicted(config: Config) -> list[tuple]:
    model = config.model
    return [(model.level_blocks[level], model.level_pool[level]) for level in config.masked]


def _lines(found: Weights, outcomes: Outcomes) -> list[str]:
    """A table with one line for weights of a part that fared alike."""
    groups: dict[tuple[str, str], list[str]] = {}
    for name, how in outcomes:
        part = re.sub(r"^(\w+\.\w+).*", r"\1", name)
        groups.setdefault((part, how), []).append(name)
    rows = []
    for (part, how), names in groups.items():
        numbers = {int(n[1]) for name in names if (n := re.search(r"\.blocks\.(\d+)\.", name))}
        rows.append((part + (f" {min(numbers)}–{max(numbers)}" if numbers else ""), names, how))
    width = max(len(part) for part, _, _ in rows)
    lines = [f"  {part:<{width}} {len(names):>4}  {how}" for part, names, how in rows]
    return [f"Weights of {found.path}: part, how many, outcome", *lines]
