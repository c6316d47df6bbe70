"""The package's shape: imports follow the map in CONTRIBUTING.md; files and functions are short."""

import ast
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "hjepa_mlx"
FOLDERS = ("hjepa_mlx", "tests", "tools", "benchmarks")
FILE, FUNCTION = 300, 50  # lines


def test_the_first_changes_can_be_applied() -> None:
    diffs = re.findall("```diff\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(), re.DOTALL)
    assert len(diffs) == 3
    for diff in diffs:
        command = ["patch", "-p1", "--dry-run", "--fuzz=0"]
        subprocess.run(command, cwd=ROOT, input=diff.encode(), check=True)


def on_the_map() -> list[str]:
    """Modules and folders of the package, in the order in which they may be imported."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    drawing = text.split("\nhjepa_mlx/\n")[1].split("\nconfigs/")[0]
    names = [re.split("  +", line.strip())[0] for line in drawing.splitlines()]
    return [name.rstrip("/") for line in names for name in line.split()]


def imported(tree: ast.AST) -> Iterator[str]:
    """Modules of the package that are imported anywhere, unless for type checking only."""
    if isinstance(tree, ast.If) and ast.unparse(tree.test).endswith("TYPE_CHECKING"):
        return
    names = []
    if isinstance(tree, ast.Import):
        names = [alias.name for alias in tree.names]
    elif isinstance(tree, ast.ImportFrom):
        names = [f"{tree.module}.{alias.name}" for alias in tree.names]
    yield from (name.split(".")[1] for name in names if name.startswith("hjepa_mlx."))
    for child in ast.iter_child_nodes(tree):
        yield from imported(child)


def test_the_map_names_every_module_once() -> None:
    found = [path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or path.is_dir()]
    assert sorted(on_the_map()) == sorted(x for x in found if x[0] != "_" and x != "configs")


def test_no_module_imports_from_below_it_on_the_map() -> None:
    order, wrong = on_the_map(), []
    for number, own in enumerate(order):
        allowed = {*order[: number + 1], "__version__"}
        for path in (PACKAGE / f"{own}.py", *(PACKAGE / own).rglob("*.py")):
            names = set(imported(ast.parse(path.read_text()))) if path.is_file() else set()
            wrong += [f"{path.relative_to(ROOT)} imports {name}" for name in names - allowed]
    assert not wrong, "\n".join(wrong)


def test_no_file_and_no_function_is_too_long() -> None:
    long = []
    for path in (path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")):
        tree, lines = ast.parse(path.read_text()), len(path.read_text().splitlines())
        sizes = [("the file", lines, FILE)]
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                sizes.append((node.name, (node.end_lineno or 0) - node.lineno + 1, FUNCTION))
        long += [f"{path}: {name} has {n} lines" for name, n, most in sizes if n > most]
    assert not long, "\n".join(long)
