"""Apple chips that one may not have: peak and bandwidth, for projections.

TFLOP/s of float32 and GB/s of the largest GPU of each name. M1 and M2: as Apple states them (press
releases of November 2020, October 2021, March and June 2022, January and June 2023). M3 and M4:
bandwidth as Apple states it; TFLOP/s from cores × 128 lanes × 2 × clock (1.398 and 1.578 GHz, as
hmc-tech.com lists for these GPUs). None of it was measured by this project.
"""

from __future__ import annotations

from dataclasses import dataclass

from hjepa_mlx.errors import UsageError, did_you_mean

# Of the stated float32 peak, what MLX's matmul reaches: 7.3 of 10.4 in published M1 Max timings
MATMUL_SHARE = 0.7


@dataclass(frozen=True)
class Chip:
    """A chip's GPU: stated float32 peak and memory bandwidth."""

    title: str
    tflops: float
    bandwidth_gbs: float

    @property
    def matmul_tflops(self) -> float:
        """TFLOP/s that MLX's matmul may reach; projected."""
        return MATMUL_SHARE * self.tflops


CHIPS = {
    title.lower().replace(" ", "-"): Chip(title, tflops, bandwidth)
    for title, tflops, bandwidth in (
        ("M1", 2.6, 68),
        ("M1 Pro", 5.2, 200),
        ("M1 Max", 10.4, 400),
        ("M1 Ultra", 21.0, 800),
        ("M2", 3.6, 100),
        ("M2 Pro", 6.8, 200),
        ("M2 Max", 13.6, 400),
        ("M2 Ultra", 27.2, 800),
        ("M3", 3.6, 100),
        ("M3 Pro", 6.4, 150),
        ("M3 Max", 14.3, 400),
        ("M4", 4.0, 120),
        ("M4 Pro", 8.1, 273),
        ("M4 Max", 16.2, 546),
    )
}


def look_up(name: str) -> Chip:
    """The chip of this name, as in m1-max; UsageError with the nearest name when there is none."""
    key = name.lower().replace(" ", "-").replace("_", "-").removeprefix("apple-")
    if key not in CHIPS:
        hint = did_you_mean(key, CHIPS)
        raise UsageError(f"No chip '{name}'.{hint} There are: {', '.join(CHIPS)}.")
    return CHIPS[key]
