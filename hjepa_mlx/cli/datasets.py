"""`hjepa-mlx datasets`: which there are, and from nothing on disk to one that trains."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from shlex import quote
from typing import Annotated

import typer

from hjepa_mlx.cli.common import DataDir, JsonFile, check_writable, output_json, readable
from hjepa_mlx.errors import UsageError
from hjepa_mlx.session import awake

datasets = typer.Typer(
    help="List, download, prepare, verify and combine data sets.", no_args_is_help=True
)
Name = Annotated[str, typer.Argument(help="Name of a data set: see `hjepa-mlx datasets list`.")]


@datasets.command(name="list")
@readable
def list_datasets(data_dir: DataDir = None, json_file: JsonFile = None) -> None:
    """Compare the data sets, and say which are on this machine.

    Example: `hjepa-mlx datasets list`
    """
    from rich.console import Console

    from hjepa_mlx.config import Data
    from hjepa_mlx.data.overview import overview, tables

    check_writable(json_file)
    facts = overview(Data(dir=data_dir))
    output_json(facts, json_file)
    if json_file != "-":
        for table in tables(facts):
            Console().print(table)


@datasets.command()
@readable
@awake()
def download(name: Name, data_dir: DataDir = None) -> None:
    """Download a data set, or go on where it stopped; check it; make it ready to train on.

    Example: `hjepa-mlx datasets download stl10`
    """
    from hjepa_mlx.config import Data
    from hjepa_mlx.data.catalog import look_up
    from hjepa_mlx.data.fetch import fetch
    from hjepa_mlx.data.sources import data_root

    row = look_up(name)
    print(f"{row.title}: {row.download_gb:g} GB. Terms: {row.terms}")
    folder = fetch(name, data_root(Data(dir=data_dir)))
    more = "" if data_dir is None else f" --data-dir {quote(data_dir)}"
    if row.hub or name == "imagenet1k":
        print(f"In {folder}. It trains faster after: hjepa-mlx datasets prepare {name}{more}")
    else:
        print(f"In {folder}. Train with: hjepa-mlx train {name.replace('+', '_')}{more}")


@datasets.command()
@readable
@awake()
def prepare(
    name: Annotated[str, typer.Argument(help="imagenet100, imagenet1k, or folder.")],
    data_dir: DataDir = None,
    out: Annotated[
        str | None, typer.Option(help="Folder to write to. Default: `shards` beside the data.")
    ] = None,
    side: Annotated[
        int,
        typer.Option(min=16, max=4096, help="Short side of the images, pixels; none is enlarged."),
    ] = 256,
    quality: Annotated[int, typer.Option(min=1, max=100, help="Quality of the JPEGs.")] = 90,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Images worked on at once. Default: all cores.")
    ] = None,
) -> None:
    """Make a data set fast to train on: smaller JPEGs in tar shards with an index.

    An interrupted call goes on where it stopped. ImageNet-100 is also cut out of an ImageNet-1K.

    Example: `hjepa-mlx datasets prepare imagenet100`
    """
    from hjepa_mlx.config import Data
    from hjepa_mlx.data import shards
    from hjepa_mlx.data.prepare import prepare as run
    from hjepa_mlx.data.sources import data_root, open_source

    data = Data(name=name, dir=data_dir)
    if name == "folder" and out is None:
        raise UsageError("prepare folder needs --out FOLDER.")
    if "+" in name:
        raise UsageError(f"Prepare one data set at a time: {name.replace('+', ', then ')}.")
    folder = Path(out).expanduser() if out else data_root(data) / name / shards.FOLDER
    if out is None and shards.complete(folder):
        made = shards.manifest(folder)
        print(f"Prepared already, with --side {made['short_side']}; delete the folder to redo it.")
    else:
        sources = {split: open_source(data, split) for split in ("train", "test")}
        made = run(name, sources, folder, side, quality, workers)
    for split, part in made["splits"].items():
        left_out = f", {len(part['skipped'])} left out: unreadable" if part["skipped"] else ""
        print(f"{split}: {part['images']:,} images{left_out}")
    size = sum(path.stat().st_size for path in folder.glob("*.tar"))
    print(f"{size / 1e9:.2f} GB in {folder}")


@datasets.command()
@readable
@awake()
def verify(
    name: Annotated[str, typer.Argument(help="Name of a data set, or folder.")],
    data_dir: DataDir = None,
    json_file: JsonFile = None,
) -> None:
    """Check counts, checksums, classes, that every image can be read, and duplicates.

    Ends with status 1 when something is wrong. Example: `hjepa-mlx datasets verify cifar10`
    """
    from rich.console import Console

    from hjepa_mlx.config import Data
    from hjepa_mlx.data.verify import verify as run
    from hjepa_mlx.progress import say

    console = Console()
    check_writable(json_file)
    checks = run(Data(name=name, dir=data_dir))
    if json_file != "-":
        for check in checks:
            say(console, f"{'right' if check.right else 'WRONG'}  {check.what}: {check.found}")
    output_json([asdict(check) for check in checks], json_file)
    if not all(check.right for check in checks):
        raise typer.Exit(1)


@datasets.command()
@readable
def combine(
    names: Annotated[list[str], typer.Argument(help="Two or more data sets.")],
    weights: Annotated[
        list[float] | None,
        typer.Option("--weight", help="Share of each, in order. Default: proportional to size."),
    ] = None,
    out: Annotated[
        str | None, typer.Option(help="File to write. Default: NAME_NAME.yaml here.")
    ] = None,
) -> None:
    """Write a recipe that trains on several data sets; it is evaluated on the first.

    Example: `hjepa-mlx datasets combine imagenet100 stl10 --weight 2 --weight 1`
    """
    from hjepa_mlx.data.combine import combine as run

    path = Path(out) if out else Path("_".join(names) + ".yaml")
    words = run(names, path, weights)
    print(f"{path}: {words}. Train with: hjepa-mlx train {quote(str(path))}")
