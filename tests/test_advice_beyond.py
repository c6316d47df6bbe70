"""Advice is followed that takes more than a command: packages, disks, and Python."""

import ast
import html
import re
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import layouts
import pytest
import typer
from commands import advised, do, works
from layouts import CMC

import hjepa_mlx as hj
from hjepa_mlx import backend, cli, saving
from hjepa_mlx.cli import app
from hjepa_mlx.config import Config
from hjepa_mlx.costs import costs
from hjepa_mlx.losses import smooth_l1
from hjepa_mlx.masks import Masks
from hjepa_mlx.models.hjepa import HJEPA
from hjepa_mlx.recipes import RETIRED, dotted_keys, load_config
from hjepa_mlx.viz import page

ROOT = Path(__file__).parent.parent
ENDINGS = {"safetensors", "onnx", "mlpackage"}  # of files
TINY = "train tiny.yaml --run-dir"
pytestmark = pytest.mark.usefixtures("here")


# Names in messages


def messages() -> str:
    """All texts in the package but docstrings, without what is put in."""
    found = []
    for path in (ROOT / "hjepa_mlx").rglob("*.py"):
        nodes = list(ast.walk(ast.parse(path.read_text())))
        described = {id(x.value) for x in nodes if isinstance(x, ast.Expr)}
        found += [x for x in nodes if isinstance(x, ast.Constant) and id(x) not in described]
    return "\n".join(x.value for x in found if isinstance(x.value, str))


def test_every_key_and_option_that_a_message_names_exists() -> None:
    sections = "data|model|masks|loss|optim|run|views|finetune"
    keys = set(re.findall(rf"(?<![\w.])(?:{sections})\.[a-z_]+", messages()))
    assert len(keys) > 30
    keys = {key for key in keys if key.split(".")[1] not in ENDINGS}
    assert keys <= {*dotted_keys(), *RETIRED}
    command = typer.main.get_command(app)
    own = [command, *command.commands.values(), *command.commands["datasets"].commands.values()]
    options = {name for one in own for option in one.params for name in option.opts}
    assert set(re.findall(r" \(?(--[a-z-]+)", messages())) <= options


def test_every_extra_that_a_message_names_exists_and_brings_the_package() -> None:
    extras = dict(re.findall(r"(?ms)^(\w+) = (\[.*?\])$", (ROOT / "pyproject.toml").read_text()))
    named = set(re.findall(r"hjepa-mlx\[(\w+)\]", messages()))
    assert named <= extras.keys()
    sources = "".join(path.read_text() for path in (ROOT / "hjepa_mlx").rglob("*.py"))
    asked = re.findall(r'required\(\s*"([\w.]+)", "(\w+)"', sources)
    assert len(asked) > 3
    for module, extra in [*asked, ("pyarrow", "hub"), ("matplotlib", "viz")]:
        assert f'"{module.split(".")[0].replace("_", "-")}>=' in extras[extra]


# Packages


