"""Hostile weights, states, configs, manifests, indices and lists, handed to who reads them."""

import json
import os
import pickle
import random
import struct
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml
from hostile import EXTREME, mutated, mutated_tree, nested, npy, safetensors
from materials import OF_RUNS, PREDICT, TRAIN, change, change_json, handed, place_in
from rules import find_spec

from hjepa_mlx.files import sha256
from hjepa_mlx.recipes import config_folder

OF_EXPORTS = (
    "train tiny.yaml --dry-run --init export",
    "train tiny.yaml --dry-run --init export/model.safetensors",
    "train tiny.yaml --run-dir out/run --set optim.epochs=1 --init export",
    "embed export pictures --out out/f.npz",
    "export export --to safetensors --out out/e",
)


def _header(rng: random.Random, data: bytes) -> bytes:
    """A safetensors file with a hostile header."""
    length = struct.unpack("<Q", data[:8])[0]
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    names = [name for name in header if name != "__metadata__"]
    name, kind = rng.choice(names), rng.randrange(8)
    if kind == 0:
        return safetensors(mutated_tree(rng, header), body)
    if kind == 1:
        header[name]["data_offsets"] = [rng.choice((-1, *EXTREME)), rng.choice(EXTREME)]
    elif kind == 2:
        header[name]["shape"] = [1 << 31] * 1_000_000
    elif kind == 3:  # many times the same bytes
        whole = {"dtype": "U8", "shape": [len(body)], "data_offsets": [0, len(body)]}
        header |= {f"target_encoder.{number}": whole for number in range(50_000)}
    elif kind == 4:
        header[rng.choice(("\0", "../x", "a" * 10**6, "\ud800", "é"))] = header.pop(name)
    elif kind == 5:
        return safetensors(nested(rng.choice((10**4, 10**6))), body)
    elif kind == 6:
        return safetensors(b'{"a":[' + b"[]," * 20_000_000 + b"[]]}", body)
    return safetensors(header, body, rng.choice((None, *EXTREME)))


def weights(rng: random.Random, folder: Path) -> str:
    """Safetensors of another code, or its settings."""
    place = place_in(folder)
    path = place / "export" / rng.choice(("model.safetensors",) * 3 + ("config.json",))
    if path.suffix == ".json":
        path.write_text('{"num_attention_heads": 1, "pretrained_cfg": {"mean": [0.5, 0.5, 0.5]}}')
        change_json(rng, path)
    else:
        data = path.read_bytes()
        path.write_bytes(_header(rng, data) if rng.random() < 0.6 else mutated(rng, data))
    return f"{path.name}: {handed(rng, place, OF_EXPORTS)}"


class _Payload:
    def __init__(self, *call: Any) -> None:
        self.call = call

    def __reduce__(self) -> tuple:
        return self.call[0], self.call[1:]


def pickles(rng: random.Random, folder: Path) -> str:
    """Pickles with a payload, of torch.save where torch is here; .npy files that are pickles."""
    place, mark = place_in(folder, "cifar10:prepared/cifar10"), str(folder / "owned")
    payload = rng.choice(
        (_Payload(os.system, f"touch {mark}"), _Payload(os.mkdir, mark), _Payload(open, mark, "w"),
         _Payload(eval, f"open({mark!r}, 'w')"), _Payload(bytearray, 10**11))
    )  # fmt: skip
    data = pickle.dumps({"state_dict": payload, "a": [payload]}, rng.choice((0, 2, 4)))
    kind = rng.randrange(5)
    if kind < 2 and find_spec("torch"):
        import torch

        torch.save(_of_torch(rng, payload), path := place / "w.pth")
        if rng.random() < 0.5:
            change(rng, path)
        return "torch.save: " + handed(rng, place, ("train tiny.yaml --dry-run --init w.pth",))
    if kind < 3:
        name = f"w{rng.choice(('.pth', '.pt', '.bin', '.tar', '.safetensors'))}"
        (place / name).write_bytes(data)
        return f"{name}: " + handed(rng, place, (f"train tiny.yaml --dry-run --init {name}",))
    path = rng.choice(sorted((place / "data/cifar10").glob("*.npy")))
    body = npy("(40,)", "|O", data) if kind == 3 else data
    path.write_bytes(body)
    commands = (
        "datasets verify cifar10 --data-dir data",
        f"{TRAIN} --set data.name=cifar10 --data-dir data",
    )
    return f"{path.name}: " + handed(rng, place, commands)


