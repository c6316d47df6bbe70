"""Time the PyTorch step of `ijepa_torch.py` on random images, beside torch's own matmul.

OMP_WAIT_POLICY=PASSIVE .venv-parity/bin/python benchmarks/peers/time_torch.py --predictor-dim 384

GFLOP are what FlopCounterMode counts (matmuls; a multiply-add is 2) over a step of one image with
the masks of each timed step: their mean. I-JEPA cuts all contexts to the batch's shortest, so a
small batch has longer ones: 68 tokens on average in a batch of 16, 54 in one of 128. --mask-batch
128 draws masks for 128 images and uses the first ones.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path

import numpy as np
import torch
from ijepa_torch import Step, draw_masks
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

MATMUL_SIDE = 2048


def measure(
    step: Step, batch: int, steps: int, warmup: int, mask_batch: int = 0, seed: int = 0
) -> dict[str, float]:
    """Images per second by the median of `steps`, GFLOP per image, share of torch's matmul.

    mask_batch: as many images the masks are drawn for, if more than `batch`; seed: of the masks.
    """
    torch.set_num_threads(_cores())
    side, rng = step.grid * step.patch, np.random.default_rng(seed)
    images = torch.from_numpy(rng.integers(0, 256, (batch, side, side, 3), np.uint8))
    drawn = [draw_masks(rng, max(batch, mask_batch), step.grid) for _ in range(warmup + steps)]
    masks = [(context[:batch], targets[:batch]) for context, targets in drawn]
    timed = masks[warmup:]
    gflop = float(np.mean([_gflop(step, images[:1], c[:1], t[:1]) for c, t in timed]))
    seconds = []
    for context, targets in masks:
        start = time.perf_counter()
        step(images, context, targets)
        seconds.append(time.perf_counter() - start)
    rate, peak = batch / float(np.median(seconds[warmup:])), matmul_gflops()
    return {
        "images_per_second": rate,
        "gflop_per_image": gflop,
        "matmul_gflops": peak,
        "mfu_percent": 100 * rate * gflop / peak,
        "context_tokens": float(np.mean([c.shape[1] for c, _ in timed])),
        "target_tokens": float(np.mean([t[0].numel() for _, t in timed])),
        "threads": torch.get_num_threads(),
    }


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _gflop(step: Step, *inputs: torch.Tensor) -> float:
    # the counter does not know the CPU's fused attention: here it is matmuls
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        step(*inputs)
    return counter.get_total_flops() / len(inputs[0]) / 1e9


def matmul_gflops() -> float:
    """GFLOP/s of torch's float32 matmul, the best of five after one."""
    a, seconds = torch.randn(MATMUL_SIDE, MATMUL_SIDE), []
    for _ in range(6):
        start = time.perf_counter()
        a @ a
        seconds.append(time.perf_counter() - start)
    return 2e-9 * MATMUL_SIDE**3 / min(seconds[1:])


def main() -> None:
    """Write or print the figures as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--predictor-dim", type=int, default=192)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--mask-batch", type=int, default=0, help="images the masks are drawn for")
    parser.add_argument("--seed", type=int, default=0, help="of the masks")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    asked = parser.parse_args()
    step = Step(predictor_dim=asked.predictor_dim)
    settings = (asked.batch, asked.steps, asked.warmup, asked.mask_batch, asked.seed)
    found = measure(step, *settings)
    figures = json.dumps(found, indent=1)
    if asked.out:
        asked.out.write_text(figures + "\n")
    else:
        print(figures)


if __name__ == "__main__":
    main()
