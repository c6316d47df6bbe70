"""What the tests share: a small real config, and MLX imported the way the package wants it."""

import os
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from commands import FILES, hjepa, pictures
from hypothesis import settings

os.environ.setdefault("MLX_ENABLE_TF32", "0")  # M5 multiplies float32 less exactly, if it may
import hjepa_mlx  # noqa: F401  OpenBLAS has to be loaded before any test imports MLX
from hjepa_mlx.config import Config
from hjepa_mlx.eval import features
from hjepa_mlx.recipes import parse, resolve

settings.register_profile("untimed", deadline=None)  # a busy machine is no failure
settings.load_profile("untimed")

TINY: dict[str, Any] = {
    "name": "tiny",
    "precision": "float32",
    "compile": False,
    "data": {"image_size": 32, "batch_size": 4},
    "model": {
        "size": "custom",
        "dim": 64,
        "depth": 3,
        "heads": 2,
        "patch_size": 4,
        "levels": 3,
        "predictor_dim": 64,
        "predictor_depth": 2,
        "predictor_context": "tokens",
    },
    "loss": {"vicreg": 0.0},
    "run": {"eval_every_epochs": 0},
}


@pytest.fixture(scope="session", autouse=True)
def large_disk() -> Iterator[None]:
    """A terabyte is free: the stand-ins of data sets are asked for the room of the real ones."""
    with pytest.MonkeyPatch.context() as patch:
        usage = shutil.disk_usage("/")._replace(free=10**12)
        patch.setattr(shutil, "disk_usage", lambda _: usage)
        yield


@pytest.fixture(scope="session")
def tiny_config() -> Callable[..., Config]:
    """tiny_config(masks={"targets": 2}) is the tiny config with that changed, resolved."""

    def build(**changes: Any) -> Config:
        tree = TINY | changes
        for key, value in changes.items():
            if isinstance(value, dict):
                tree[key] = TINY.get(key, {}) | value
        model, loss = tree["model"], tree["loss"]  # targets at every level, in cells of its own
        pools = [2**level for level in range(model["levels"])]
        tree["model"] = {"level_pool": pools} | model
        tree["loss"] = {"level_weights": [1.0, 0.7, 0.5, 0.35][: len(pools)]} | loss
        return resolve(parse(tree))

    return build


@pytest.fixture(scope="session")
def prepared(tmp_path_factory):
    """A folder with configs, images and a finished run that keeps its last three checkpoints."""
    folder = tmp_path_factory.mktemp("prepared")
    for name, count in {"pictures": 40, "more": 50, "few": 12, "nine": 9, "one": 1}.items():
        pictures(folder / name, count)
    for name, content in FILES.items():
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    (folder / "unreadable").mkdir()
    for number in range(30):
        (folder / "unreadable" / f"{number}.jpg").write_text("Not a picture.")
    ended = hjepa(folder, "train tiny.yaml --run-dir run")
    assert ended.returncode == 0, ended.stderr
    return folder


@pytest.fixture(scope="module")
def here(prepared, tmp_path_factory):
    """A copy of that folder, which may be changed; tests work in it, and evaluate few pixels."""
    folder = tmp_path_factory.mktemp("copy") / "here"
    shutil.copytree(prepared, folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(features, "PIXEL_SIDE", 8)
        yield folder