def _of_torch(rng: random.Random, payload: Any) -> Any:
    import torch

    one = torch.zeros(1)
    return rng.choice(
        ({"w": payload}, payload, {"blocks.0.w": one.expand(10**10)}, {"w": torch.zeros(3,
         3).to_sparse()},
         {"w": one.as_strided((10**6, 10**6), (0, 0))}, {"model": {"w": one.to(torch.complex64)}},
         [one], {"state_dict": [one]}, {1: one}, {"w": torch.full((3,), float("nan"))},
         {"w": torch.zeros(2**20, dtype=torch.float16)}, {"target_encoder": {"blocks.0.a": one}})
    )  # fmt: skip


RECIPES = [path.read_text() for path in sorted(config_folder().rglob("*.yaml"))]


def _doubling(each: str) -> str:
    """Ten values, each of which holds the one before nine times."""
    last = [", ".join([f"*x{n}"] * 9) for n in range(9)]
    rows = [f"x{n}: &x{n} {each.format(all, n)}\n" for n, all in enumerate(last, 1)]
    return "x0: &x0 {a: 1}\n" + "".join(rows)


YAML_BOMBS = (
    _doubling("[{}]"), _doubling("{{<<: [{}]}}"), _doubling("{{<<: [{}], k{}: 1}}"),
    "seed: &a [*a]", "data: &a {dir: *a}", "? {a: b}\n: c", "? [a]\n: c",
    "!!python/object/apply:os.system ['touch owned']",
    "name: !!binary aGFsbG8=", "seed: !!set {1, 2}", "seed: 0o17", "seed: 1:30:30",
    "seed: 2024-01-01", "--- 1\n--- 2",
    "\ufeffseed: 1", "seed: \0", "[" * 20_000, "{a: " * 20_000, "- " * 20_000,
    "a: " + "9" * 100_000, "seed: " + "9" * 5_000,
    "name: " + "x" * 10**7, "data: {dir: /dev/zero}", "%YAML 9.9\n---\nseed: 1", "seed: .inf",
    "name: ~\nseed: ~\ndata: ~",
    "data: {name: folder, dir: pictures, labels: /dev/zero.csv}", "model: {init: /dev/zero}",
    "a" * 10**6, "#" * 10**7,
)  # fmt: skip


def config(rng: random.Random, folder: Path) -> str:
    """A recipe of one's own, handed to `train --dry-run`."""
    place, kind = place_in(folder), rng.randrange(10)
    text = rng.choice(RECIPES)
    if kind < 6:
        tree = yaml.safe_load(text)
        if rng.random() < 0.5:
            tree |= {"data": {**tree.get("data", {}), "name": "folder", "dir": "pictures"}}
        with suppress(RecursionError):  # too deep to be written
            text = yaml.safe_dump(mutated_tree(rng, tree), allow_unicode=rng.random() < 0.5)
    elif kind < 8:
        text = mutated(rng, text.encode()).decode("latin-1")
    else:
        text = rng.choice(YAML_BOMBS)
    (place / "other.yaml").write_bytes(text.encode("utf-8", "surrogatepass"))
    return f"{text[:30]!r}: " + handed(rng, place, ("train other.yaml --dry-run",))


def settings(rng: random.Random, folder: Path) -> str:
    """The config.yaml of a run, an export or a classifier, as it may come with others' weights."""
    place = place_in(folder)
    which = rng.choice(("run", "export", "classifier"))
    path = place / which / "config.yaml"
    if rng.random() < 0.7:
        tree = mutated_tree(rng, yaml.safe_load(path.read_text()))
        with suppress(RecursionError):  # too deep to be written
            path.write_text(yaml.safe_dump(tree))
    elif rng.random() < 0.5:
        change(rng, path)
    else:
        path.write_text(rng.choice(YAML_BOMBS), errors="surrogatepass")
    commands = {"run": OF_RUNS, "export": OF_EXPORTS, "classifier": (PREDICT,)}[which]
    return f"{which}: " + handed(rng, place, commands)


