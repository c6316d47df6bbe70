"""Checkpoints: everything a run needs to go on as if it had never stopped.

A checkpoint is a folder `step-00001234` that appears under its name only when complete; the file
`latest` beside it names the newest, for people and other tools. `state.json` holds the SHA-256 of
the two weight files.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from contextlib import suppress
from math import prod
from pathlib import Path
from typing import Annotated, Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten
from pydantic import Field, create_model

from hjepa_mlx.errors import HJEPAError, UsageError
from hjepa_mlx.files import atomic_folder, atomic_write, read_json, sha256, sync
from hjepa_mlx.models.hjepa import HJEPA
from hjepa_mlx.step import Step, random_key, reseed

FORMAT = 1
LONGEST_HEADER = 10_000_000  # bytes, of a safetensors file
MOST_AXES = 8  # of an array
BITS = re.compile(r"B?F(16|32|64)|[IU](8|16|32|64)")  # of a number, by its type in safetensors
MOMENTS = ("m", "v")  # that Adam keeps of each weight
Whole = Annotated[int, Field(ge=0, lt=2**53)]
Word = Annotated[int, Field(ge=0, lt=2**32)]


STATE: dict[str, Any] = {  # types of what state.json has in every version
    "step": Whole,
    "epoch": Annotated[float, Field(ge=0, allow_inf_nan=False)],
    "images": Whole,
    "position": tuple[Whole, Whole],
    "own_parts": dict[str, str | None],
    "window": list[dict[str, float]],
    "random_state": tuple[Word, Word],
    "loss_scale": dict[str, float],
    "sha256": dict[str, str],
}
_fields: Any = {key: (kind, ...) for key, kind in STATE.items()}
_State = create_model("_State", **_fields)


def save(folder: Path, step: Step, number: int, state: dict[str, Any], keep_last: int) -> Path:
    """Write checkpoint `number` into `folder`, then delete all but the newest `keep_last`.

    state: the training loop's own. Raises HJEPAError when the checkpoint cannot be written.
    """
    final = folder / f"step-{number:08d}"
    if latest(folder) == final:  # another rank or the data was lost just after it
        return final
    try:
        if not folder.is_dir():
            folder.mkdir()  # but not the run's folder again, which was moved away
            sync(folder.parent)
        shutil.rmtree(final, ignore_errors=True)  # a part of one, without state.json
        with atomic_folder(final) as part:
            _write(part, step, {"format": FORMAT, "step": number, **state})
        tidy(folder, keep_last)
    except OSError as error:
        raise HJEPAError(
            f"Saving {final} failed ({error.strerror}). The last good checkpoint is "
            f"{latest(folder) or 'none yet'}. Fix the cause, then go on with --resume."
        ) from error
    return final


def _write(part: Path, step: Step, state: dict[str, Any]) -> None:
    weights = {
        "model.safetensors": dict(tree_flatten(step.model.parameters())),
        "optimizer.safetensors": _optimizer_arrays(step),
    }
    for file_name, arrays in weights.items():
        with open(part / file_name, "wb") as file:
            mx.save_safetensors(file, arrays)
    state |= {
        "random_state": random_key().tolist(),
        "loss_scale": {key: value.item() for key, value in step.scaler.items()},
        "sha256": {file_name: sha256(part / file_name) for file_name in weights},
    }
    (part / "state.json").write_text(json.dumps(state, indent=1))


def _optimizer_arrays(step: Step) -> dict[str, mx.array]:
    """The optimizer's numbers, and its moments of each weight as "NAME.m" and "NAME.v".

    Also the moments of the image level's targets, as "image_mean" and "image_covariance".
    """
    state = step.optimizer.state
    arrays = {name: value for name, value in state.items() if isinstance(value, mx.array)}
    for moment in MOMENTS:
        joined = {
            part: {kind: of[moment] for kind, of in kinds.items() if moment in of}
            for part, kinds in state.items()
            if part not in arrays
        }
        weights = dict(tree_flatten(step.layout.split(joined)))
        arrays |= {f"{name}.{moment}": array for name, array in weights.items()}
    return arrays | {f"image_{name}": array for name, array in step.moments.items()}


def _shapes(arrays: dict[str, mx.array]) -> dict[str, tuple[int, ...]]:
    """Of each moment, and of the numbers that are not just one."""
    return {name: x.shape for name, x in arrays.items() if "." in name or x.size != 1}


def _put_back(arrays: dict[str, mx.array], step: Step) -> None:
    """Restore the optimizer from the arrays of `_optimizer_arrays`."""
    state = step.optimizer.state
    step.moments.update({name: arrays.pop(f"image_{name}") for name in step.moments})
    for moment in MOMENTS:
        named = [(name[:-2], a) for name, a in arrays.items() if name.endswith(f".{moment}")]
        for part, kinds in step.layout.join(tree_unflatten(named)).items():
            for kind, joined in kinds.items():
                state[part][kind][moment] = joined
    state.update({name: value for name, value in arrays.items() if "." not in name})
    mx.eval(state, step.moments)


def complete(folder: Path) -> list[Path]:
    """The complete checkpoints in `folder`, oldest first."""
    return sorted(path for path in folder.glob("step-*") if (path / "state.json").is_file())


def latest(folder: Path) -> Path | None:
    """The newest complete checkpoint."""
    found = complete(folder)
    return found[-1] if found else None


def read_state(checkpoint: Path) -> dict[str, Any]:
    """The checkpoint's state.json."""
    try:
        state = read_json(checkpoint / "state.json")
        if (format := state.get("format", FORMAT)) != FORMAT:
            raise HJEPAError(
                f"Checkpoint {checkpoint} has format {format}; this version of hjepa-mlx reads "
                f"format {FORMAT}."
            )
        _State.model_validate(state)
        parts = {"model": None, "sampler": None} | state["own_parts"]
        parts.setdefault("loss_fn", parts.pop("error", None))  # its earlier name
        state["own_parts"] = parts
    except (OSError, ValueError, AttributeError) as error:
        wrong = [".".join(map(str, e["loc"])) for e in getattr(error, "errors", list)()]
        reason = f"{', '.join(wrong[:3])} is missing or wrong" if wrong else error
        raise _damaged(checkpoint, f"state.json cannot be read ({reason})") from error
    return state


