"""The notebook runs and reads well as it is; Python in the documentation calls what exists."""

import ast
import base64
import inspect
import re
import shutil
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient
from nbformat import NotebookNode

ROOT = Path(__file__).parent.parent
NOTEBOOK = ROOT / "docs/notebooks/quickstart.ipynb"
LARGEST = 600_000  # bytes: every version of it stays in every clone
ABSOLUTE = re.compile(r"(^|[\s\"'(=>])(/[\w.-]+/|~/|[A-Z]:\\)", re.M)
SCORES = re.compile(r"(level_\d|whitened) +k-NN ([\d.]+) %  linear probe ([\d.]+) %")
DISTANCES = re.compile(r"step (\d+): cosine distance ([\d.]+)")
DOCUMENTED = sorted(
    str(path.relative_to(ROOT))
    for path in (ROOT / "README.md", *ROOT.glob("docs/*.md"))
    if "```python" in path.read_text()
)


@pytest.fixture
def kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the files that Jupyter writes in the temporary folder."""
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "jupyter"))
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(tmp_path / "jupyter/runtime"))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))


def execute(folder: Path, *names: str) -> dict[str, NotebookNode]:
    """Cells by name after running the notebook, or these code cells of it, in `folder`."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    notebook.cells = [cell for cell in notebook.cells if not names or cell.id in names]
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = []
    resources = {"metadata": {"path": str(folder)}}
    NotebookClient(notebook, timeout=600, kernel_name="python3", resources=resources).execute()
    return {cell.id: cell for cell in notebook.cells}


def text(cell: NotebookNode) -> str:
    """All that a cell printed or shows, as plain text."""
    parts = [o.get("text") or o.get("data", {}).get("text/plain", "") for o in cell.outputs]
    return "".join(parts)


def check(cells: dict[str, NotebookNode], steps: int) -> None:
    """The outputs a reader comes for: pictures, shapes, accuracies above chance, two runs."""
    for name in ("curves", "masks", "pca"):
        [png] = [o.data["image/png"] for o in cells[name].outputs]
        assert base64.b64decode(png).startswith(b"\x89PNG\r\n\x1a\n")
    assert f"step-{steps:08}" in text(cells["run"])
    assert "predictor_dim: 64" in text(cells["config"])
    for shape in ("(6, 32, 32, 3) uint8", *(f"level {level} (6, 64, 128)" for level in range(3))):
        assert shape in text(cells["encode"])
    scores = SCORES.findall(text(cells["scores"]))
    levels = ["level_0", "level_1", "level_2", "whitened"]
    assert [level for level, *_ in scores] == 2 * levels
    assert all(20 < float(accuracy) <= 100 for _, *pair in scores for accuracy in pair)
    distances = [list(map(float, found)) for found in DISTANCES.findall(text(cells["loss"]))]
    assert [step for step, *_ in distances] == [0, 10, 20, 30]
    assert distances[-1][1] < 0.8 * distances[0][1]
    for words in ("demo-", "cosine-", "data.limit", "images seen"):
        assert words in text(cells["compare"])


@pytest.mark.usefixtures("kernel")
def test_the_notebook_trains_where_there_is_no_run_and_shows_the_newest_where_there_is(
    tmp_path: Path,
) -> None:
    cells = execute(tmp_path)
    check(cells, steps=400)
    assert "no report yet" in text(cells["report"])
    cosine, demo = sorted((tmp_path / "runs").iterdir())
    assert cosine.name.startswith("cosine-")

    newer = shutil.copytree(demo, tmp_path / "runs/demo-99990101-000000")
    (tmp_path / "runs/demo-99990202-000000").mkdir()  # it has no checkpoint
    beside = tmp_path / "docs/notebooks"
    beside.mkdir(parents=True)
    cells = execute(beside, "run")
    assert text(cells["run"]).startswith(f"../../runs/{newer.name}")
    assert list(beside.iterdir()) == []


def test_the_committed_notebook_can_be_read_without_running_it() -> None:
    assert NOTEBOOK.stat().st_size <= LARGEST
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    cells = {cell.id: cell for cell in notebook.cells}
    check(cells, steps=1_715)
    assert "raw pixels" in text(cells["report"])
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    for output in (output for cell in code for output in cell.outputs):
        assert output.output_type != "error"
        assert output.get("name") != "stderr"


def test_the_committed_notebook_says_nothing_of_the_machine_it_ran_on() -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    assert set(notebook.metadata) == {"kernelspec", "language_info"}
    assert notebook.metadata.language_info == {"name": "python"}
    for cell in notebook.cells:
        assert cell.metadata == {}  # no times of execution
        data = [output.get("data", {}).get("text/html", "") for output in cell.get("outputs", [])]
        shown = [cell.source, text(cell) if "outputs" in cell else "", *data]
        assert not ABSOLUTE.search("\n".join(shown))


def test_links_of_the_notebook_lead_somewhere() -> None:
    cells = nbformat.read(NOTEBOOK, as_version=4).cells
    links = [link for cell in cells for link in re.findall(r"\]\(([^):#]+)\)", cell.source)]
    assert links
    assert all((NOTEBOOK.parent / link).is_file() for link in links)


@pytest.mark.parametrize("name", DOCUMENTED)
def test_python_in_the_documentation_calls_what_there_is(name: str) -> None:
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / name).read_text(), re.M | re.S)
    nodes = [node for block in blocks for node in ast.walk(ast.parse(block))]
    known: dict[str, Any] = {}
    for node in nodes:
        if isinstance(node, ast.Import | ast.ImportFrom):
            exec(ast.unparse(node), known)
    found = 0
    for node in nodes:
        if isinstance(node, ast.Call) and (called := dotted(node.func, known)) is not None:
            words = {str(keyword.arg): keyword.value for keyword in node.keywords}
            inspect.signature(called).bind(*node.args, **words)
            found += 1
        elif isinstance(node, ast.Attribute):
            dotted(node, known)
    assert {"README.md", "docs/guide.md"} <= set(DOCUMENTED)
    assert found, f"{name} has blocks of Python that call nothing of hjepa_mlx"


def dotted(node: ast.expr, known: dict[str, Any]) -> Any:
    """The object behind a dotted name of something known, else None; fails if it is missing."""
    name = ast.unparse(node)
    known_name = re.fullmatch(r"[\w.]+", name) and name.split(".")[0] in known
    return eval(name, known) if known_name else None


def test_commands_can_be_pasted_into_zsh() -> None:
    """It takes a comment for a command, or for arguments."""
    for path in (ROOT / "README.md", *ROOT.glob("*/*.md")):
        for block in re.findall(r"^```(?:sh)?\n(.*?)^```", path.read_text(), re.M | re.S):
            assert not re.search(r"(^|\s)#", block), f"{path}: {block}"
