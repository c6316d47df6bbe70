"""The result of `hjepa-mlx bench`: its findings in words, kept, and read again."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from hjepa_mlx.data.overview import RESULTS
from hjepa_mlx.errors import UsageError
from hjepa_mlx.files import write_json


def findings(facts: dict[str, Any]) -> list[str]:
    """What the figures say, in words."""
    step, data, both = facts["step"], facts["data"], facts["end_to_end"]
    gflop, batch = facts["gflop_per_image"], facts["configured_batch"]
    best = max(facts["sweep"], key=lambda row: row["images_per_second"])
    limit = "data" if data["images_per_second"] < step["images_per_second"] else "step"
    found = [
        f"An image costs {gflop['total']:.1f} GFLOP at full resolution, "
        f"{gflop['average_over_the_run']:.1f} on average over the run.",
        f"Images/s: {data['images_per_second']:,.1f} from the data pipeline alone "
        f"({data['source']}), {step['images_per_second']:,.1f} for the step alone, "
        f"{both['images_per_second']:,.1f} together ({100 * both['share_of_step']:.0f} % of the "
        f"step's speed, measured in turn). The {limit} is the limit.",
        f"The first step took {step['first_step_seconds']:.1f} s to trace, compile and run. Traces "
        f"after warm-up: {step['traces_after_warmup']}."
        if step["compiled"]
        else "Steps are not compiled.",
        f"Batch {best['batch']} is the fastest of those measured. The largest that should fit the "
        f"memory is {facts['largest_batch']} (projected); the recipe uses {batch}.",
        *facts["chosen"],
    ]
    if step["batch"] < batch:
        found.append(
            f"Batch {batch} takes too long to measure here, so batch {step['batch']} was measured "
            "instead."
        )
    if "scaling" in facts:
        found.append(scaling(facts["scaling"]))
    long = facts.get("sustained", facts["machine"])
    if "minutes" in long:
        found.append(
            f"After {long['minutes']:g} min the step ran at "
            f"{long['last_images_per_second']:,.1f} images/s, {long['drop_percent']:.0f} % below "
            f"the {long['first_images_per_second']:,.1f} it started with."
        )
    if long["power"]:
        found.append(f"The machine may be slowed down: {long['power']}.")
    return found


def scaling(facts: dict[str, Any]) -> str:
    """What several ranks give, in words."""
    alone, step, averaging = (
        1e3 * facts[key] for key in ("step_seconds_alone", "step_seconds", "averaging_seconds")
    )
    return (
        f"{len(facts['hosts'])} ranks ({facts['backend']}) take {step:,.0f} ms for a step of "
        f"{facts['recipe']} with batch {facts['batch']}, one takes {alone:,.0f} ms. Averaging "
        f"{facts['averaged_mb']:,.1f} MB takes {averaging:,.1f} ms ({facts['averaged_gbs']:.2f} "
        f"GB/s). Several ranks {'pay' if step < alone else 'do not pay'}."
    )


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
