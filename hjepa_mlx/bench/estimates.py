"""Hours: what a speed means for every data set, beside its promise; here, or on another chip."""

from __future__ import annotations

from typing import Any

from hjepa_mlx.config import Config
from hjepa_mlx.costs import average_gflop, costs
from hjepa_mlx.data.catalog import CATALOG
from hjepa_mlx.errors import UsageError, check_choice
from hjepa_mlx.models.hjepa import HJEPA
from hjepa_mlx.recipes import load_config

NIGHT_HOURS = 10
EPOCHS = 100
SHARES = (0.45, 0.60, 0.75)  # of the matmul peak, for projections
LOW = 0.57  # of the image size: the first stage of a suggested data.progressive
# Of the stated peak, the part that MLX's matmul reaches: 7.3 of 10.4 in published M1 Max timings
MATMUL_SHARE = 0.7
# The recipe of every data set, and the faster one
RECIPES = [*(name.replace("+", "_") for name in CATALOG), "imagenet100_fast"]
# TFLOP/s of float32 and GB/s of the largest GPU of each name. M1 and M2: as Apple states them
# (press releases of November 2020, October 2021, March and June 2022, January and June 2023). M3
# and M4: bandwidth as Apple states it; TFLOP/s from cores × 128 lanes × 2 × clock (1.398 and 1.578
# GHz, as hmc-tech.com lists for these GPUs). None of it was measured by this project.
STATED = {
    "M1": {"": (2.6, 68), " Pro": (5.2, 200), " Max": (10.4, 400), " Ultra": (21.0, 800)},
    "M2": {"": (3.6, 100), " Pro": (6.8, 200), " Max": (13.6, 400), " Ultra": (27.2, 800)},
    "M3": {"": (3.6, 100), " Pro": (6.4, 150), " Max": (14.3, 400)},
    "M4": {"": (4.0, 120), " Pro": (8.1, 273), " Max": (16.2, 546)},
}


def chip_named(name: str) -> dict[str, Any]:
    """Name and speeds of a chip, as in m1-max; UsageError with the nearest name if unknown."""
    chips = {m + kind: speed for m, kinds in STATED.items() for kind, speed in kinds.items()}
    keys = {title.lower().replace(" ", "-"): title for title in chips}
    key = name.lower().replace(" ", "-").replace("_", "-").removeprefix("apple-")
    check_choice("chip", key, keys)
    tflops, bandwidth = chips[keys[key]]
    return {
        "chip": keys[key],
        "stated_tflops": tflops,
        "matmul_tflops": MATMUL_SHARE * tflops,
        "bandwidth_gbs": bandwidth,
    }


def images_per_epoch(config: Config) -> int:
    """Training images of the config's data set, which need not be here."""
    images = CATALOG[config.data.name].images
    return min(images, config.data.limit or images)


def estimate(name: str, config: Config, rate: float) -> dict[str, Any]:
    """A row of the estimates: what EPOCHS of a recipe take at `rate` images per second."""
    row, images = CATALOG[config.data.name], images_per_epoch(config)
    hours = EPOCHS * images / rate / 3600
    promised = row.promise.hours if row.promise else None
    return {
        "dataset": row.name,
        "recipe": name,
        "images": images,
        "gflop_per_image": average_gflop(config, HJEPA(config)),
        "images_per_second": rate,
        "hours_per_epoch": hours / EPOCHS,
        "hours_100_epochs": hours,
        "promised_hours": promised,
        "verdict": verdict_on(hours, promised) if promised else "",
        "epochs_in_a_night": NIGHT_HOURS * EPOCHS / hours,
    }


def verdict_on(hours: float, promised: tuple[float, float]) -> str:
    """Whether the promise is kept: faster, as promised, or slower by how much."""
    if hours <= promised[1]:
        return "faster" if hours < promised[0] else "as promised"
    times = hours / promised[1]
    return f"slower ×{times:.1f}" if times < 10 else f"slower ×{times:.0f}"


def changes(slow: dict[str, Any], precisions: dict[str, float]) -> list[dict[str, Any]]:
    """Changes that make a recipe faster if it is slower than promised: settings and hours of each.

    precisions: how many times as fast steps were measured in other dtypes. Otherwise hours are in
    proportion to GFLOP.
    """
    if "slower" not in slow["verdict"]:
        return []
    config = load_config(slow["recipe"])
    patch = config.model.patch_size
    low = round(LOW * config.data.image_size / patch) * patch
    found = [([f"precision={dtype}"], times) for dtype, times in precisions.items()]
    for settings in (
        [f"data.progressive=[[{low},0.75]]"],
        [f"masks.context_tokens={int(config.masks.context_tokens) * 3 // 4}"],
        ["model.size=tiny", "model.predictor_dim=128"],
    ):
        try:
            changed = load_config(slow["recipe"], settings)
            gflop = average_gflop(changed, HJEPA(changed))
        except UsageError:  # the grid would be too small for the levels
            continue
        found.append((settings, slow["gflop_per_image"] / gflop))
    hours = slow["hours_100_epochs"]
    return [{"settings": s, "hours_100_epochs": hours / times} for s, times in found if times > 1]


def project(config: Config, chip: dict[str, Any], share: float) -> float:
    """Images per second of a recipe on `chip`, if steps reach `share` of its matmul peak.

    Time is GFLOP over that speed, or bytes over the bandwidth where that is longer, for each part.
    """
    networks, gflops = HJEPA(config), 1e3 * share * chip["matmul_tflops"]
    return 1 / sum(
        portion * max(part.gflop / gflops, part.gigabytes / chip["bandwidth_gbs"])
        for size, portion in config.stages
        for part in costs(config.at_size(size), networks).parts.values()
    )


def projections(
    chip: dict[str, Any], measured: float, recipes: dict[str, Config]
) -> dict[str, Any]:
    """Every promised recipe on `chip`, at several shares of its matmul peak and at `measured`."""
    rows = [
        {**estimate(name, config, project(config, chip, share)), "share": share}
        for name, config in recipes.items()
        if CATALOG[config.data.name].promise
        for share in (*SHARES, measured)
    ]
    return {**chip, "measured_share_here": measured, "rows": rows}
