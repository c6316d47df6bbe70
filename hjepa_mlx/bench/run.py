"""`hjepa-mlx bench`: measure this machine with a recipe, and see what fits a night."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np

from hjepa_mlx import backend, signals
from hjepa_mlx.bench import machine
from hjepa_mlx.bench.estimates import (
    RECIPES,
    changes,
    estimate,
    images_per_epoch,
    projections,
)
from hjepa_mlx.bench.synthetic import synthetic
from hjepa_mlx.config import Config
from hjepa_mlx.costs import average_gflop, costs
from hjepa_mlx.data.catalog import CATALOG
from hjepa_mlx.data.source import Source, layout, open_source
from hjepa_mlx.errors import UsageError
from hjepa_mlx.eval.knn import BANK, QUERIES
from hjepa_mlx.models.hjepa import HJEPA
from hjepa_mlx.recipes import load_config
from hjepa_mlx.timing import settle, time_steps

LONGEST_STEP = 5.0  # seconds; a batch that would take longer is measured by a smaller one
USUAL_MFU = 0.4  # to guess that
SECONDS = 5.0  # of the main measurements; SHORT of the others
SHORT = 1.5
PLACES: Any = {"data": {"dir"}, "run": {"dir"}}  # keys that change no figure
Row = dict[str, Any]
Say = Callable[[str], None]


class Bench:
    """The measurements that estimates rest on, `facts`: this machine, a recipe's step and images.

    say: told the next measurement. Raises UsageError for a data set that is not in the catalog.
    """

    def __init__(self, config: Config, say: Say = lambda line: None) -> None:
        if config.data.name not in CATALOG:
            raise UsageError(
                f"bench has no hours for data.name={config.data.name}. Choose a recipe of a data "
                f"set of the catalog: {', '.join(CATALOG)}."
            )
        backend.set_memory_limits()
        self.config = config.model_copy(deep=True)
        batch = config.data.batch_size * config.optim.accumulate
        chosen = settle(self.config, config.optim.epochs * images_per_epoch(config) // batch)
        self.rates: dict[str, float] = {}  # images per second: recipes share steps and pipelines
        self.facts: Row = {"chosen": chosen, "machine": machine.describe()}
        say("Matmul and memory …")
        self.speeds = self.facts["speeds"] = machine.speeds()
        self.main = self.measurable(self.config.at_size(self.config.data.image_size))
        say(f"Steps of {config.name}, batch {self.main.data.batch_size} …")
        self.step = self.facts["step"] = self.time_step(self.main, SECONDS)
        say("Pipeline, then both together …")
        source, kind = images_of(self.main)
        both, share = machine.time_end_to_end(source, self.main, SECONDS)
        rate = self.pipeline_rate(self.main)
        self.facts["data"] = {"images_per_second": rate, "source": kind}
        self.together = self.facts["end_to_end"] = {
            "images_per_second": both,
            "share_of_step": share,
            "share_of_slower": share / min(1.0, rate / self.step["images_per_second"]),
        }

    def measurable(self, config: Config) -> Config:
        """The config as it runs here, with a batch whose step takes no longer than LONGEST_STEP."""
        chosen = {key: getattr(self.config, key) for key in ("precision", "compile")}
        config = config.model_copy(update=chosen, deep=True)
        config.data.dir = self.config.data.dir
        gflops = USUAL_MFU * self.speeds["float32"]["matmul_gflops"]
        most = max(2, LONGEST_STEP * gflops / costs(config, HJEPA(config)).gflop)
        while config.data.batch_size > most:
            config.data.batch_size = max(2, config.data.batch_size // 2)
        return config

    def time_step(self, config: Config, seconds: float) -> Row:
        """A row of figures on the config's step."""
        speed, gflop = time_steps(config, seconds), costs(config, HJEPA(config)).gflop
        rate = self.rates[_step_key(config)] = speed.images_per_second
        return {
            "batch": speed.batch,
            "precision": config.precision,
            "compiled": config.compile,
            "images_per_second": rate,
            "p95_over_p50": speed.spread,
            "mfu": 100 * rate * gflop / self.speeds[config.precision]["matmul_gflops"],
            "first_step_seconds": speed.warm_up[0],
            "traces_after_warmup": speed.traces_after_warmup,
            "peak_memory_gb": speed.peak_memory_gb,
        }

    def sweep(self) -> list[Row]:
        """Steps of a quarter of the batch to four times it, as far as they can be measured."""
        rows, allowed = [self.step], backend.step_memory_gb()
        for batch in (self.main.data.batch_size * n // 4 for n in (1, 2, 8, 16)):
            config = self.main.with_batch(batch)
            quick = batch >= 2 and self.measurable(config) == config
            if quick and costs(config, HJEPA(config)).memory_gb < allowed:
                rows.append(self.time_step(config, SHORT))
        return sorted(rows, key=lambda row: row["batch"])

    def precisions(self) -> list[Row]:
        """Steps in the other precisions whose matmul is no slower here."""
        peaks = {dtype: speed["matmul_gflops"] for dtype, speed in self.speeds.items()}
        return [
            self.time_step(self.main.model_copy(update={"precision": dtype}), SHORT)
            for dtype, peak in peaks.items()
            if dtype != self.main.precision and peak >= peaks["float32"]
        ]

    def pipeline_rate(self, config: Config) -> float:
        """Images per second of the pipeline alone, for this data set and image size."""
        key = f"{_form(config)} {config.data.image_size}"
        if key not in self.rates:
            self.rates[key] = machine.time_pipeline(images_of(config)[0], config, SHORT)
        return self.rates[key]

    def rate(self, config: Config) -> float:
        """Images per second of a whole run: the stages' steps, or the pipeline where it is less.

        Lowered by the rest of training's work: feeding the step, collapse signals, k-NN.
        """
        seconds = 0.0
        for size, share in config.stages:
            asked = config.at_size(size)
            stage, networks = self.measurable(asked), HJEPA(asked)
            key, rate = _step_key(stage), self.together["images_per_second"]
            if key != _step_key(self.main):
                if key not in self.rates:
                    self.time_step(stage, SHORT)
                rate = min(self.rates[key], self.pipeline_rate(stage))
                rate *= min(1.0, self.together["share_of_slower"])
            # an update of Muon costs the same for any batch, so it is dearer for the small one here
            rate *= costs(stage, networks).gflop / costs(asked, networks).gflop
            seconds += share / rate
        return 1 / (seconds * (1 + overhead(config)))

    def largest_batch(self) -> int:
        """The largest multiple of 8 whose step fits the memory, projected from the step's."""
        batch, networks = self.step["batch"], HJEPA(self.config)
        configs = self.config.with_batch(batch), self.config.with_batch(2 * batch)
        memory, double = (costs(config, networks).memory_gb for config in configs)
        allowed = backend.step_memory_gb() * memory / self.step["peak_memory_gb"]
        return max(2, int(batch + (allowed - memory) * batch / (double - memory)) // 8 * 8)

    def sustained(self, minutes: float) -> Row:
        """Steps for minutes: the speed of the first and of the last tenth of the time."""
        speed = time_steps(self.main, 60 * minutes)
        tenth = max(1, len(speed.seconds) // 10)
        first, last = np.median(speed.seconds[:tenth]), np.median(speed.seconds[-tenth:])
        return {
            "minutes": minutes,
            "first_images_per_second": float(speed.batch / first),
            "last_images_per_second": float(speed.batch / last),
            "drop_percent": float(100 * (1 - first / last)),
            "power": machine.power(),
        }


def images_of(config: Config) -> tuple[Source, str]:
    """The recipe's images, or made-up ones; and which, in words."""
    row = CATALOG[config.data.name]
    if layout(row.name, config.data):
        return open_source(config.data, "pretrain"), "real images"
    part = CATALOG[row.parts[0]] if row.parts else row
    return synthetic(part), f"made-up {_form(config)}; the data set is not here"


def overhead(config: Config) -> float:
    """The time of collapse signals and k-NN, as a share of that of the steps.

    By FLOP: the images that the target encoder sees for them, at full size, over those trained on.
    """
    networks = HJEPA(config)
    relative = costs(config, networks).parts["target"].gflop / average_gflop(config, networks)
    step_images = config.data.batch_size * config.optim.accumulate
    share = signals.IMAGES / (signals.EVERY * config.run.log_every * step_images)
    if config.run.eval_every_epochs:
        share += (BANK + QUERIES) / (config.run.eval_every_epochs * images_per_epoch(config))
    return share * relative


def bench(config: Config, chip: Row, minutes: float = 0.0, say: Say = lambda line: None) -> Row:
    """Measure this machine with a recipe: everything that `hjepa-mlx bench` prints, for JSON.

    chip: to project to. minutes: of sustained steps, if any.
    """
    found = Bench(config, say)
    networks = HJEPA(found.config)
    cost = costs(found.config, networks)
    gflop = {name: part.gflop for name, part in cost.parts.items()}
    average = average_gflop(found.config, networks)
    say("Other batches, precisions, and the parts of a step …")
    facts: Row = {
        "recipe": config.name,
        "date": time.strftime("%Y-%m-%d %H:%M"),
        **found.facts,
        "gflop_per_image": {**gflop, "total": cost.gflop, "average_over_the_run": average},
        "gigabytes_per_image": {name: part.gigabytes for name, part in cost.parts.items()},
        "configured_batch": config.data.batch_size,
        "largest_batch": found.largest_batch(),
        "sweep": found.sweep(),
        "precisions": found.precisions(),
        "parts_seconds": machine.time_parts(found.main),
    }
    if minutes:
        say(f"Sustained steps for {minutes:g} min …")
        facts["sustained"] = found.sustained(minutes)
    say("Every data set's recipe …")
    recipes = {name: load_config(name) for name in RECIPES}
    shipped = recipes.get(config.name)
    if not shipped or shipped.model_dump(exclude=PLACES) != config.model_dump(exclude=PLACES):
        name = f"{config.name} (as given)"
        facts["own_estimate"] = estimate(name, config, found.rate(config))
    usual = found.step["images_per_second"]
    times = {row["precision"]: row["images_per_second"] / usual for row in facts["precisions"]}
    facts["estimates"] = rows = [estimate(n, one, found.rate(one)) for n, one in recipes.items()]
    for row in rows:
        row["data_is_here"] = bool(layout(row["dataset"], found.config.data))
        row["changes"] = changes(row, times)
    facts["projected"] = projections(chip, found.step["mfu"] / 100, recipes)
    return facts


def _step_key(config: Config) -> str:
    """The same for configs whose steps are the same."""
    of_step = dict.fromkeys(("model", "masks", "loss", "precision", "compile"), True)
    key = config.model_dump_json(include={**of_step, "optim": {"kind"}})
    return f"{key} {config.data.image_size} {config.data.batch_size}"


def _form(config: Config) -> str:
    side = CATALOG[config.data.name].resolution
    return "JPEG files" if side >= 224 else f"pixels of {side}x{side}"
