"""Hours: what a measured speed means for every data set, beside what was promised for it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from hjepa_mlx.bench.chips import Chip
from hjepa_mlx.config import Config
from hjepa_mlx.costs import Costs, average_gflop, costs
from hjepa_mlx.data.catalog import CATALOG
from hjepa_mlx.errors import UsageError
from hjepa_mlx.models.hjepa import HJEPA
from hjepa_mlx.recipes import load_config

NIGHT_HOURS = 10
EPOCHS = 100
SHARES = (0.45, 0.60, 0.75)  # of the matmul peak, for projections
LOW = 0.57  # of the image size: the first stage of a suggested data.progressive
Rate = Callable[[Config], float]  # images per second of a whole run


@dataclass(frozen=True)
class Change:
    """A change to the recipe, and what the epochs would then take."""

    settings: list[str]
    hours_100_epochs: float


@dataclass(frozen=True)
class Estimate:
    """What 100 epochs of a data set's recipe take on this machine."""

    dataset: str
    recipe: str
    images: int
    gflop_per_image: float
    images_per_second: float
    hours_per_epoch: float
    hours_100_epochs: float
    promised_hours: tuple[float, float] | None
    verdict: str
    epochs_in_a_night: float


# of every data set, and the faster one
RECIPES = [*(name.replace("+", "_") for name in CATALOG), "imagenet100_fast"]


def estimate(name: str, config: Config, rate_of: Rate) -> Estimate:
    """The estimate of a recipe, whose images per second `rate_of` measures."""
    row, rate = CATALOG[config.data.name], rate_of(config)
    images = min(row.images, config.data.limit or row.images)
    hours = EPOCHS * images / rate / 3600
    promised = row.promise.hours if row.promise else None
    return Estimate(
        dataset=row.name,
        recipe=name,
        images=images,
        gflop_per_image=average_gflop(config, HJEPA(config)),
        images_per_second=rate,
        hours_per_epoch=hours / EPOCHS,
        hours_100_epochs=hours,
        promised_hours=promised,
        verdict=verdict_on(hours, promised) if promised else "",
        epochs_in_a_night=NIGHT_HOURS * EPOCHS / hours,
    )


def verdict_on(hours: float, promised: tuple[float, float]) -> str:
    """Whether the promise is kept: faster, as promised, or slower by how much."""
    if hours < promised[0]:
        return "faster"
    if hours <= promised[1]:
        return "as promised"
    times = hours / promised[1]
    return f"slower ×{times:.1f}" if times < 10 else f"slower ×{times:.0f}"


def changes(slow: Estimate, precisions: dict[str, float]) -> list[Change]:
    """What would make a recipe that is slower than promised faster, one thing at a time.

    precisions: how many times as fast steps were measured in other dtypes. Otherwise hours are in
    proportion to GFLOP.
    """
    if "slower" not in slow.verdict:
        return []
    config = load_config(slow.recipe)
    patch = config.model.patch_size
    low = round(LOW * config.data.image_size / patch) * patch
    fewer = int(config.masks.context_tokens) * 3 // 4
    tried = [
        [f"data.progressive=[[{low},0.75]]"],
        [f"masks.context_tokens={fewer}"],
        ["model.size=tiny", "model.predictor_dim=128"],
    ]
    found = [
        Change([f"precision={dtype}"], slow.hours_100_epochs / times)
        for dtype, times in precisions.items()
        if times > 1
    ]
    for settings in tried:
        try:
            changed = load_config(slow.recipe, settings)
            cost = average_gflop(changed, HJEPA(changed))
        except UsageError:  # the grid would be too small for the levels
            continue
        if cost < slow.gflop_per_image:
            found.append(Change(settings, slow.hours_100_epochs * cost / slow.gflop_per_image))
    return found


def project(name: str, config: Config, chip: Chip, share: float) -> Estimate:
    """The estimate of a recipe on `chip`, if steps reach `share` of its matmul peak: projected.

    Time is GFLOP over that speed, or bytes over the bandwidth where that is longer, for each part.
    """
    networks = HJEPA(config)
    seconds = sum(
        portion * _seconds(costs(config.at_size(size), networks), chip, share)
        for size, portion in config.stages
    )
    return estimate(name, config, lambda _: 1 / seconds)


def _seconds(cost: Costs, chip: Chip, share: float) -> float:
    """Seconds an image takes, part by part."""
    return sum(
        max(
            part.gflop / (1e3 * share * chip.matmul_tflops),
            part.gigabytes / chip.bandwidth_gbs,
        )
        for part in cost.parts.values()
    )
