"""`datasets list` and `combine`: what they say of a data set is true of it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import layouts
import pytest
from layouts import CMC
from typer.testing import CliRunner

from hjepa_mlx import backend
from hjepa_mlx.cli import app
from hjepa_mlx.data import catalog
from hjepa_mlx.data.catalog import CATALOG
from hjepa_mlx.data.combine import combine
from hjepa_mlx.data.source import open_source
from hjepa_mlx.errors import UsageError
from hjepa_mlx.recipes import load_config


def hjepa(*arguments: object):
    return CliRunner().invoke(app, ["datasets", *map(str, arguments)])


def test_list_shows_the_promises_and_what_is_here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    layouts.stl10(tmp_path / "stl10", 10, 8, 20)
    layouts.prepared(tmp_path, "stl10")
    layouts.tars(tmp_path / "imagenet1k", layouts.photos(CMC[:2]))
    ended = hjepa("list", "--data-dir", tmp_path, "--json", "-")
    rows = {row["name"]: row for row in json.loads(ended.output)["datasets"]}
    assert list(rows) == list(catalog.CATALOG)
    assert rows["stl10"]["here"]["layout"] == "prepared"
    assert rows["demo"]["here"]["layout"] == "in the package"
    assert rows["imagenet1k"]["here"]["layout"] == "tar archives, not prepared"
    assert rows["imagenet100"]["here"]["layout"] == "imagenet1k: tar archives, not prepared"
    assert rows["imagenet100+stl10"]["here"]["layout"] is None
    assert rows["cifar10"]["here"]["layout"] is None
    assert rows["imagenet100"]["promised"]["hours"] == [10, 15]
    text = hjepa("list", "--data-dir", tmp_path).output
    assert "quick experimentation" in text
    assert "7–10 d" in text


def test_the_promises_are_those_of_the_founding_comparison():
    promises = {name: row.promise for name, row in CATALOG.items() if row.promise}
    assert {name: promise.hours for name, promise in promises.items()} == {
        "cifar10": (2, 3),
        "stl10": (8, 12),
        "imagenet100": (10, 15),
        "imagenet100+stl10": (18, 24),
        "imagenet1k": (7 * 24, 10 * 24),
    }
    assert CATALOG["imagenet100+stl10"].images == 226_689


# combine


def test_combine_writes_a_recipe_that_can_be_trained(tmp_path):
    path = tmp_path / "both.yaml"
    assert "44.1% stl10" in combine(["imagenet100", "stl10"], path)
    config = load_config(path)
    assert config.data.name == "imagenet100+stl10"
    assert config.model == load_config("imagenet100").model
    layouts.folders(tmp_path / "imagenet100", layouts.photos(CMC))
    layouts.stl10(tmp_path / "stl10", 10, 8, 100)
    for name in ("imagenet100", "stl10"):
        layouts.prepared(tmp_path, name)
    config.data.dir = str(tmp_path)
    assert len(open_source(config.data, "pretrain")) == 300


def test_the_tools_do_what_the_commands_do(tmp_path):
    tools, path = Path(__file__).parent.parent / "tools", tmp_path / "both.yaml"
    arguments = ["--datasets", "imagenet100", "stl10", "--output-config", str(path)]
    command = [sys.executable, str(tools / "create_combined_dataset.py"), *arguments]
    subprocess.run(command, check=True, capture_output=True)
    assert load_config(path).data.name == "imagenet100+stl10"
    command = [sys.executable, str(tools / "download_data.py"), "--dataset", "imagenet101"]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 2
    assert "imagenet100" in ended.stderr


def test_combine_refuses_what_cannot_be_combined(tmp_path):
    path = tmp_path / "x.yaml"
    for names in (["stl10"], ["stl10", "stl10"], ["stl10", "folder"], ["stl10", "nope"]):
        with pytest.raises(UsageError):
            combine(names, path)
    for bad in (tmp_path / "x.txt", tmp_path / "missing" / "x.yaml"):
        with pytest.raises(UsageError, match=r"must be a \.yaml file in a folder that exists"):
            combine(["stl10", "cifar10"], bad)
    with pytest.raises(UsageError):
        combine(["imagenet100+stl10", "stl10"], path)
    assert not list(tmp_path.iterdir())


def test_hours_are_those_of_the_newest_benchmark(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    results = tmp_path / "benchmarks" / "results"
    results.mkdir(parents=True)
    for age, (name, hours) in enumerate((("a", 11.75), ("z", 99.0))):
        path = results / f"{name}.json"
        estimates = [{"dataset": "stl10", "hours_100_epochs": hours}]
        facts = {"machine": {"chip": backend.chip()}, "estimates": estimates}
        path.write_text(json.dumps(facts))
        os.utime(path, (1e9 - age, 1e9 - age))
    (results / "broken.json").write_text('{"estimates": [')
    (results / "other.json").write_text(json.dumps({"images_per_second": 1}))
    (line,) = (line for line in hjepa("list").output.splitlines() if "quick alternative" in line)
    assert line.split()[-1] == "11.8"


def test_bad_input_of_verify_and_list_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for arguments, says in (
        (("verify", "stl1"), "mean 'stl10'"),
        (("verify", "folder"), "give --data-dir FOLDER"),
        (("verify", "stl10", "--json", "no/such.json"), "folder no does not exist"),
        (("list", "--json", "."), "is a folder"),
    ):
        ended = hjepa(*arguments)
        assert ended.exit_code == 2, arguments
        assert says in ended.output
        assert ended.output.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_combine_names_its_file_and_does_not_write_over_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first = hjepa("combine", "stl10", "cifar10")
    assert first.exit_code == 0
    assert "Train with: hjepa-mlx train stl10_cifar10.yaml" in first.output
    written = (tmp_path / "stl10_cifar10.yaml").read_bytes()
    assert load_config(tmp_path / "stl10_cifar10.yaml").data.name == "stl10+cifar10"
    again = hjepa("combine", "stl10", "cifar10")
    assert again.exit_code == 2
    assert "exists already" in again.output
    assert (tmp_path / "stl10_cifar10.yaml").read_bytes() == written
