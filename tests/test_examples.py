"""Every command has an example; every example in the docs parses, and is run, here or elsewhere."""

import re
import shlex
import shutil
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import typer
from commands import pictures
from typer.testing import CliRunner

from hjepa_mlx.bench import fit
from hjepa_mlx.cli import app
from hjepa_mlx.recipes import dotted_keys

ROOT, RUN = Path(__file__).parent.parent, "runs/demo-20260101-120000"
DOCS = "README.md", "docs/guide.md", "docs/datasets.md", "docs/evaluation.md"
LAUNCH = r"((?:mlx\.launch [^`\n]*)?hjepa-mlx [^`{}]*)"
EXAMPLE = re.compile(rf"`{LAUNCH.format('')}`|^{LAUNCH.format(chr(92) + 'n')}$", re.MULTILINE)
# Names in examples, and what stands in for them here
HERE = {
    "RUN RUN": "first runs/second", "RUN": Path(RUN).name, "RECIPE": "tiny.yaml",
    "WHAT": "runs/first", "demo --init": "tiny.yaml --init", "imagenet100 --set": "tiny.yaml --set",
    "NAME": "tiny.yaml", "FOLDER": "pictures",
    "--hours 8": "--hours 8 --set model.size=nano",
    "~/pictures": "pictures", "~/small": "small",
    "FORMAT": "safetensors", "--to timm": "--to safetensors --out timm",
}  # fmt: skip
MADE = {"finetune": f"{RUN}/finetuned", "export": "timm"}  # by an earlier example
SHORT = {"eval": "--draws 0 --attentive-images 0", "finetune": "--set finetune.epochs=1"}
# Examples that need ranks, the network, published data or minutes: these files run such commands
ELSEWHERE = {
    r"mlx\.launch": "test_ranks.py",
    "hjepa-mlx datasets download": "test_fetch.py",
    "hjepa-mlx datasets prepare (?!folder)": "test_prepare.py",
    "hjepa-mlx datasets verify": "test_verify.py",
    "hjepa-mlx bench": "test_bench.py",
    "hjepa-mlx (push|.*hf:)": "test_push.py",
    r"hjepa-mlx .* --init \S+\.(safetensors|tar)": "test_init.py",
    "hjepa-mlx eval RUN --data [a-z-]+$": "test_recipes.py",
}


def commands(command: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Every command of the command line by its name, as `datasets list`."""
    for part, inner in getattr(command, "commands", {}).items():
        yield from commands(inner, f"{name} {part}".strip())
    if not hasattr(command, "commands"):
        yield name, command


COMMANDS = dict(commands(typer.main.get_command(app)))


def examples(text: str) -> list[str]:
    """The commands in a text."""
    found = (" ".join((span or line).split()) for span, line in EXAMPLE.findall(text))
    return [one.removesuffix(" …") for one in found if not one.startswith("hjepa-mlx trains ")]


def words_of(example: str) -> tuple[str, list[str]]:
    """The name of an example's command, and its arguments."""
    words = shlex.split(example.split("hjepa-mlx ")[1])
    count = 2 if words[0] == "datasets" else 1
    return " ".join(words[:count]), words[count:]


EVERY = dict.fromkeys(one for name in DOCS for one in examples((ROOT / name).read_text()))
EVERY |= dict.fromkeys(one for _, own in COMMANDS.items() for one in examples(own.help))


@pytest.mark.parametrize("name", COMMANDS)
def test_the_help_of_a_command_has_an_example_of_it(name: str) -> None:
    assert name in {words_of(one)[0] for one in examples(COMMANDS[name].help)}


@pytest.mark.parametrize("example", EVERY)
def test_an_example_has_options_and_keys_that_exist(example: str) -> None:
    name, words = words_of(example)
    COMMANDS[name].make_context(name, list(words))  # UsageError: no such option, one too few
    for option, value in pairwise(words):
        assert option != "--set" or value.split("=")[0] in dotted_keys(), value


@pytest.mark.timeout(900)  # seconds, of a busy machine: it takes 40 of a free core
def test_examples_end_well(prepared: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(fit, "LONGEST", 0.1)  # seconds of measuring
    shutil.copy(prepared / "tiny.yaml", "tiny.yaml")
    for folder in ("pictures", "more"):
        pictures(Path(folder), 40)
    shutil.copy("pictures/a/00.jpg", "one.jpg")
    for run in (RUN, "runs/first", "runs/second"):
        shutil.copytree(prepared / "run", run)
    done = set()
    for example in EVERY:
        if file := next((file for kind, file in ELSEWHERE.items() if re.match(kind, example)), ""):
            name = words_of(example)[0].split()[-1]
            assert name in (ROOT / "tests" / file).read_text(), example
            continue
        for name, here in HERE.items():
            example = re.sub(rf"(?<!\S){name}(?![\w-])", here, example)
        command, words = words_of(example)
        words += SHORT.get(command, "").split()
        if command == "train" and words[0] != "tiny.yaml" and "--resume" not in words:
            words.append("--dry-run")
        if (command, *words) in done:
            continue
        done.add((command, *words))
        shutil.rmtree(MADE.get(command, "nothing"), ignore_errors=True)
        ended = CliRunner().invoke(app, [*command.split(), *words])
        assert ended.exit_code == 0, f"{command} {words}: {ended.output}"
