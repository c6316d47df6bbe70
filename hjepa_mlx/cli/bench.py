"""`hjepa-mlx bench`: will it fit the night?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console, Group

from hjepa_mlx import world
from hjepa_mlx.cli.common import DataDir, JsonFile, Overrides, output_json, readable
from hjepa_mlx.errors import UsageError
from hjepa_mlx.progress import say
from hjepa_mlx.recipes import load_config
from hjepa_mlx.session import awake

Recipe = Annotated[str, typer.Argument(help="Name of a recipe, or path of a YAML file.")]
Minutes = Annotated[
    float, typer.Option(metavar="MINUTES", help="Also run steps this long: do they slow down?")
]
Chip = Annotated[str, typer.Option(metavar="CHIP", help="Project the hours to this Apple chip.")]
TwoFiles = Annotated[
    tuple[str, str] | None,
    typer.Option(metavar="A B", help="Show two result files side by side; measure nothing."),
]


@readable
@awake()
def bench(
    config: Recipe = "imagenet100",
    overrides: Overrides = None,
    data_dir: DataDir = None,
    json_file: JsonFile = None,
    sustained: Minutes = 0.0,
    project_to: Chip = "m1-max",
    compare: TwoFiles = None,
) -> None:
    """Measure this machine with a recipe, and estimate 100 epochs of every data set.

    Takes two to four minutes. The result is kept in benchmarks/results/. Under mlx.launch it also
    says how much faster the ranks are together.

    Example: `hjepa-mlx bench imagenet100 --project-to m2-pro`
    """
    from hjepa_mlx.bench.estimates import chip_named
    from hjepa_mlx.bench.machine import scaling
    from hjepa_mlx.bench.result import findings, keep, read
    from hjepa_mlx.bench.run import SECONDS
    from hjepa_mlx.bench.run import bench as measure
    from hjepa_mlx.tables import bench as tables

    if compare is not None:
        Console().print(tables.side_by_side(*(read(Path(path)) for path in compare)))
        return
    if sustained < 0:
        raise UsageError(f"--sustained {sustained:g} is negative; give a number of minutes.")
    chip, loaded = chip_named(project_to), load_config(config, overrides)
    if data_dir is not None:
        loaded.data.dir = data_dir
    stderr = Console(stderr=True)
    several = {"scaling": scaling(loaded, SECONDS)} if world.size() > 1 else {}
    if world.rank():
        return
    with world.alone():
        facts = measure(loaded, chip, sustained, lambda line: say(stderr, line)) | several
    kept = keep(facts)  # first: the reader of the output may be gone
    if output_json(facts, json_file):
        Console().print(Group(*tables.bench(facts, findings(facts))))
    say(stderr, f"Kept in {kept}.")