def load_model(checkpoint: Path, model: HJEPA) -> dict[str, Any]:
    """Put the checkpoint's weights into `model`, after comparing checksum, names and shapes.

    Returns the checkpoint's state.
    """
    state = read_state(checkpoint)
    arrays = _load(checkpoint, "model.safetensors", state)
    expected = {name: w.shape for name, w in dict(tree_flatten(model.parameters())).items()}
    found = {name: w.shape for name, w in arrays.items()}
    if expected != found:
        differing = {n for n, _ in expected.items() ^ found.items()}
        name = min(differing)
        raise HJEPAError(
            f"Checkpoint {checkpoint} belongs to another config: {len(differing)} weights differ, "
            f"e.g. {name} is {found.get(name, 'missing')} there and "
            f"{expected.get(name, 'missing')} here."
        )
    model.load_weights([(name, w.astype(mx.float32)) for name, w in arrays.items()])
    mx.eval(model.parameters())
    return state


def restore(checkpoint: Path, step: Step) -> dict[str, Any]:
    """Put a checkpoint back into model, optimizer, random numbers and loss scale; its state."""
    state = load_model(checkpoint, step.model)
    step.adopt()
    arrays = _load(checkpoint, "optimizer.safetensors", state)
    if step.moments and "image_mean" not in arrays:
        raise UsageError(
            f"{checkpoint} is from before the image's target was whitened. Start a new run, with "
            "its weights: --init RUN."
        )
    if _shapes(arrays) != _shapes(_optimizer_arrays(step)):
        raise _damaged(checkpoint, "optimizer.safetensors belongs to other weights")
    _put_back(arrays, step)
    reseed(state["random_state"])
    step.scaler.update({key: mx.array(value) for key, value in state["loss_scale"].items()})
    return state


