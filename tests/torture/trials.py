"""What the trials share: commands run under the tracer, small inputs, and results compared."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torture.run import once

HERE = Path(__file__).parent
TIMEOUT = 600  # seconds: a busy machine is slow
TIMING = ("images_per_second", "peak_memory_gb")
RECIPE = """
name: tiny
precision: float32
compile: false
data: {name: folder, dir: pictures, image_size: 16, batch_size: 4, crop_scale: [0.3, 1.0]}
model: {size: custom, dim: 16, depth: 2, levels: 2, heads: 1, patch_size: 4, predictor_dim: 16,
  predictor_depth: 1}
optim: {epochs: 2, warmup_epochs: 0.5}
finetune: {epochs: 2}
run: {log_every: 2, checkpoint_minutes: 1.0e-9, final_eval: false, eval_every_epochs: 1}
"""  # 10 steps


def environment(**traced: Any) -> dict[str, str]:
    """Of a process that traced.py disturbs like this."""
    places = os.pathsep.join([str(HERE.parent.parent), str(HERE.parent)])
    here = {"PYTHONPATH": places, "TRACED": json.dumps(traced)}
    return {**os.environ, "OPENBLAS_NUM_THREADS": "1", **here}


def command(*arguments: str) -> list[str]:
    """`hjepa-mlx ARGUMENTS`, as a process of its own."""
    return [sys.executable, "-m", "torture.traced", *arguments]


def start(folder: Path, *arguments: str, root: str = ".", **traced: Any) -> subprocess.Popen:
    """Begin `hjepa-mlx ARGUMENTS` in `folder`."""
    return subprocess.Popen(
        command(*arguments),
        cwd=folder,
        env=environment(root=root, **traced),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=_by_default,
    )


def _by_default() -> None:
    """Signals mean what they usually do, though this may run under nohup."""
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)


def ended(process: subprocess.Popen) -> subprocess.CompletedProcess:
    """The process at its end, with what it said on stderr."""
    said = process.communicate(timeout=TIMEOUT)[1]
    return subprocess.CompletedProcess(process.args, process.returncode, "", said)


def hjepa(folder: Path, *arguments: str, **traced: Any) -> subprocess.CompletedProcess:
    """Run `hjepa-mlx ARGUMENTS` in `folder` to its end."""
    with start(folder, *arguments, **traced) as process:
        try:
            return ended(process)
        finally:
            process.kill()


def succeed(folder: Path, *arguments: str, **traced: Any) -> str:
    """The same; it has to end well. What it said."""
    ended = hjepa(folder, *arguments, **traced)
    assert ended.returncode == 0, f"{arguments} ended with {ended.returncode}: {ended.stderr}"
    return ended.stderr


def assert_one_line(ended: Any, *parts: str) -> None:
    """It ended with status 1 or 2 and one foreseen line that says all of `parts`."""
    said = ended.stderr
    assert ended.returncode in (1, 2), f"It ended with {ended.returncode}: {said}"
    last = said.splitlines()[-1]
    assert "Traceback" not in said, said
    assert last.startswith("hjepa-mlx: "), said
    assert "unexpected" not in last, said
    for part in parts:
        assert part in last, f"{part!r} is not in: {last}"


def wait_for(condition: Callable[[], object]) -> None:
    end = time.monotonic() + TIMEOUT
    while not condition():
        assert time.monotonic() < end, "It took too long."
        time.sleep(0.01)


def inputs(folder: Path) -> None:
    """Put a recipe and pictures there."""

    def make(place: Path) -> None:
        from commands import pictures

        pictures(place / "pictures", 24)
        (place / "tiny.yaml").write_text(RECIPE)

    shutil.copytree(once("inputs", make), folder, dirs_exist_ok=True)


TRAIN = ("train", "tiny.yaml", "--run-dir", "run")


def with_run(folder: Path) -> None:
    """Put them there, and the run of them."""

    def make(place: Path) -> None:
        inputs(place)
        succeed(place, *TRAIN)

    shutil.copytree(once("trained", make), folder, dirs_exist_ok=True)


def log_of(folder: Path) -> list[tuple]:
    return pickle.loads((folder / "log").read_bytes())


def tensors(path: Path) -> dict[str, tuple]:
    """The arrays of a safetensors file: type, shape and bytes."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header, data = json.loads(content[8 : 8 + length]), content[8 + length :]
    header.pop("__metadata__", None)
    return {
        name: (entry["dtype"], entry["shape"], data[slice(*entry["data_offsets"])])
        for name, entry in header.items()
    }


def rows(run: Path) -> list[dict[str, Any]]:
    """What a run logged, without how long it took."""
    made = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in TIMING} for row in made]


def result(place: Path, root: str) -> dict[str, Any]:
    """All files of `place`/`root` as they may be compared: without clocks, locks and `place`."""
    folder, found = place / root, dict[str, Any]()
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_dir() or path.name == ".lock":
            continue
        if path.name == "metrics.jsonl":
            found[name] = rows(path.parent)
        elif path.suffix == ".safetensors":
            found[name] = tensors(path)
        elif path.name in ("state.json", "images.json"):
            content = json.loads(path.read_text())
            found[name] = {k: v for k, v in content.items() if k not in ("sha256", "root")}
        else:
            found[name] = path.read_bytes().replace(os.fsencode(place), b"PLACE")
    return found


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Two results are the same, bit for bit."""
    only = sorted(found.keys() ^ expected.keys())
    assert not only, f"There is only on one side: {only}"
    differing = [name for name in expected if found[name] != expected[name]]
    assert not differing, f"These differ: {differing}" + _first(found, expected, differing[0])


def _first(found: dict[str, Any], expected: dict[str, Any], name: str) -> str:
    one, other = found[name], expected[name]
    if isinstance(one, dict):
        return f", in {[k for k in one.keys() | other.keys() if one.get(k) != other.get(k)][:5]}"
    if isinstance(one, list):
        return f": {len(one)} and {len(other)} rows"
    return f": {one[:80]!r} and {other[:80]!r}"
