"""`hjepa-mlx datasets`: which there are, and from nothing on disk to one that trains."""

from __future__ import annotations

import os
import shutil
from dataclasses import asdict
from pathlib import Path
from shlex import quote
from typing import Annotated

import typer
from rich.console import Console

from hjepa_mlx.cli.common import DataDir, JsonFile, output_json, readable
from hjepa_mlx.data import prepared
from hjepa_mlx.data.catalog import CATALOG, look_up
from hjepa_mlx.data.source import data_root
from hjepa_mlx.errors import UsageError, counted
from hjepa_mlx.progress import say
from hjepa_mlx.recipes import parse
from hjepa_mlx.sections import Data
from hjepa_mlx.session import awake

datasets = typer.Typer(
    help="List, download, prepare, verify, check and combine data sets.", no_args_is_help=True
)
Name = Annotated[str, typer.Argument(help="Name of a data set: see `hjepa-mlx datasets list`.")]
NameOrFolder = Annotated[str, typer.Argument(help="Name of a data set, or folder.")]
Labels = Annotated[
    str, typer.Option(help="Of a folder: auto, folders, none, or a .csv file of path,label.")
]


@datasets.command(name="list")
@readable
def list_datasets(data_dir: DataDir = None, json_file: JsonFile = None) -> None:
    """Compare the data sets, and say which are on this machine.

    Example: `hjepa-mlx datasets list`
    """
    from hjepa_mlx.data.overview import overview
    from hjepa_mlx.tables import datasets as tables

    facts = overview(Data(dir=data_dir))
    if output_json(facts, json_file):
        for table in tables.datasets(facts):
            Console().print(table)


@datasets.command()
@readable
@awake()
def download(
    name: Name,
    data_dir: DataDir = None,
    remove_originals: Annotated[
        bool, typer.Option("--remove-originals", help="Delete the downloaded files afterwards.")
    ] = False,
) -> None:
    """Download a data set, check it and prepare it for training, or go on where it stopped.

    Example: `hjepa-mlx datasets download stl10`
    """
    from hjepa_mlx.data.fetch import fetch, size_of

    row = look_up(name)
    print(f"{row.title}: {row.download_gb:g} GB. Terms: {row.terms}")
    root = data_root(Data(dir=data_dir))
    originals = fetch(name, root, remove_originals)
    for part in row.parts or (name,):
        if folder := prepared.find(part, root):
            _print_contents(part, folder)
    if originals:
        size = sum(map(size_of, originals)) / 1e9
        done = "Removed" if remove_originals else "Not needed any more"
        print(f"{done}: {', '.join(map(str, originals))} ({size:.2f} GB)")
    for path in originals if remove_originals else ():
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    more = "" if data_dir is None else f" --data-dir {quote(data_dir)}"
    print(f"Ready. Train with: hjepa-mlx train {name.replace('+', '_')}{more}")


@datasets.command()
@readable
@awake()
def prepare(
    name: NameOrFolder,
    data_dir: DataDir = None,
    out: Annotated[
        str | None, typer.Option(help="Folder to write to. Default: `prepared` beside the data.")
    ] = None,
    side: Annotated[
        int, typer.Option(min=16, max=4096, help="Short side of photographs; none is enlarged.")
    ] = 256,
    quality: Annotated[int, typer.Option(min=1, max=100, help="Quality of their JPEGs.")] = 90,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Images worked on at once. Default: all cores.")
    ] = None,
    labels: Labels = "auto",
) -> None:
    """Prepare files that are here already for training: smaller JPEGs in shards, or raw pixels.

    An interrupted call goes on where it stopped. ImageNet-100 is also cut out of an ImageNet-1K.

    Example: `hjepa-mlx datasets prepare imagenet100`
    """
    from hjepa_mlx.data.prepare import originals_of
    from hjepa_mlx.data.prepare import prepare as run

    if name == "folder" and (out is None or data_dir is None):
        raise UsageError("prepare folder needs --data-dir PICTURES and --out FOLDER.")
    if name != "folder" and labels != "auto":
        raise UsageError("--labels is of your own pictures: datasets prepare folder.")
    if "+" in name:
        raise UsageError(f"Prepare one data set at a time: {name.replace('+', ', then ')}.")
    root = data_root(Data(dir=data_dir))
    folder = Path(os.path.expanduser(out)) if out else root / name / prepared.FOLDER
    if ready := None if out else prepared.find(name, root):
        folder, made = ready, prepared.manifest(ready)
        options = ", with --side {short_side} --quality {jpeg_quality}"
        how = options.format(**made) if "short_side" in made else ""
        print(f"It is prepared already{how}. Delete {folder} to do it again.")
    else:
        originals = originals_of(name, root, parse({"data": {"labels": labels}}).data.labels)
        for note in originals["train"].notes:
            print(note)
        run(name, originals, folder, side, quality, workers)
    _print_contents(name, folder)