@pytest.mark.parametrize(
    ("module", "command", "extra"),
    [
        ("pyarrow", "embed run pictures --out f.parquet", "hub"),
        ("pyarrow", "datasets prepare imagenet100 --data-dir hundred", "hub"),
        ("matplotlib", "viz run", "viz"),
    ],
)
def test_with_the_package_that_was_missing_the_command_works(
    module: str, command: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "hundred" in command:
        layouts.parquet(Path("hundred/imagenet100"), layouts.photos(CMC, train=1))
    with monkeypatch.context() as without:
        without.setitem(sys.modules, module, None)
        for name in [name for name in sys.modules if name.startswith("hjepa_mlx.viz")]:
            without.delitem(sys.modules, name)
        advised(command, rf"pip install 'hjepa-mlx\[{extra}\]'")
    works(command)


def test_names_too_long_for_a_safetensors_file_fit_into_the_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("hjepa_mlx.embed.LONGEST_HEADER", 1)
    found = advised("embed run pictures --out n.safetensors", r"cannot hold 40 names; use (\.npz)")
    works(f"embed run pictures --out n{found[1]}")


def test_with_the_compiler_that_was_missing_nothing_is_advised(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if not shutil.which("g++") or sys.platform != "linux":
        pytest.skip("there is no g++, or none is needed")
    monkeypatch.setattr("hjepa_mlx.bench.machine.MATMUL_SIDE", 256)
    with monkeypatch.context() as without:
        without.setenv("PATH", "/nowhere")
        assert "not compiled without g++. Install it" in do("doctor")[1]
    assert "g++" not in do("doctor")[1]


# Disks and memory


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """A folder `small` on a disk that has as many bytes free as this is called with."""
    shutil.rmtree("small", ignore_errors=True)
    Path("small").mkdir()
    usage = shutil.disk_usage("/")

    def leave(free: int) -> None:
        def of(place: Path) -> object:
            return usage._replace(free=free) if "small" in Path(place).parts else usage

        monkeypatch.setattr(shutil, "disk_usage", of)

    leave(1000)
    return leave


@pytest.mark.parametrize(
    ("command", "option"),
    [
        (f"{TINY} small/run", "--run-dir"),
        ("datasets prepare folder --data-dir pictures --out small/made", "--out"),
        ("embed run pictures --out small/e.npz", "--out"),
    ],
)
def test_on_another_disk_or_with_more_room_the_command_works(
    small: Callable[[int], None], command: str, option: str
) -> None:
    advised(command, f"Free some, .*another .*{option}")
    works(command.replace("small", "large-" + option))
    small(10**12)
    works(command)


def test_the_room_for_one_checkpoint_is_found_by_keeping_fewer(
    small: Callable[[int], None],
) -> None:
    folder = hj.Run("run").latest
    assert folder is not None
    small(sum(path.stat().st_size for path in folder.iterdir()) * 5 // 2)
    advised(f"{TINY} small/run", r"lower run\.keep_last\.$")
    works(f"{TINY} small/run --set run.keep_last=1")


def test_features_find_room_in_another_temporary_folder_or_with_fewer_images(
    small: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hjepa_mlx.eval.features.IN_MEMORY", 0)
    monkeypatch.setattr(tempfile, "tempdir", "small")
    command = "eval run --draws 0"
    small(500_000)
    advised(command, "set TMPDIR to a larger disk, or lower eval --attentive-images")
    works(f"{command} --attentive-images 0")
    monkeypatch.setattr(tempfile, "tempdir", ".")
    works(command)


def test_a_step_that_needs_too_much_memory_fits_after_what_is_advised(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    set_ = "--set data.batch_size=4", "--set model.checkpoint_blocks=true"
    least = []
    for one in set_:
        config = load_config("tiny.yaml", [one.removeprefix("--set ")])
        least.append(costs(config, HJEPA(config)).memory_gb)
    monkeypatch.setattr(backend, "step_memory_gb", lambda: max(least))
    advice = "Lower data.batch_size, or set model.checkpoint_blocks=true"
    assert advice in do(f"{TINY} warned")[1]
    for number, one in enumerate(set_):
        assert advice not in do(f"{TINY} calm{number} --set optim.epochs=1 {one}")[1]


# Runs and Python


def test_what_nobody_foresaw_is_shown_in_full_as_its_line_says(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("hjepa_mlx.data.overview.overview", lambda _: 1 / 0)
    monkeypatch.delenv("HJEPA_DEBUG", raising=False)
    option = advised("datasets list", r"unexpected ZeroDivisionError: .* \((--debug) shows where")[
        1
    ]
    monkeypatch.setenv("HJEPA_DEBUG", "")  # to be forgotten afterwards
    monkeypatch.setattr(sys, "argv", ["hjepa-mlx", "datasets", "list", option])
    with pytest.raises(SystemExit):
        cli.main()
    assert "in <lambda>" in capsys.readouterr().err


def test_a_frozen_encoder_is_left_where_fine_tuning_made_it_worse(
    capsys: pytest.CaptureFixture[str],
) -> None:
    scores = {"frozen": 90.0, "fine_tuned": 80.0, "test_images": 4}
    sys.modules["hjepa_mlx.cli.finetune"]._say(scores, Path("worse"))  # type: ignore[attr-defined]
    found = re.search("or take (--freeze)", capsys.readouterr().err)
    assert found
    assert "worse" not in works(f"finetune run {found[1]} --out frozen")


def test_an_evaluation_that_was_interrupted_is_made_by_the_command_it_names(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    finished = SimpleNamespace(done=8, total=8, run=hj.Run("run"))
    said = [saving.stopped(finished)]  # by a Ctrl-C in the last step
    with monkeypatch.context() as patch:
        patch.setattr(sys.modules["hjepa_mlx.cli.train"], "report", interrupted)
        said.append(do(f"{TINY} late --set run.final_eval=true")[1])
    for line in said:
        found = re.search("Evaluate with: hjepa-mlx (eval .*)", line)
        assert found, line
        works(f"{found[1]} --draws 0 --attentive-images 0")


def test_a_page_names_the_command_that_evaluates_again() -> None:
    shutil.copytree("run", "a run")
    Path("a run/eval.json").write_text("{")
    found = re.search(
        "Run `hjepa-mlx (eval .*)` to", html.unescape(page.evaluation(hj.Run("a run")))
    )
    assert found
    works(f"{found[1]} --draws 0 --attentive-images 0")
    assert "damaged" not in page.evaluation(hj.Run("a run"))


def without_views(config: Config) -> Callable[[int, int], Masks]:
    draw = hj.MaskSampler(config)
    return lambda step, count: draw(step, count)._replace(views=None)


IMAGE, VIEW, LARGER = "model.level_pool=[1,2,image]", "views.count=1", "data.image_size=64"
STAGES = "data.progressive=[[32,0.5]]"


@pytest.mark.parametrize(
    ("overrides", "part", "advice", "more", "instead"),
    [
        ([], lambda _: {"loss_fn": lambda p, t: (p - t).square()}, "must return one number",
         [], lambda _: {"loss_fn": smooth_l1}),
        ([], lambda _: {"sampler": hj.MaskSampler(load_config("demo", [LARGER]))},
         "Make it from this config", [], lambda c: {"sampler": hj.MaskSampler(c)}),
        ([IMAGE, VIEW], lambda c: {"sampler": without_views(c)},
         "Take them from MaskSampler's masks", [], lambda c: {"sampler": hj.MaskSampler(c)}),
        ([IMAGE, VIEW], lambda c: {"sampler": without_views(c)}, "or set views.count to 0",
         ["views.count=0"], lambda c: {"sampler": without_views(c)}),
        ([LARGER, STAGES], lambda c: {"sampler": hj.MaskSampler(c)}, "give no sampler",
         [], lambda _: {}),
        ([], lambda _: {"model": HJEPA(load_config("demo"))}, r"Build it .*: hj\.HJEPA\(config\)",
         [], lambda c: {"model": hj.HJEPA(c)}),
    ],
)  # fmt: skip
def test_parts_of_ones_own_work_after_what_is_advised(
    overrides: list[str],
    part: Callable[[Config], dict],
    advice: str,
    more: list[str],
    instead: Callable[[Config], dict],
    tmp_path: Path,
) -> None:
    common = [f"run.dir={tmp_path / 'run'}", "optim.epochs=1", *overrides]
    config = load_config("tiny.yaml", common)
    with pytest.raises(hj.HJEPAError, match=advice):
        hj.train(config, **part(config))
    config = load_config("tiny.yaml", [*common, *more])
    assert hj.train(config, **instead(config)).latest
