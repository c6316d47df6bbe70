"""What the ranks of a run agree on before they train."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

from hjepa_mlx import agreement, backend, runs, world
from hjepa_mlx.config import Config
from hjepa_mlx.recipes import parse


def of_rank_0(config: Config) -> Config:
    """Rank 0's config, which has what its run keeps; but for this rank's own folders.

    HJEPAError on all ranks where one has other versions, whose config may have other keys.
    """
    from hjepa_mlx import __version__  # here: the package imports this module

    if world.size() == 1:
        return config
    _refuse_differences({"version": {"hjepa-mlx": __version__, "mlx": version("mlx")}})
    tree = agreement.values(config.model_dump(mode="json"))[0]
    tree["data"]["dir"], tree["run"]["dir"] = config.data.dir, config.run.dir
    return parse(tree)


def check(facts: dict[str, Any]) -> None:
    """Refuse ranks that differ, or a batch that they cannot share; HJEPAError on all of them."""
    # gradients are summed place by place, and on a GPU weights lie in other places (flat.py)
    facts["the device"] = "a GPU" if backend.on_gpu() else "a CPU"
    first = _refuse_differences(facts)
    batch, ranks = first["data"]["batch_size"], world.size()
    if batch % ranks:
        raise agreement.shared_error(
            f"data.batch_size={batch} cannot be shared by {ranks} ranks. Use a multiple of "
            f"{ranks}, for example {batch - batch % -ranks}.",
            status=2,
        )


def _refuse_differences(facts: dict[str, Any]) -> dict[str, Any]:
    """Rank 0's facts, which all ranks share."""
    first, *others = agreement.values(facts)
    for rank, other in enumerate(others, 1):
        for key, (here, there) in runs.differences(first, other).items():
            raise agreement.shared_error(
                f"Rank 0 and rank {rank} differ: {key} is {here!r:.40} and {there!r:.40}. Start "
                "all ranks with the same config, images and versions, all on GPUs or all on CPUs.",
                status=2,
            )
    return first