def state(rng: random.Random, folder: Path) -> str:
    """A checkpoint, whose checksums are right again after the change."""
    place = place_in(folder)
    newest = sorted((place / "run/checkpoints").glob("step-*"))[-1]
    about = json.loads((newest / "state.json").read_bytes())
    kind = rng.randrange(4)
    if kind < 2:
        change_json(rng, newest / "state.json")
    else:
        path = newest / f"{rng.choice(('model', 'optimizer'))}.safetensors"
        data = path.read_bytes()
        path.write_bytes(_header(rng, data) if kind == 2 else mutated(rng, data))
        about["sha256"][path.name] = sha256(path)
        (newest / "state.json").write_text(json.dumps(about))
    return handed(rng, place, OF_RUNS)


def records(rng: random.Random, folder: Path) -> str:
    """The record of a run's images, and the files of a classifier."""
    place = place_in(folder)
    names = ("run/images.json", "classifier/classifier.json", "classifier/model.safetensors")
    path = place / rng.choice((*names, "run/checkpoints/latest"))
    if path.suffix == ".json":
        change_json(rng, path)
    elif path.suffix == ".safetensors":
        data = path.read_bytes()
        path.write_bytes(_header(rng, data) if rng.random() < 0.5 else mutated(rng, data))
        about = json.loads((path.parent / "classifier.json").read_bytes())
        about["sha256"] = sha256(path)
        (path.parent / "classifier.json").write_text(json.dumps(about))
    else:
        change(rng, path)
    commands = (PREDICT,) if path.parent.name == "classifier" else OF_RUNS
    return f"{path.name}: " + handed(rng, place, commands)


def prepared(rng: random.Random, folder: Path) -> str:
    """A prepared data set: its manifest, indices, labels, pixels and shards."""
    name = rng.choice(("cifar10", "imagenet100"))
    place = place_in(folder, f"{name}:prepared/{name}")
    root = place / "data" / name
    path = rng.choice([*sorted(root.iterdir()), *[root / "dataset.json"] * 2])
    if path.suffix == ".json" and rng.random() < 0.3:
        made = json.loads(path.read_text())
        split = made["splits"][rng.choice([*made["splits"]])]
        split["files"][0]["file"] = rng.choice(
            ("../../../outside.txt", str(folder / "outside.txt"), "/dev/zero", "pipe", "", ".",
             "a\0b", 5)
        )  # fmt: skip
        os.mkfifo(root / "pipe")
        path.write_text(json.dumps(made))
    elif path.suffix == ".json":
        change_json(rng, path)
    elif path.suffix == ".npy" and rng.random() < 0.7:
        shape = rng.choice(
            ("()", "(0,)", "(-1,)", "(40,)", "(1152921504606846976,)",
             "(4294967296, 4294967296, 1, 1)",
             "(1000000000000, 0, 0, 3)", "(40, 32, 32, 3)", "(-2, -32, 32, 3)", "(9, 32, 32, 2)",
             "(" * 4000)
        )  # fmt: skip
        descr = rng.choice(("|u1", "<i8", "|O", "<f8", "|V0", "<U1000000", "|S0"))
        path.write_bytes(npy(shape, descr, rng.choice((b"", bytes(320), bytes(122_880)))))
    elif path.name.startswith(f"{path.stem.split('-')[0]}-0") and path.suffix == ".npy":
        import numpy as np

        from hjepa_mlx.data.prepared import ROW

        rows = np.load(path)
        rows[rng.randrange(len(rows))][rng.choice(ROW.names)] = rng.choice(
            (-1, -(1 << 31), (1 << 31) - 1)
        )
        np.save(path, rows)
    elif rng.random() < 0.2:
        path.unlink()
        rng.choice((os.mkfifo, os.mkdir, lambda p: os.symlink("/dev/zero", p)))(path)
    else:
        change(rng, path)
    commands = (
        f"datasets verify {name} --data-dir data",
        f"{TRAIN} --set data.name={name} --data-dir data",
        f"eval run --data {name} --data-dir data",
        f"datasets prepare {name} --data-dir data",
        "datasets list --data-dir data",
    )
    return f"{name} {path.name}: " + handed(rng, place, commands)


FILES = {
    "weights": weights,
    "pickles": pickles,
    "config": config,
    "settings": settings,
    "state": state,
    "records": records,
    "prepared": prepared,
}