def learning_rate(checkpoint: Path) -> float:
    """The learning rate of the checkpoint's last step."""
    arrays = _load(checkpoint, "optimizer.safetensors", read_state(checkpoint))
    if (rate := arrays.get("learning_rate", mx.zeros(0))).size != 1:
        raise _damaged(checkpoint, "optimizer.safetensors has no learning rate")
    return float(np.array(rate).item())


def _load(checkpoint: Path, file_name: str, state: dict[str, Any]) -> dict[str, mx.array]:
    path = checkpoint / file_name
    if not path.is_file():
        raise _damaged(checkpoint, f"{file_name} is missing")
    if sha256(path) != state["sha256"].get(file_name):
        raise _damaged(checkpoint, f"{file_name} does not match its checksum")
    return read_safetensors(path)


def load_weights(checkpoint: Path) -> dict[str, mx.array]:
    """The weights of a checkpoint by name, after comparing the checksum."""
    return _load(checkpoint, "model.safetensors", read_state(checkpoint))


def read_safetensors(path: Path) -> dict[str, mx.array]:
    """The arrays of a safetensors file, after comparing what its header says with the file's size.

    The file may come from anywhere: MLX's reader believes the header and takes the memory. Raises
    HJEPAError for a damaged file.
    """
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > min(size - 8, LONGEST_HEADER):
            raise HJEPAError(
                f"{path} is damaged or no safetensors file: its header would take {length:,} "
                f"bytes; the file has {size:,}."
            )
        text = file.read(length)
    try:
        entries = json.loads(text)
        entries.pop("__metadata__", None)
        spans = [entry["data_offsets"] for entry in entries.values()]
        if sum(end - begin for begin, end in spans) > size:  # the same bytes many times
            raise ValueError("its arrays overlap")
        for name, entry in entries.items():
            (begin, end), shape = entry["data_offsets"], entry["shape"]
            bits = next(filter(None, BITS.fullmatch(entry["dtype"]).groups()))  # type: ignore
            right = len(shape) <= MOST_AXES and min([begin, *shape]) >= 0
            if not right or 8 * (end - begin) != int(bits) * prod(shape) or end > size - 8 - length:
                raise HJEPAError(f"{path} is damaged: {name} is cut short or has another shape.")
        return dict(mx.load(str(path)))  # type: ignore[arg-type]
    except (ValueError, LookupError, TypeError, AttributeError, RuntimeError) as error:
        raise HJEPAError(f"{path} is damaged or no safetensors file: {error!r:.300}") from None


def _damaged(checkpoint: Path, how: str) -> HJEPAError:
    return HJEPAError(
        f"Checkpoint {checkpoint} is damaged: {how}. Delete that folder to fall back to the "
        "previous checkpoint."
    )


def _kept_for_good(checkpoint: Path) -> bool:
    """Whether it is a milestone of an earlier version, or damaged: the user should see that."""
    try:
        return bool(read_state(checkpoint).get("milestone"))
    except HJEPAError:
        return True


def tidy(folder: Path, keep_last: int) -> None:
    """Name the newest checkpoint in `latest`, and delete all but the newest `keep_last`.

    One that resists, as on a network's disk, is deleted the next time.
    """
    newest, named = latest(folder), folder / "latest"
    name = newest.name.encode() if newest else b""
    if newest and not (named.is_file() and named.read_bytes() == name):
        with atomic_write(named) as file:
            file.write(name)
    for path in [path for path in complete(folder) if not _kept_for_good(path)][:-keep_last]:
        with suppress(OSError):
            os.replace(path, folder / f".{path.name}.part")  # a half of it would be no checkpoint
    sync(folder)  # before anything inside goes
    for part in folder.glob(".step-*.part"):  # also of a save that was killed
        shutil.rmtree(part, ignore_errors=True)
