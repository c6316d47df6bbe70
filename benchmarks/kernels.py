"""How many kernels does a training step launch, by kind?

python benchmarks/kernels.py imagenet100 --set precision=bfloat16

Counts the primitives of the graph that MLX builds for a step that is not compiled, without running
it, in the forms for a GPU. Views (reshape, transpose, slice, …) launch nothing and are left out; a
concatenation counts once for each array that it copies. Where MLX has no GPU, its graph spells out
LayerNorm and attention as many primitives each; on a GPU they are one, so the numbers are for
comparing versions on one kind of machine.
"""

from __future__ import annotations

import argparse
import re
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

import hjepa_mlx as hj
from hjepa_mlx import backend
from hjepa_mlx.files import write_json
from hjepa_mlx.step import as_arrays
from hjepa_mlx.timing import VALUES, Rig

import mlx.core as mx  # isort: skip  (after hjepa_mlx, which loads OpenBLAS)
from mlx.utils import tree_flatten, tree_map  # isort: skip

VIEWS = {
    "Broadcast", "BroadcastAxes", "Copy", "CustomTransforms", "Depends", "ExpandDims", "Flatten",
    "Reshape", "Slice", "Split", "Squeeze", "StopGradient", "Transpose", "Unflatten",
}  # fmt: skip


def kernels(config: hj.Config) -> dict[str, Counter[str]]:
    """Launches of a step's two halves, by kind of primitive."""
    config = config.model_copy(update={"compile": False}, deep=True)
    rig = Rig(config)
    step = rig.step
    mx.eval(step.state, step.model.parameters())
    metrics, gradients = step.compute_gradients(rig.images, *as_arrays(rig.masks(0)))
    found = {"gradients": launches(metrics, gradients)}
    zeros = tree_map(lambda gradient: mx.zeros(gradient.shape), gradients)
    mx.eval(zeros)
    metrics = step.apply_gradients(zeros, *(mx.array(value) for value in VALUES))
    found["update"] = launches(metrics, step.state)
    return found


def launches(*trees: Any) -> Counter[str]:
    """Primitives that compute the arrays of these trees."""
    arrays = [array for array in dict(tree_flatten(trees)).values() if isinstance(array, mx.array)]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "graph.dot"
        mx.export_to_dot(str(file), *arrays)
        graph = file.read_text()
    kinds = dict(re.findall(r'(\d+) \[label ="(\w+)', graph))
    found = Counter(kind for kind in kinds.values() if kind not in VIEWS)
    joined = {node for node, kind in kinds.items() if kind == "Concatenate"}
    found["Concatenate"] = sum(node in joined for node in re.findall(r"-> (\d+)", graph))
    return found


def main() -> None:
    """Print the counts; --json FILE keeps them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("recipe")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE")
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    backend.on_gpu = lambda: True  # for a GPU's forms; nothing is computed
    config = hj.load_config(asked.recipe, ["data.batch_size=2", *asked.set])
    found = kernels(config)
    title = f"{asked.recipe}, {backend.precision(config)}, not compiled"
    table = Table("primitive", *found, title=title)
    for kind, _ in sum(found.values(), Counter()).most_common(20):
        table.add_row(kind, *(f"{counts[kind]:,}" for counts in found.values()))
    table.add_row("all", *(f"{counts.total():,}" for counts in found.values()))
    Console().print(table)
    if asked.json:
        write_json(asked.json, found)


if __name__ == "__main__":
    main()
