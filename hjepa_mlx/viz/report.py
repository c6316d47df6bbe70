"""A run on one page: every picture, the evaluation's table and the config, in one HTML file."""

from __future__ import annotations

import base64
from html import escape
from pathlib import Path
from string import Template
from typing import Any

from rich.console import RenderableType

from hjepa_mlx import tables as shown_tables
from hjepa_mlx.checkpoint import read_state
from hjepa_mlx.config import Data
from hjepa_mlx.data.sources import open_source
from hjepa_mlx.errors import HJEPAError
from hjepa_mlx.eval.evaluation import check_evaluable
from hjepa_mlx.eval.report import Report
from hjepa_mlx.files import atomic_write
from hjepa_mlx.runs import Run, load
from hjepa_mlx.signals import reading
from hjepa_mlx.viz import curves, features, masks, neighbours
from hjepa_mlx.viz.canvas import Picture, png
from hjepa_mlx.viz.pictures import pictures

BANK = 2000  # training images among which neighbours are looked for
MASKED, SHOWN, QUERIES = 3, 6, 5  # images in a picture
PAGE = Template((Path(__file__).parent / "page.html").read_text(encoding="utf-8"))
CAPTIONS = {
    "masks": "What the encoders see of an image. The context encoder gets the patches that are not "
    "faded; from them the features of every cell inside the target blocks are predicted.",
    "pca": "Patches with like features have like colours, within a level.",
    "similarity": "How like each cell's features are to those of the marked one.",
    "neighbours": "Test images (left) and the training images nearest to them.",
    "curves": "A loss above its dashed line has learned nothing about the images yet. A rank or a "
    "standard deviation that falls towards its lower end is collapse.",
}
Tables = list[tuple[str, RenderableType]]


def make(
    run: Run, folder: Path | None = None, data: Data | None = None, tables: Tables | None = None
) -> list[Path]:
    """Write report.html and the pictures it holds into `folder`, by default the run's viz/.

    data: shows images of this data set, by default the run's own. tables: titles, and what rich
    would print under them; by default the scores in the run's eval.json. Returns what was written,
    the page first. Raises HJEPAError when checkpoint or data are missing.
    """
    shown = data or run.config.data
    drawn = draw_all(run, shown)
    folder = folder or run.path / "viz"
    folder.mkdir(parents=True, exist_ok=True)
    files = {f"{name}.png": png(picture) for name, picture in drawn.items()}
    html = page(run, shown.name, files, evaluation(run) if tables is None else tables)
    written = []
    for name, content in {"report.html": html.encode("utf-8", "backslashreplace"), **files}.items():
        with atomic_write(folder / name) as file:
            file.write(content)
        written.append(folder / name)
    return written


def draw_all(run: Run, data: Data) -> dict[str, Picture]:
    """Every picture of a run, by name; without metrics no curves, nor masks of a sampler's own."""
    model = load(run.path)
    train_source, test_source = open_source(data, "train"), open_source(data, "test")
    check_evaluable(train_source, test_source)
    bank = pictures(train_source, model.config, BANK)
    test = pictures(test_source, model.config, max(MASKED, SHOWN, QUERIES))
    queries = test._replace(images=test.images[:QUERIES], labels=test.labels[:QUERIES])
    drawn = {}
    if run.latest and not read_state(run.latest)["own_parts"]["sampler"]:
        drawn["masks"] = masks.draw(model.config, test.images[:MASKED])
    drawn |= {
        "pca": features.draw_pca(model, test.images[:SHOWN]),
        "similarity": features.draw_similarity(model, test.images[:SHOWN]),
        "neighbours": neighbours.draw(model, queries, bank),
    }
    rows = run.metrics
    return drawn | {"curves": curves.draw(rows)} if rows else drawn


def evaluation(run: Run) -> Tables:
    """The table of the run's eval.json, if there is one."""
    path = run.path / "eval.json"
    if not path.is_file():
        return []
    try:
        scores = run.scores
        return [(f"Evaluation at step {scores['trained']['step']:,}", Report(scores).__rich__())]
    except (HJEPAError, KeyError, TypeError, AttributeError):
        words = f"{path} is damaged or of another version: `hjepa-mlx eval` writes it anew."
        return [("Evaluation", words)]


def page(run: Run, data: str, files: dict[str, bytes], tables: Tables) -> str:
    """One HTML page that needs nothing else; data: what is shown; files: PNGs by name."""
    config = run.config.model_dump()
    sections = {key: value for key, value in config.items() if isinstance(value, dict)}
    keys = {key: value for key, value in config.items() if key not in sections}
    for section, values in sections.items():
        keys |= {f"{section}.{key}": value for key, value in values.items()}
    return PAGE.substitute(
        title=escape(f"{run.config.name} · {run.path.resolve().name}"),
        facts=table(facts(run) | {"images below": data}),
        tables="\n".join(
            f"<h2>{escape(title)}</h2>\n{shown_tables.html(what)}" for title, what in tables
        ),
        pictures="\n".join(figure(name, content) for name, content in files.items()),
        config=table(keys),
    )


def facts(run: Run) -> dict[str, str]:
    """What a reader wants to know first."""
    config, words = run.config, reading(run.last_stage)
    model, grid, size = config.model, config.grid, config.data.image_size
    last = next((row for row in reversed(run.metrics) if "loss" in row), None)
    found = {
        "trained on": f"{config.data.name} at {size}×{size} pixels",
        "model": f"ViT {model.size}: {model.depth} blocks, {model.dim} wide, {grid}×{grid} patches "
        f"of {model.patch_size}×{model.patch_size} pixels",
        "levels": f"after blocks {model.level_blocks}, averaged over {model.level_pool} patches",
        "checkpoint": run.latest.name if run.latest else "none",
    }
    if last is not None:
        found["trained for"] = (
            f"{last['step']:,} steps, {last['epoch']:g} of {config.optim.epochs} epochs"
        )
        found["loss"] = f"{last['loss']:.4f}"
        found["curves"] = " ".join(words) or "too short a run to say"
        found["speed"] = f"{last['images_per_second']:,.0f} images/s"
    return found


def table(rows: dict[str, Any]) -> str:
    """Keys and values as an HTML table."""
    cells = (f"<tr><th>{escape(k)}<td>{escape(str(v))}" for k, v in rows.items())
    return "<table>\n" + "\n".join(cells) + "\n</table>"


def figure(name: str, content: bytes) -> str:
    """A PNG inside the page, with what it shows."""
    caption = escape(CAPTIONS[Path(name).stem])
    data = base64.b64encode(content).decode()
    return (
        f'<figure><img alt="{escape(Path(name).stem)}" src="data:image/png;base64,{data}">'
        f"<figcaption>{caption}</figcaption></figure>"
    )
