"""The result of `hjepa-mlx bench`: kept, read again, and shown."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Group

from hjepa_mlx import tables
from hjepa_mlx.errors import UsageError
from hjepa_mlx.files import write_json

RESULTS = Path("benchmarks/results")


@dataclass(frozen=True)
class BenchResult(tables.Shown):
    """The figures of `bench`, as its JSON holds them; prints itself."""

    facts: dict[str, Any]

    def __rich__(self) -> Group:
        return Group(*tables.bench(self.facts, findings(self.facts)))


def findings(facts: dict[str, Any]) -> list[str]:
    """What the figures say, in words."""
    step, data, both = facts["step"], facts["data"], facts["end_to_end"]
    gflop, machine = facts["gflop_per_image"], facts["machine"]
    best = max(facts["sweep"], key=lambda row: row["images_per_second"])
    limit = "data" if data["images_per_second"] < step["images_per_second"] else "step"
    found = [
        f"An image costs {gflop['total']:.1f} GFLOP at full resolution, "
        f"{gflop['average_over_the_run']:.1f} on average over the run.",
        f"Images/s: {data['images_per_second']:,.1f} from the data pipeline alone "
        f"({data['source']}), {step['images_per_second']:,.1f} for the step alone, "
        f"{both['images_per_second']:,.1f} together "
        f"({100 * both['share_of_step']:.0f} % of the step's speed, measured in turn). The {limit} "
        "is the limit.",
        f"The first step took {step['first_step_seconds']:.1f} s to trace, compile and run. Traces "
        f"after warm-up: {step['traces_after_warmup']}.",
        f"Batch {best['batch']} is the fastest of those measured. The largest that should fit the "
        f"memory is {facts['largest_batch']} (projected); the recipe uses "
        f"{facts['configured_batch']}.",
        *facts["chosen"],
    ]
    if step["batch"] < facts["configured_batch"]:
        found.append(
            f"Batch {facts['configured_batch']} takes too long to measure here, so batch "
            f"{step['batch']} was measured instead."
        )
    if "sustained" in facts:
        long = facts["sustained"]
        found.append(
            f"After {long['minutes']:g} min the step ran at "
            f"{long['last_images_per_second']:,.1f} images/s, "
            f"{long['drop_percent']:.0f} % below the {long['first_images_per_second']:,.1f}"
            " it started with."
        )
    if power := facts.get("sustained", machine)["power"]:
        found.append(f"The machine may be slowed down: {power}.")
    return found


def keep(facts: dict[str, Any], folder: Path = RESULTS) -> Path:
    """Write the facts to a file of their own in `folder`; its path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"bench-{facts['recipe']}-{time.strftime('%Y%m%d-%H%M%S')}.json"
    write_json(path, facts)
    return path


def read(path: Path) -> dict[str, Any]:
    """The facts of a result file of `hjepa-mlx bench`; UsageError for anything else."""
    try:
        facts = dict(json.loads(path.read_bytes()))
        _ = facts["estimates"], facts["step"], facts["machine"]
    except OSError as error:
        raise UsageError(f"{path} cannot be read ({error.strerror}).") from None
    except (ValueError, KeyError, TypeError):
        raise UsageError(f"{path} is not a result of hjepa-mlx bench.") from None
    return facts
