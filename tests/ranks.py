"""Ranks as processes of this machine, on free ports; as a script, what each of them does."""

import hashlib
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
from rich.console import Console

import hjepa_mlx as hj
from hjepa_mlx import world
from hjepa_mlx.data.pipeline import Skipped, training_batches
from hjepa_mlx.masks import MaskSampler
from hjepa_mlx.recipes import parse
from hjepa_mlx.state import setup
from hjepa_mlx.train import fit

TINY = {
    "name": "tiny", "precision": "float32", "compile": False,
    "data": {"name": "demo", "image_size": 32, "batch_size": 12, "limit": 120, "workers": 1},
    "model": {"size": "custom", "dim": 64, "depth": 2, "heads": 1, "levels": 2,
              "level_pool": [1, 2], "patch_size": 4, "predictor_dim": 64, "predictor_depth": 1},
    "optim": {"epochs": 1, "warmup_epochs": 0.2},
    "run": {"log_every": 1, "eval_every_epochs": 0, "final_eval": False},
}  # fmt: skip
RUNS = {  # 10 steps each; 20 the compiled one, the only one of three ranks
    "plain": {"loss": {"vicreg": 0.0}},
    "vicreg": {"loss": {"vicreg": 1.0}, "model": {"level_pool": [1, "image"]},
               "views": {"count": 2, "colour": 0.5}},
    "sigreg": {"loss": {"vicreg": 0.2, "sigreg": 0.5}, "masks": {"per_image": 2},
               "optim": {"epochs": 2, "warmup_epochs": 0.2}, "compile": True},
    "accumulate": {"optim": {"accumulate": 2, "epochs": 2, "warmup_epochs": 0.2}},
    "progressive": {"data": {"progressive": [[16, 0.5]]},
                    "model": {"levels": 1, "level_pool": [1]}},
    "float16": {"precision": "float16"},
}  # fmt: skip


def config(folder: Path, **changes) -> hj.Config:
    tree = TINY | changes
    for key, value in changes.items():
        if isinstance(value, dict):
            tree[key] = TINY.get(key, {}) | value
    own = parse(tree)
    own.run.dir = str(folder)
    return own


def start(count: int, folder: Path, *commands: list[str]) -> list[subprocess.Popen]:
    """Start ranks that run the command, or one of the commands each; or one process without."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    hosts = [[f"127.0.0.1:{one.getsockname()[1]}"] for one in sockets]
    for one in sockets:
        one.close()
    (folder / "hosts.json").write_text(json.dumps(hosts))
    shared = {"OPENBLAS_NUM_THREADS": "1"}
    if count > 1:
        shared["MLX_HOSTFILE"] = str(folder / "hosts.json")
    how = {"cwd": folder, "stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    return [
        subprocess.Popen(
            [sys.executable, *commands[number % len(commands)]],
            env=os.environ | shared | {"MLX_RANK": str(number)},
            **how,
        )
        for number in range(count)
    ]


def end(processes: list[subprocess.Popen], seconds: float = 120) -> list[tuple[int, list[str]]]:
    """Status of each rank and the lines it said, without MLX's own; kills those that hang."""
    try:
        said = [process.communicate(timeout=seconds)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    lines = [[line for line in text.splitlines() if line[:1] not in ("[", "")] for text in said]
    return [(process.returncode, own) for process, own in zip(processes, lines, strict=True)]


def train_all(folder: Path) -> None:
    """Train every run; leave rank 0's weights, and a hash of each rank's state."""
    from mlx.utils import tree_flatten  # here: OpenBLAS comes before MLX

    for name, changes in RUNS.items():
        if world.size() > 2 and name != "sigreg":
            continue
        state = setup(config(folder / name, **changes), False, Console(quiet=True))
        if name == "float16":
            state.step.scaler["scale"] *= 2.0**12  # so that the first steps overflow
        fit(state)
        arrays = sorted((k, np.array(v)) for k, v in dict(tree_flatten(state.step.state)).items())
        digest = hashlib.sha256(b"".join(array.tobytes() for _, array in arrays)).hexdigest()
        (folder / f"{name}-{world.rank()}.sha256").write_text(digest)


def read_all(folder: Path, images: Path) -> None:
    """Read two passes over images; leave this rank's rows of batches and masks."""
    data = {"name": "folder", "dir": str(images), "batch_size": 6, "limit": None}
    own, skipped = config(folder, data=data), Skipped()
    batches = training_batches(hj.open_source(own.data, "pretrain"), own, skipped=skipped)
    read = [next(batches) for _ in range(12)]
    masks = MaskSampler(own)(3, 12).rows(world.rows(12))
    np.savez(
        folder / f"rows-{world.rank()}.npz",
        images=np.stack([batch.images for batch in read]),
        positions=[batch.next for batch in read],
        skipped=list(skipped),
        **{name: getattr(masks, name) for name in ("context", "targets", "centres")},
    )


if __name__ == "__main__":
    train_all(Path(sys.argv[1]))
    read_all(Path(sys.argv[1]), Path(sys.argv[2]))
