"""What a trial changes in the package of the process that traced.py runs."""

from __future__ import annotations

from typing import Any


def small_shards(images: int) -> None:
    """Prepared photographs come in shards of so many."""
    from hjepa_mlx.data import prepared

    prepared.SHARD = images


def published(files: dict[str, list]) -> None:
    """CIFAR-10's files are these: from URL to MD5 and size. They come in small pieces."""
    from hjepa_mlx.data import catalog, download

    download.CHUNK, download.PAUSE = 1 << 14, 0.0
    remotes = tuple(
        catalog.Remote(url=url, md5=md5, size=size) for url, (md5, size) in files.items()
    )
    row = catalog.CATALOG["cifar10"].model_copy(update={"files": remotes})
    catalog.CATALOG["cifar10"] = row


def clock_jumps(seed: int) -> None:
    """The clock on the wall says anything within ten years."""
    import random
    import time

    rng, plain = random.Random(seed), time.time
    time.time = lambda: plain() + rng.uniform(-1, 1) * 10 * 365 * 86_400


def install(asked: dict[str, Any]) -> None:
    """Call the functions above by name."""
    for name, argument in asked.items():
        globals()[name](argument)
