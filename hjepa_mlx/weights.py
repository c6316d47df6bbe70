"""Weights of other codes, read safely and named as here.

Layouts: runs and exports of this package; timm; transformers (`IJepaModel`, `ViTModel`); I-JEPA's
own checkpoints. Files may come from anywhere: of a pickle only tensors are read, and every size is
checked before memory is taken.
"""

from __future__ import annotations

import pickle
import re
from dataclasses import dataclass
from math import isqrt
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from hjepa_mlx import checkpoint, hub
from hjepa_mlx.config import Config
from hjepa_mlx.errors import HJEPAError, UsageError, required
from hjepa_mlx.files import read_json
from hjepa_mlx.recipes import load_config

PICKLES = (".pth", ".pt", ".bin", ".tar")  # what torch.save writes
WRONG = (ValueError, TypeError, AttributeError)  # of content that is no network's
ENCODERS = ("context_encoder.", "target_encoder.")
NETWORKS = (*ENCODERS, "predictor.", "image_predictor.", "projector.")
# That others put before an encoder's names, and our classifiers; transformers has encoder.layer
PREFIXES = re.compile(r"^((module|model|backbone|ijepa|vit|encoder(?!\.layer))\.)+")
NAMES = (  # here, in transformers' files, and in its modules from version 5 on
    ("patch_embed.proj", "embeddings.patch_embeddings.projection"),
    ("pos_embed", "embeddings.position_embeddings"),
    ("cls_token", "embeddings.cls_token"),
    ("blocks", "encoder.layer", "layers"),
    ("norm1", "layernorm_before"),
    ("norm2", "layernorm_after"),
    ("norm", "layernorm"),
    ("attn.q", "attention.attention.query", "attention.q_proj"),
    ("attn.k", "attention.attention.key", "attention.k_proj"),
    ("attn.v", "attention.attention.value", "attention.v_proj"),
    ("attn.proj", "attention.output.dense", "attention.o_proj"),
    ("mlp.fc1", "intermediate.dense"),
    ("mlp.fc2", "output.dense"),
)


@dataclass(frozen=True)
class Weights:
    """Weights under the names of this package, float32, finite.

    Names begin with the network's (NETWORKS) unless they are of one encoder. config: of a run or an
    export of ours. settings: config.json of timm or transformers, where it lies beside the file.
    """

    path: Path
    arrays: dict[str, np.ndarray]
    config: Config | None
    settings: dict[str, Any]


def read(place: str | Path) -> Weights:
    """Read a run, a checkpoint, a folder of safetensors, one file, or hf:USER/NAME.

    Raises UsageError for a place without weights and HJEPAError for a file that is damaged, holds
    numbers that are not finite, or would have to run code.
    """
    path = hub.download(str(place)) if str(place).startswith("hf:") else Path(place)
    run = path.parent.parent if (path / "state.json").is_file() else path
    if newest := path if run != path else checkpoint.latest(path / "checkpoints"):
        arrays = checkpoint.load_weights(newest)
    elif path.is_file() and path.suffix in PICKLES:
        arrays = _unpickled(path)
    else:
        files = [path] if path.suffix == ".safetensors" else sorted(path.glob("*.safetensors"))
        arrays = {k: v for file in files for k, v in checkpoint.read_safetensors(file).items()}
    if not arrays:
        raise UsageError(
            f"There are no weights in {path}. Give a run, a folder with .safetensors, one such "
            f"file, one of {', '.join(PICKLES)}, or hf:USER/NAME."
        )
    numbers = {name: _numbers(path, name, array) for name, array in arrays.items()}
    folder = run if run.is_dir() else path.parent
    own = None
    if (folder / "config.yaml").is_file():
        try:
            own = load_config(folder / "config.yaml")
        except UsageError:
            if not path.is_file():  # what lies beside a file may belong to something else
                raise
    return Weights(path, _as_here(numbers), own, _settings(folder / "config.json"))


