"""Time and memory of exact k-NN as the bank grows, on synthetic features.

python benchmarks/knn.py
python benchmarks/knn.py --images 50000

The first: 100,000, 300,000 and 1,281,167 images of 384 dimensions.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

RESULTS = Path(__file__).parent / "results" / "knn.json"
IMAGES = (100_000, 300_000, 1_281_167)  # the last is ImageNet-1K


def measure(images: int, queries: int, dim: int) -> dict[str, float]:
    """Classify `queries` by a bank of `images`; seconds, GFLOP/s and peak resident memory."""
    import hjepa_mlx as hj
    from hjepa_mlx.eval.knn import knn_predict

    hj.backend.set_memory_limits()
    rng = np.random.default_rng(0)
    bank = rng.standard_normal((images, dim), dtype=np.float32)
    labels = rng.integers(0, 1000, images)
    asked = rng.standard_normal((queries, dim), dtype=np.float32)
    before = _peak_gb()
    knn_predict(bank[:100_000], labels[:100_000], asked[:64])  # warm-up
    began = time.perf_counter()
    knn_predict(bank, labels, asked)
    seconds = time.perf_counter() - began
    return {
        "bank_images": images,
        "queries": queries,
        "dimension": dim,
        "seconds": seconds,
        "gflops": 2e-9 * images * queries * dim / seconds,
        "peak_gb": _peak_gb(),
        "peak_gb_before": before,
    }


def _peak_gb() -> float:
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB here
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def main() -> None:
    """Measure each size in a process of its own; print, and keep the whole series."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--images", type=int, help="one size only, printed as JSON")
    parser.add_argument("--queries", type=int, default=5000)
    parser.add_argument("--dim", type=int, default=384)
    asked = parser.parse_args()
    if asked.images:
        print(json.dumps(measure(asked.images, asked.queries, asked.dim)))
        return
    rows = []
    for images in IMAGES:
        command = [sys.executable, __file__, "--images", str(images)]
        command += ["--queries", str(asked.queries), "--dim", str(asked.dim)]
        rows.append(json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout))
        print(
            "{bank_images:>9,} images: {seconds:.1f} s, {gflops:.0f} GFLOP/s, peak {peak_gb:.2f} "
            "GB ({peak_gb_before:.2f} before)".format(**rows[-1]),
            flush=True,
        )
    from hjepa_mlx.doctor import examine
    from hjepa_mlx.files import write_json

    write_json(RESULTS, {"machine": examine(), "rows": rows})


if __name__ == "__main__":
    main()
