"""A run on one page: every picture, the evaluation's table and the config, in one HTML file."""

from __future__ import annotations

import base64
from html import escape
from pathlib import Path
from shlex import quote
from string import Template

from hjepa_mlx import tables
from hjepa_mlx.checkpoint import read_state
from hjepa_mlx.data.folder import record_of
from hjepa_mlx.data.source import open_sources
from hjepa_mlx.errors import HJEPAError
from hjepa_mlx.eval.labels import check_evaluable, judged
from hjepa_mlx.files import atomic_write
from hjepa_mlx.runs import Run, load
from hjepa_mlx.sections import Data
from hjepa_mlx.signals import reading
from hjepa_mlx.viz import attention, curves, embedding_map, feature_maps, mask_overlay, neighbours
from hjepa_mlx.viz.canvas import Picture, png
from hjepa_mlx.viz.samples import samples

BANK = 2000  # training images among which neighbours are looked for
MASKED, SHOWN, QUERIES = 3, 6, 5  # images in a picture
PAGE = Template((Path(__file__).parent / "page.html").read_text(encoding="utf-8"))
CAPTIONS = {
    "masks": "The context encoder sees the patches that are not faded. From them the predictor "
    "predicts the features of every cell inside the target blocks.",
    "pca": "Patches with like features have like colours, within a level.",
    "similarity": "How like each cell's features are to those of the marked one.",
    "attention": "Bright patches get the most attention from all others, in the block of the "
    "coarsest level.",
    "map": "Images with like features of the coarsest level lie close together: groups are "
    "clusters. Where several fall on one place, one is shown. Below are the outliers.",
    "neighbours": "Test images (left) and the training images nearest to them.",
    "curves": "A loss above its dashed line has learned nothing about the images yet. A rank or a "
    "standard deviation that falls towards its lower end is collapse.",
}


def make(run: Run, folder: Path | None = None, data: Data | None = None) -> list[Path]:
    """Write report.html and the pictures it holds into `folder`, by default the run's viz/.

    data: the data set whose images are shown, by default the run's own. Returns the files
    written, the page first. Raises HJEPAError when checkpoint or data are missing.
    """
    shown, folder = data or run.config.data, folder or run.path / "viz"
    pictures = {name: png(picture) for name, picture in draw_all(run, shown).items()}
    html = page(run, shown.name, pictures).encode("utf-8", "backslashreplace")
    files = {"report.html": html} | {f"{name}.png": file for name, file in pictures.items()}
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        with atomic_write(folder / name) as file:
            file.write(content)
    return [folder / name for name in files]


def draw_all(run: Run, data: Data) -> dict[str, Picture]:
    """Every picture of a run, by name; no curves without metrics, no masks of your own sampler."""
    model = load(run.path)
    opened = open_sources(data, record_of(run.path, run.config.data, data))
    train, test, _ = judged(opened["train"], opened["test"])
    check_evaluable(train, test)
    bank, queries = samples(train, model.config, BANK), samples(test, model.config, QUERIES)
    images = samples(test, model.config, max(MASKED, SHOWN)).images
    drawn = {}
    if run.latest and not read_state(run.latest)["own_parts"]["sampler"]:
        drawn["masks"] = mask_overlay.draw(model.config, images[:MASKED])
    drawn["pca"] = feature_maps.draw_pca(model, images[:SHOWN])
    drawn["similarity"] = feature_maps.draw_similarity(model, images[:SHOWN])
    drawn["attention"] = attention.draw(model, images[:SHOWN])
    means = neighbours.level_means(model, bank.images, int(model.config.model.levels) - 1)
    drawn["neighbours"] = neighbours.draw(model, queries, bank, bank_means=means)
    drawn["map"] = embedding_map.draw(means, bank)
    if rows := run.metrics:
        drawn["curves"] = curves.draw(rows)
    return drawn


def page(run: Run, data: str, pictures: dict[str, bytes]) -> str:
    """One HTML page that needs nothing else; data: whose images are shown; pictures: PNG files."""
    rows = (facts(run) | {"images below": data}).items()
    figures = []
    for name, content in pictures.items():
        image = f"data:image/png;base64,{base64.b64encode(content).decode()}"
        caption = f"<figcaption>{escape(CAPTIONS[name])}</figcaption>"
        figures.append(f'<figure><img alt="{name}" src="{image}">{caption}</figure>')
    return PAGE.substitute(
        title=escape(f"{run.config.name} · {run.path.resolve().name}"),
        facts="\n".join(f"<tr><th>{escape(k)}<td>{escape(v)}" for k, v in rows),
        evaluation=evaluation(run),
        pictures="\n".join(figures),
        config=escape(run.config.to_yaml()),
    )


def facts(run: Run) -> dict[str, str]:
    """The facts of a run that a reader wants first."""
    config, model, grid = run.config, run.config.model, run.config.grid
    size, patch, epochs = config.data.image_size, model.patch_size, config.optim.epochs
    found = {
        "trained on": f"{config.data.name} at {size}×{size} pixels",
        "model": f"ViT {model.size}: {model.depth} blocks, {model.dim} wide, {grid}×{grid} patches "
        f"of {patch}×{patch} pixels",
        "levels": f"after blocks {model.level_blocks}, averaged over {model.level_pool} patches",
        "checkpoint": run.latest.name if run.latest else "none",
    }
    if last := next((row for row in reversed(run.metrics) if "loss" in row), None):
        found |= {
            "trained for": f"{last['step']:,} steps, {last['epoch']:g} of {epochs} epochs",
            "loss": f"{last['loss']:.4f}",
            "curves": " ".join(reading(run.last_stage)) or "The run is too short to say.",
            "speed": f"{last['images_per_second']:,.0f} images/s",
        }
    return found


def evaluation(run: Run) -> str:
    """The tables of the run's eval.json as HTML, empty if there is none."""
    try:
        if (report := run.report) is None:
            return ""
        title, shown = f" at step {report.scores['trained']['step']:,}", tables.html(report)
    except (HJEPAError, KeyError, TypeError, AttributeError):
        words = f"{run.path / 'eval.json'} is damaged or from another version of hjepa-mlx. "
        command = f"hjepa-mlx eval {quote(str(run.path))}"
        title, shown = "", escape(f"{words}Run `{command}` to write it again.")
    return f"<h2>Evaluation{title}</h2>\n{shown}"