def _unpickled(path: Path) -> dict[str, Any]:
    """The tensors in a file of torch.save; of I-JEPA's, both encoders and the predictor."""
    torch = required("torch", "export")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        for key in ("state_dict", "model"):
            content = content.get(key, content)
        parts = {"": content}
        if "target_encoder" in content:
            names = zip(("encoder", "target_encoder", "predictor"), NETWORKS[:3], strict=True)
            parts = {network: content.get(name, {}) for name, network in names}
        found = {network + name: x for network, part in parts.items() for name, x in part.items()}
        tensors = {name: x.detach() for name, x in found.items() if isinstance(x, torch.Tensor)}
        if sum(x.numel() * x.element_size() for x in tensors.values()) > path.stat().st_size:
            raise ValueError("the same numbers many times")
        return {name: mx.array(tensor.float().numpy()) for name, tensor in tensors.items()}
    except (pickle.UnpicklingError, RuntimeError, OSError, EOFError, LookupError, MemoryError,
            OverflowError, *WRONG) as error:  # fmt: skip
        if code := re.search(r"GLOBAL (\S+)", str(error)):
            raise HJEPAError(
                f"{path} is refused: opening it would run {code[1]}. Of a pickle, only tensors are "
                "read."
            ) from None
        raise HJEPAError(f"{path} is damaged, or holds no weights of a network.") from None


def _numbers(path: Path, name: str, array: mx.array) -> np.ndarray:
    x = np.array(array.astype(mx.float32))
    if not np.isfinite(x).all():
        raise HJEPAError(f"{path} is refused: {name} holds numbers that are not finite.")
    return x


def as_transformers(arrays: dict[str, mx.array]) -> dict[str, mx.array]:
    """Weights of an encoder in timm's layout under the names in transformers' files."""
    found = {}
    for name, array in arrays.items():
        qkv = zip("qkv", mx.split(array, 3), strict=True) if ".qkv." in name else [("", array)]
        for part, x in qkv:
            theirs = name.replace(".qkv.", f".{part}.")
            for here, there, *_ in NAMES:
                theirs = _renamed(theirs, here, there)
            found[theirs] = x
    return found


def _renamed(name: str, old: str, new: str) -> str:
    return re.sub(rf"(^|\.){re.escape(old)}(\.|$)", rf"\g<1>{new}\2", name)


def _as_here(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The same under this package's names and in its shapes."""
    found: dict[str, np.ndarray] = {}
    for full, array in arrays.items():
        network = next((start for start in NETWORKS if full.startswith(start)), "")
        name = PREFIXES.sub("", full.removeprefix(network))
        for here, *others in NAMES if network != "predictor." else ():
            for there in others:
                name = _renamed(name, there, here)
        found[network + name] = array
    for name, array in sorted(found.items()):
        if ".attn.q." in name:
            parts = [name.replace(".attn.q.", f".attn.{part}.") for part in "qkv"]
            if all(part in found for part in parts):
                joined = np.concatenate([found.pop(part) for part in parts])
                found[name.replace(".attn.q.", ".attn.qkv.")] = joined
        elif name.endswith("patch_embed.proj.weight") and array.ndim == 4:
            found[name] = array.transpose(0, 2, 3, 1).reshape(len(array), -1)
        elif name.endswith("pos_embed"):
            found[name] = _of_patches(array.reshape(-1, array.shape[-1]), name, found)
        elif scale := re.fullmatch(r"(.*)\.ls([12])\.gamma", name):  # LayerScale: into the linear
            linear = f"{scale[1]}.{'attn.proj' if scale[2] == '1' else 'mlp.fc2'}"
            for kind in {f"{linear}.weight", f"{linear}.bias"} & found.keys():
                found[kind] = (found[kind].T * array).T
            del found[name]
    return found


def _of_patches(table: np.ndarray, name: str, arrays: dict[str, np.ndarray]) -> np.ndarray:
    """A position table [N, D] without its first rows, those of class and register tokens."""
    if isqrt(len(table)) ** 2 == len(table):
        return table
    names = (name.replace("pos_embed", token) for token in ("cls_token", "dist_token", "reg_token"))
    return table[sum(arrays[token].shape[-2] for token in names if token in arrays) :]


def _settings(path: Path) -> dict[str, Any]:
    try:
        return dict(read_json(path, 1_000_000))
    except (OSError, ValueError, TypeError):
        return {}
