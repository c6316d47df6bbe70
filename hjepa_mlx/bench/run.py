"""`hjepa-mlx bench`: measure this machine with a recipe, and say what fits a night."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from hjepa_mlx import backend
from hjepa_mlx.bench import machine
from hjepa_mlx.bench.chips import Chip
from hjepa_mlx.bench.estimates import RECIPES, SHARES, changes, estimate, project
from hjepa_mlx.bench.synthetic import synthetic
from hjepa_mlx.bench.throughput import time_end_to_end, time_parts, time_pipeline
from hjepa_mlx.config import Config, load_config
from hjepa_mlx.costs import average_gflop, costs
from hjepa_mlx.data.catalog import CATALOG, Dataset
from hjepa_mlx.data.source import Source
from hjepa_mlx.data.sources import layout, open_source
from hjepa_mlx.errors import UsageError
from hjepa_mlx.eval.knn import BANK, QUERIES
from hjepa_mlx.files import write_json
from hjepa_mlx.models.hjepa import HJEPA
from hjepa_mlx.signals import IMAGES as SIGNAL_IMAGES
from hjepa_mlx.timing import Speed, settle, time_steps

LONGEST_STEP = 5.0  # seconds; a batch that would take longer is measured by a smaller one
USUAL_MFU = 0.4  # to guess that
SECONDS = 5.0  # of the main measurements; SHORT of the others
SHORT = 1.5
RESULTS = Path("benchmarks/results")
PLACES: Any = {"data": {"dir"}, "run": {"dir"}}  # keys that change no figure
Say = Callable[[str], None]


class Bench:
    """The measurements of one recipe; each is made when first asked for."""

    def __init__(self, config: Config) -> None:
        if config.data.name not in CATALOG:
            raise UsageError(
                f"bench needs a recipe of a data set of the catalog, not data.name="
                f"{config.data.name}: {', '.join(CATALOG)}."
            )
        backend.set_memory_limits()
        self.config = config
        self._speeds: dict[str, Speed] = {}
        self._pipelines: dict[str, float] = {}

    @cached_property
    def speeds(self) -> dict[str, dict[str, float]]:
        """Matmul and bandwidth by dtype."""
        return machine.speeds()

    def here(self, config: Config) -> Config:
        """The config with the main one's data folder, precision and compilation."""
        chosen = {key: getattr(self.config, key) for key in ("precision", "compile")}
        other = config.model_copy(update=chosen, deep=True)
        other.data.dir = self.config.data.dir
        return other

    def measurable(self, config: Config) -> Config:
        """The config with a batch whose step takes no longer than LONGEST_STEP here."""
        cost = costs(config, HJEPA(config))
        config = self.here(config)
        batch = config.data.batch_size
        usual = USUAL_MFU * self.speeds["float32"]["matmul_gflops"]
        while batch > 2 and batch * cost.gflop / usual > LONGEST_STEP:
            batch //= 2
        return with_batch(config, batch)

    @cached_property
    def main(self) -> Config:
        """The config at full resolution, at a batch that can be measured here."""
        return self.measurable(self.config.at_size(self.config.data.image_size))

    def step(self) -> dict[str, Any]:
        """The step of the recipe."""
        return self._row(self.main, self.speed(self.main, SECONDS))

    def sweep(self) -> list[dict[str, Any]]:
        """Steps of a quarter of the batch to four times as much, where that can be measured."""
        rows = []
        for batch in (self.main.data.batch_size * n // 4 for n in (1, 2, 8, 16)):
            config = with_batch(self.main, batch)
            known = batch >= 2 and self.measurable(config).data.batch_size == batch
            if known and costs(config, HJEPA(config)).memory_gb < backend.step_memory_gb():
                rows.append(self._row(config, self.speed(config)))
        return rows

    def precisions(self) -> list[dict[str, Any]]:
        """Steps in the other precisions whose matmul is worth it here."""
        matmul = {dtype: speed["matmul_gflops"] for dtype, speed in self.speeds.items()}
        rows = []
        for dtype in matmul:
            if dtype != self.main.precision and matmul[dtype] >= matmul["float32"]:
                config = self.main.model_copy(update={"precision": dtype}, deep=True)
                rows.append(self._row(config, self.speed(config)))
        return rows

    def _row(self, config: Config, speed: Speed) -> dict[str, Any]:
        gflop = costs(config, HJEPA(config)).gflop
        peak = self.speeds[config.precision]["matmul_gflops"]
        return {
            "batch": speed.batch,
            "precision": config.precision,
            "images_per_second": speed.images_per_second,
            "p95_over_p50": speed.spread,
            "mfu": 100 * speed.images_per_second * gflop / peak,
            "first_step_seconds": speed.first_seconds,
            "traces_after_warmup": speed.traces_after_warmup,
            "peak_memory_gb": speed.peak_memory_gb,
        }

    def source(self, config: Config) -> tuple[Source, str]:
        """The recipe's images, or made-up ones; and which, in words."""
        row = CATALOG[config.data.name]
        if layout(row.name, config.data):
            return open_source(config.data, "pretrain"), "real images"
        part = CATALOG[row.parts[0]] if row.parts else row
        return synthetic(part), f"made-up {_form(part)}; the data set is not here"

    def pipeline(self, config: Config) -> float:
        """Images per second of the pipeline alone, for this data set and image size."""
        key = f"{_form(CATALOG[config.data.name])} {config.data.image_size}"
        if key not in self._pipelines:
            source, _ = self.source(self.here(config))
            self._pipelines[key] = time_pipeline(source, config, SHORT)
        return self._pipelines[key]

    def rate(self, config: Config) -> float:
        """Images per second of a whole run: the stages' steps, or the pipeline where it is less.

        Lowered by what training does besides: feeding the step, collapse signals, k-NN.
        """
        seconds = sum(
            share / self._stage_rate(self.measurable(config.at_size(size)))
            for size, share in config.stages
        )
        return 1 / (seconds * (1 + overhead(config)))

    def _stage_rate(self, config: Config) -> float:
        if _key(config) == _key(self.main):
            return self.end_to_end["images_per_second"]
        limit = min(self.speed(config).images_per_second, self.pipeline(config))
        return limit * min(1.0, self.end_to_end["share_of_slower"])

    def speed(self, config: Config, seconds: float = SHORT) -> Speed:
        """The config's steps, timed once: other data sets may have the same."""
        key = _key(config)
        if key not in self._speeds:
            self._speeds[key] = time_steps(config, seconds)
        return self._speeds[key]

    def sustained(self, minutes: float) -> dict[str, Any]:
        """Steps for minutes: the speed of the first and of the last tenth of the time."""
        speed = time_steps(self.main, 60 * minutes)
        seconds = np.array(speed.seconds)
        tenth = max(1, len(seconds) // 10)
        first, last = (
            speed.batch / float(np.median(part)) for part in (seconds[:tenth], seconds[-tenth:])
        )
        return {
            "minutes": minutes,
            "first_images_per_second": first,
            "last_images_per_second": last,
            "drop_percent": 100 * (1 - last / first),
            "power": machine.power(),
        }

    @cached_property
    def end_to_end(self) -> dict[str, float]:
        """Pipeline and step together, as the main config trains."""
        source, _ = self.source(self.main)
        both, share = time_end_to_end(source, self.main, SECONDS)
        step = self.speed(self.main).images_per_second
        slower = min(1.0, self.pipeline(self.main) / step)
        return {
            "images_per_second": both,
            "share_of_step": share,
            "share_of_slower": share / slower,
        }


def overhead(config: Config) -> float:
    """What collapse signals and k-NN add to the time of the steps, as a share of it.

    In FLOP: images that the target encoder looks at, at full size, beside those trained on.
    """
    networks, every = HJEPA(config), config.run.eval_every_epochs
    look, train = costs(config, networks).target.gflop, average_gflop(config, networks)
    effective = config.data.batch_size * config.optim.accumulate
    signals = SIGNAL_IMAGES * look / (config.run.signals_every * effective * train)
    if not every:
        return signals
    knn = (BANK + QUERIES) * look / (every * CATALOG[config.data.name].images * train)
    return signals + min(knn, config.run.eval_share)


def with_batch(config: Config, batch: int) -> Config:
    """The config with another batch size."""
    other = config.model_copy(deep=True)
    other.data.batch_size = max(2, batch)
    return other


def bench(
    config: Config,
    chip: Chip,
    minutes: float = 0.0,
    say: Say = lambda line: None,
) -> dict[str, Any]:
    """Measure this machine with a recipe; everything `hjepa-mlx bench` prints, as JSON holds it.

    chip: projected to as well. minutes: of sustained steps, besides.
    """
    config = config.model_copy(deep=True)
    shipped = load_config(config.name) if config.name in RECIPES else None
    as_it_comes = shipped and shipped.model_dump(exclude=PLACES) == config.model_dump(
        exclude=PLACES
    )
    found = Bench(config)
    chosen = settle(config)
    networks = HJEPA(config)
    cost = costs(config, networks)
    say("Matmul and memory …")
    facts: dict[str, Any] = {
        "recipe": config.name,
        "date": time.strftime("%Y-%m-%d %H:%M"),
        "machine": machine.describe(),
        "speeds": found.speeds,
        "gflop_per_image": {
            **{name: part.gflop for name, part in cost.parts.items()},
            "total": cost.gflop,
            "average_over_the_run": average_gflop(config, networks),
        },
        "gigabytes_per_image": {name: part.gigabytes for name, part in cost.parts.items()},
        "configured_batch": config.data.batch_size,
        "chosen": chosen,
    }
    say(f"Steps of {config.name}, batch {found.main.data.batch_size} …")
    facts["step"] = found.step()
    facts["sweep"] = sorted([facts["step"], *found.sweep()], key=lambda row: row["batch"])
    facts["largest_batch"] = _largest_batch(config, networks, facts["step"])
    say("Precisions and parts …")
    facts["precisions"] = found.precisions()
    facts["parts_seconds"] = time_parts(found.main)
    say("Pipeline, then both together …")
    facts["data"] = {
        "images_per_second": found.pipeline(found.main),
        "source": found.source(found.main)[1],
    }
    facts["end_to_end"] = found.end_to_end
    if minutes:
        say(f"Sustained steps for {minutes:g} min …")
        facts["sustained"] = found.sustained(minutes)
    say("Every data set's recipe …")
    if not as_it_comes:
        facts["own_estimate"] = asdict(estimate(f"{config.name} (as given)", config, found.rate))
    facts["estimates"] = _estimates(found, facts)
    facts["projected"] = projected(chip, facts["step"]["mfu"] / 100)
    return facts


def _estimates(found: Bench, facts: dict[str, Any]) -> list[dict[str, Any]]:
    """Every recipe's estimate, and what would make a slow one faster."""
    rows = [estimate(name, load_config(name), found.rate) for name in RECIPES]
    usual = facts["step"]["images_per_second"]
    times = {row["precision"]: row["images_per_second"] / usual for row in facts["precisions"]}
    return [
        {
            **asdict(row),
            "data_is_here": bool(layout(row.dataset, found.config.data)),
            "changes": [asdict(change) for change in changes(row, times)],
        }
        for row in rows
    ]


def projected(chip: Chip, measured_share: float) -> dict[str, Any]:
    """All recipes on a chip that is not here, at several shares of its matmul peak."""
    recipes = {name: load_config(name) for name in RECIPES}
    rows = [
        {**asdict(project(name, config, chip, share)), "share": share}
        for name, config in recipes.items()
        if CATALOG[config.data.name].promise
        for share in (*SHARES, measured_share)
    ]
    return {
        "chip": chip.title,
        "stated_tflops": chip.tflops,
        "matmul_tflops": chip.matmul_tflops,
        "bandwidth_gbs": chip.bandwidth_gbs,
        "measured_share_here": measured_share,
        "rows": rows,
    }


def keep(facts: dict[str, Any], folder: Path = RESULTS) -> Path:
    """Write the facts to a file of their own in `folder`; its path."""
    stamp = time.strftime("%Y%m%d-%H%M%S")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"bench-{facts['recipe']}-{stamp}.json"
    write_json(path, facts)
    return path


def _key(config: Config) -> str:
    """The same for configs whose steps are the same."""
    key = config.model_dump_json(include={"model", "masks", "loss", "precision", "compile"})
    return f"{key} {config.data.image_size} {config.data.batch_size}"


def _form(row: Dataset) -> str:
    return "JPEG files" if row.resolution >= 224 else f"pixels of {row.resolution}x{row.resolution}"


def _largest_batch(config: Config, networks: HJEPA, step: dict[str, Any]) -> int:
    """The largest multiple of 8 whose step fits the memory, by the measured one's; projected."""
    measured = step["batch"]
    at = costs(with_batch(config, measured), networks).memory_gb
    slope = (costs(with_batch(config, 2 * measured), networks).memory_gb - at) / measured
    scale = step["peak_memory_gb"] / at
    batch = measured + (backend.step_memory_gb() / scale - at) / slope
    return max(2, int(batch) // 8 * 8)
