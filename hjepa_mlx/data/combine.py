"""`hjepa-mlx datasets combine`: a recipe that trains on several data sets."""

from __future__ import annotations

import re
from pathlib import Path
from shlex import quote

import yaml

from hjepa_mlx.data.catalog import CATALOG
from hjepa_mlx.data.source import check_name
from hjepa_mlx.errors import UsageError
from hjepa_mlx.files import atomic_write
from hjepa_mlx.recipes import find_config

BASE = "imagenet100"  # the recipe that a combined one starts from


def combine(names: list[str], path: Path) -> str:
    """Write a recipe that trains on all of `names` to `path`; returns the mix in words.

    A pass shows each image once; evaluation is on the first. Raises UsageError for data sets
    that cannot be combined.
    """
    names = [part for name in names for part in name.split("+")]
    if len(names) < 2:
        raise UsageError(f"Two or more data sets are needed; given: {' '.join(names)}.")
    check_name("+".join(names))
    if path.suffix not in (".yaml", ".yml") or not path.parent.is_dir():
        raise UsageError(f"{path} must be a .yaml file in a folder that exists.")
    if path.exists():
        raise UsageError(f"{path} exists already; give another file.")
    images = {name: CATALOG[name].images for name in names}
    total = sum(images.values())
    mix = ", ".join(f"{count / total:.1%} {name}" for name, count in images.items())
    words = f"{total:,} images a pass: {mix}"
    tree = yaml.safe_load(find_config(BASE).read_text())
    tree["name"] = re.sub(r"[^\w.-]", "-", path.stem)
    tree["data"]["name"] = "+".join(names)
    head = f"# hjepa-mlx train {quote(str(path))}\n# {words}; evaluated on {names[0]}. "
    body = yaml.safe_dump(tree, sort_keys=False, default_flow_style=None)
    with atomic_write(path) as file:
        file.write(f"{head}Otherwise the recipe {BASE}.\n{body}".encode())
    return words
