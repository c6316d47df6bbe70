"""Recipes: find one, read its YAML strictly, apply overrides, and explain errors in one line."""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from hjepa_mlx.config import Config
from hjepa_mlx.errors import UsageError, did_you_mean
from hjepa_mlx.files import read

LARGEST = 1_000_000  # bytes
MOST_ALIASES = 20
LONGEST = 300  # characters of a value in a message
ALIASES = {"m1_max_imagenet100_100epoch": "imagenet100"}
RETIRED = {  # keys of earlier versions: runs still have them, recipes may not
    "data.weights": "a pass shows each image of each data set once",
    "run.eval_share": "k-NN while training runs every run.eval_every_epochs",
    "run.milestone_epochs": "the last run.keep_last checkpoints are kept",
    "run.signals_every": "collapse signals come with every tenth logged row",
}
WRITTEN = {"precision", "compile", "data", "model", "masks", "loss", "optim", "run"}  # by each run


class _Loader(yaml.SafeLoader):
    """SafeLoader that reads 3e-4 as a number, as YAML 1.2 does, and refuses a key given twice.

    Also more than a few aliases: each can double all that there is.
    """

    aliases = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """The next node."""
        self.aliases += self.check_event(yaml.AliasEvent)
        if self.aliases > MOST_ALIASES:
            raise yaml.YAMLError(f"there are more than {MOST_ALIASES} aliases")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """The mapping of a node whose keys differ."""
        keys = [key.value for key, _ in node.value]
        twice = [key for number, key in enumerate(keys) if key in keys[:number]]
        if twice:
            raise yaml.YAMLError(f"'{twice[0]}' is given twice in one section{node.start_mark}")
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?$"),
    list("-+.0123456789"),
)
# An integer also matches the pattern above: integers are tried first.
for _first in "-+0123456789":
    _resolvers = _Loader.yaml_implicit_resolvers[_first]
    _resolvers.sort(key=lambda resolver: resolver[0] != "tag:yaml.org,2002:int")


def config_folder() -> Path:
    """The folder of the recipes that come with the package."""
    inside = Path(__file__).parent / "configs"  # in a wheel
    return inside if inside.is_dir() else Path(__file__).parent.parent / "configs"


def config_names() -> list[str]:
    """Names of the recipes that come with the package."""
    folder = config_folder()
    files = [str(p.relative_to(folder).with_suffix("")) for p in folder.rglob("*.yaml")]
    return sorted([*files, *ALIASES])


def find_config(name_or_path: str) -> Path:
    """The YAML file of a recipe given by name or by path, or of a run given by its folder."""
    path, names = Path(name_or_path), config_names()
    if name_or_path in names:
        return config_folder() / f"{ALIASES.get(name_or_path, name_or_path)}.yaml"
    if (path / "config.yaml").is_file():
        return path / "config.yaml"
    if path.suffix in (".yaml", ".yml"):
        if path.is_file():
            return path
        raise UsageError(f"Config file {path} does not exist.")
    hint = did_you_mean(name_or_path, names)
    raise UsageError(
        f"No config named '{name_or_path}'.{hint} Give the path of a .yaml file or a run, or one "
        f"of: {', '.join(names)}."
    )


def load_config(name_or_path: str | Path, overrides: list[str] | None = None) -> Config:
    """Read a recipe, apply `a.b=value` overrides, check and resolve it.

    `load_config` resolves every `auto` that results depend on. Pass overrides to it; don't edit
    the result. Raises UsageError with one line that names the key, its value and the values
    allowed.
    """
    path = find_config(str(name_or_path))
    try:
        tree = _yaml(read(path, LARGEST).decode()) or {}
    except ValueError as error:
        raise UsageError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(tree, dict):
        raise UsageError(f"{path} must hold 'key: value' lines; it holds a {type(tree).__name__}.")
    tree = {key: {} if value is None else value for key, value in tree.items()}
    alias = str(name_or_path) if name_or_path in ALIASES else None
    tree.setdefault("name", alias or re.sub(r"[^\w.-]", "-", path.stem))
    if path.name == "config.yaml" and tree.keys() >= WRITTEN:
        _drop_retired(tree)
    for override in overrides or []:
        _override(tree, override)
    return parse(tree)


def _yaml(text: str) -> Any:
    """What YAML says; ValueError where it is none."""
    try:
        return yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, RecursionError, TypeError, LookupError, AttributeError) as error:
        raise ValueError(str(error)) from None


def _drop_retired(tree: dict[str, Any]) -> None:
    """Remove retired keys from a run's config; where new ones are missing, keep what was usual."""
    for key in RETIRED:
        section, _, last = key.partition(".")
        if isinstance(tree.get(section), dict):
            value = tree[section].pop(last, None)
            if key == "data.weights" and value not in (None, "auto"):
                raise UsageError(f"The run used data.weights={value}, which is gone: train anew.")
    if isinstance(data := tree.get("data"), dict) and "labels" not in data:
        data |= {"listing": 1, "bits": 16}
    if isinstance(optim := tree.get("optim"), dict):
        optim.setdefault("kind", "adamw")


def resolve(config: Config) -> Config:
    """A copy of a config that was edited, checked and resolved again. Raises UsageError."""
    return parse(config.model_dump())


def parse(tree: dict[str, Any]) -> Config:
    """The config of a tree of plain values, checked and resolved. Raises UsageError."""
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise UsageError(_explain(error)) from None


def _override(tree: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise UsageError(f"--set {override!r}: write it as key=value, e.g. optim.lr=3e-4.")
    try:
        value = _yaml(text)
    except ValueError:
        raise UsageError(f"--set {override!r}: the value is not valid YAML.") from None
    *sections, last = key.strip().split(".")
    for section in sections:
        tree = tree.setdefault(section, {})
        if not isinstance(tree, dict):
            raise UsageError(f"--set {override!r}: '{section}' is a value, not a section.")
    tree[last] = value


def dotted_keys(section: type[BaseModel] = Config, prefix: str = "") -> list[str]:
    """Every key of the schema, e.g. 'optim.lr'."""
    keys: list[str] = []
    for name, field in section.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            keys += dotted_keys(kind, f"{prefix}{name}.")
        else:
            keys.append(prefix + name)
    return keys


def _explain(error: ValidationError) -> str:
    """One line for the first mistake: the key, the reason and the value; or the nearest key."""
    errors = error.errors(include_url=False)
    first, known = errors[0], dotted_keys()
    location = [str(part) for part in first["loc"]]
    if not location:  # a rule between keys
        return str(first["ctx"]["error"])
    key = ".".join(location)
    if key in RETIRED:
        return f"Config key '{key}' is gone: {RETIRED[key]}. Delete it."
    if first["type"] == "extra_forbidden":
        same_name = [k for k in known if k.split(".")[-1] == location[-1]]
        near = same_name or difflib.get_close_matches(key, [*Config.model_fields, *known], 1, 0.4)
        return f"Unknown config key '{key}'." + (f" Did you mean '{near[0]}'?" if near else "")
    # pydantic puts union members' types and list places into the location: keep the schema's names
    while len(location) > 1 and ".".join(location) not in known:
        location.pop()
    here = [e for e in errors if [str(part) for part in e["loc"]][: len(location)] == location]
    reasons = [e["msg"].removeprefix("Value error, ") for e in here]
    reason = "; or ".join(dict.fromkeys(reasons)).replace("Input should", "it should")
    given = min(here, key=lambda e: len(e["loc"]))["input"]
    return f"Config key '{'.'.join(location)}': {reason} (given: {_short(given)})."


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= LONGEST else f"{text[:LONGEST]} …"