def _print_contents(name: str, folder: Path) -> None:
    """Images and size of a prepared data set; how many were left out, or are too few."""
    from hjepa_mlx.data.fetch import size_of

    for split, part in prepared.manifest(folder)["splits"].items():
        published = CATALOG[name].splits[split] if name in CATALOG else part["images"]
        words = f"{split}: {counted(part['images'])}"
        if part["skipped"]:
            words += (
                f", {len(part['skipped'])} left out: unreadable, named in "
                f"{folder / prepared.MANIFEST}. The originals are kept"
            )
        if part["images"] < published:
            words += f" (published: {published:,})"
        print(words)
    print(f"{size_of(folder) / 1e9:.2f} GB in {folder}")


@datasets.command()
@readable
@awake()
def verify(name: NameOrFolder, data_dir: DataDir = None, json_file: JsonFile = None) -> None:
    """Check counts, checksums, classes, that every image can be read, and duplicates.

    Ends with status 1 when something is wrong. Example: `hjepa-mlx datasets verify cifar10`
    """
    own = data_dir is None and name not in CATALOG and Path(name).exists()
    _verify(Data(name="folder", dir=name) if own else Data(name=name, dir=data_dir), json_file)


@datasets.command()
@readable
@awake()
def check(
    folder: Annotated[str, typer.Argument(help="Folder, or .txt file with a path a line.")],
    labels: Labels = "auto",
    json_file: JsonFile = None,
) -> None:
    """Show what `train` would use of your own pictures, and what not, and why.

    Formats, sizes, colour, classes, copies, unreadable images, which training leaves out. Ends
    with status 1 when a split has none that can be read.

    Example: `hjepa-mlx datasets check pictures`
    """
    data = {"name": "folder", "dir": folder, "labels": labels}
    _verify(parse({"data": data}).data, json_file)


def _verify(data: Data, json_file: str | None) -> None:
    """Print what `verify` finds; status 1 when something is wrong."""
    from hjepa_mlx.data.verify import verify as run

    checks = run(data)
    words = {True: "right", False: "WRONG", None: "     "}
    if output_json([asdict(one) for one in checks], json_file):
        for one in checks:
            say(Console(), f"{words[one.right]}  {one.what}: {one.found}")
    if any(one.right is False for one in checks):
        raise typer.Exit(1)


@datasets.command()
@readable
def combine(
    names: Annotated[list[str], typer.Argument(help="Two or more data sets.")],
    out: Annotated[
        str | None, typer.Option(help="File to write. Default: NAME_NAME.yaml here.")
    ] = None,
) -> None:
    """Write a recipe that trains on several data sets; it is evaluated on the first.

    Example: `hjepa-mlx datasets combine imagenet100 stl10`
    """
    from hjepa_mlx.data.combine import combine as run

    path = Path(out) if out else Path("_".join(names) + ".yaml")
    words = run(names, path)
    print(f"{path}: {words}. Train with: hjepa-mlx train {quote(str(path))}")
