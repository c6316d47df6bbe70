"""Pictures: what they draw is what the sampler, the encoder and the metrics say."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

import hjepa_mlx as hj
from hjepa_mlx.cli.viz import viz
from hjepa_mlx.config import Config
from hjepa_mlx.data.source import make_source
from hjepa_mlx.data.storage import Pixels
from hjepa_mlx.errors import HJEPAError, UsageError
from hjepa_mlx.masks import MaskSampler
from hjepa_mlx.models.hjepa import HJEPA
from hjepa_mlx.runs import Run
from hjepa_mlx.viz import curves, feature_maps, mask_overlay, neighbours, page
from hjepa_mlx.viz.canvas import label, png, principal
from hjepa_mlx.viz.samples import Samples, samples

PNG = b"\x89PNG\r\n\x1a\n"
SPREAD = {"level_0": {"effective_rank": 4.6, "effective_rank_percent": 7.2}}


def scores(linear: float, knn: float) -> dict[str, Any]:
    found = {"linear_probe": {"level_0": linear}, "knn": {"level_0": knn}}
    intervals = {kind: {"level_0": [40, 70]} for kind in found}
    return {**found, "features": SPREAD, "confidence_95": intervals}


SCORES: dict[str, Any] = {
    **scores(61.5, 51.5),
    "baselines": {
        "random_init": scores(52.8, 42.8),
        "context_encoder": scores(60.7, 50.7),
        "pixels": {"linear_probe": 81.3, "knn": 80.2},
    },
    "protocol": {"data": "demo", "bank_images": 5500, "query_images": 1000, "k": 20},
    "trained": {"step": 855},
}
Build = Callable[..., Config]


@pytest.fixture(scope="module")
def run(tiny_config: Build, tmp_path_factory: pytest.TempPathFactory) -> Run:
    config = tiny_config(
        data={"name": "demo", "limit": 64, "batch_size": 16},
        optim={"epochs": 1, "warmup_epochs": 0.5},
        run={"log_every": 2, "dir": str(tmp_path_factory.mktemp("r") / "run")},
    )
    return hj.train(config)


def random_images(n: int, size: int = 32) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (n, size, size, 3), dtype=np.uint8)


@pytest.mark.parametrize("size", [32, 56])  # grids of 8 and 14: cells at the edge are smaller
def test_drawn_cells_are_the_patches_each_cell_averages(tiny_config: Build, size: int) -> None:
    config = tiny_config(data={"image_size": size})
    grid, images = config.grid, random_images(2, size)
    drawn, figure = MaskSampler(config)(7, 2), mask_overlay.draw(config, images, step=7)
    for number in range(2):
        for level, pool in enumerate(drawn.pool):
            ax = figure.axes[number * (1 + len(drawn.pool)) + 1 + level]
            found = iter(patch for patch in ax.patches if isinstance(patch, Rectangle))
            for patches in drawn.targets[number]:
                next(found)  # the block's outline
                for cell in pool:
                    box = next(found)
                    covered = np.zeros((grid, grid), bool)
                    x, y = box.get_x(), box.get_y()
                    covered[y : y + box.get_height(), x : x + box.get_width()] = True
                    assert set(np.flatnonzero(covered)) == set(patches[cell > 0])
            assert next(found, None) is None


def test_only_levels_that_are_predicted_have_masks_drawn(tiny_config: Build) -> None:
    config = tiny_config(loss={"level_weights": [0, 1, 1]})
    titles = [ax.get_title() for ax in mask_overlay.draw(config, random_images(1)).axes]
    assert [title.split("\n")[0] for title in titles] == ["image", "level 1", "level 2"]


def test_with_several_masks_an_image_s_first_is_beside_it(tiny_config: Build) -> None:
    model = {"level_pool": [1, 2, "image"], "level_blocks": [1, 3, 3]}
    config = tiny_config(model=model, masks={"per_image": 2}, views={"count": 2})
    images = random_images(3)
    figure = mask_overlay.draw(config, images)
    for number, context in enumerate(MaskSampler(config)(0, 6).context[::2]):
        row = figure.axes[5 * number : 5 * number + 5]  # image, two levels of patches, two views
        assert all(ax.images for ax in row)
        shown = np.asarray(row[1].images[0].get_array())
        same = (shown == images[number]).reshape(8, 4, 8, 4, 3).all((1, 3, 4))
        assert np.array_equal(np.flatnonzero(same), context)


def test_exactly_the_context_tokens_are_shown_as_they_are(tiny_config: Build) -> None:
    config, images = tiny_config(), random_images(2)
    figure = mask_overlay.draw(config, images, step=3)
    for number, context in enumerate(MaskSampler(config)(3, 2).context):
        shown = np.asarray(figure.axes[4 * number + 2].images[0].get_array())
        same = (shown == images[number]).reshape(8, 4, 8, 4, 3).all((1, 3, 4))
        assert np.array_equal(np.flatnonzero(same), context)


def test_principal_components_of_constructed_features_are_the_known_colours() -> None:
    rng = np.random.default_rng(0)
    axes = np.linalg.qr(rng.normal(size=(16, 16)))[0].T[:3]
    axes *= np.sign(axes[np.arange(3), np.abs(axes).argmax(1)])[:, None]
    rgb = rng.uniform(size=(2, 500, 3))
    rgb -= rgb.mean((0, 1))
    rgb = (rgb.reshape(-1, 3) @ np.linalg.svd(rgb.reshape(-1, 3))[2].T).reshape(rgb.shape)
    x = (rgb * (9, 3, 1)) @ axes + 5  # uncorrelated, in the order of their spread
    colours, share = principal(x.reshape(-1, 16), 3)
    low, high = np.percentile(rgb, (1, 99), axis=(0, 1))
    assert colours.reshape(rgb.shape) == pytest.approx(np.clip((rgb - low) / (high - low), 0, 1))
    assert share == pytest.approx(1)


def test_few_or_collapsed_features_still_have_colours() -> None:
    for n in (8, 1):
        colours, share = principal(np.ones((n, 8), np.float32), 3)
        assert np.array_equal(colours, np.zeros((n, 3)))
        assert share == 0


def test_a_cell_covers_its_patches_and_the_last_ones_are_smaller() -> None:
    cells = feature_maps.on_patches(np.arange(9), grid=5, pool=2)
    rows = [[0, 0, 1, 1, 2], [0, 0, 1, 1, 2], [3, 3, 4, 4, 5], [3, 3, 4, 4, 5], [6, 6, 7, 7, 8]]
    assert cells.tolist() == rows


def test_the_similarity_map_is_one_at_the_marked_patch_and_numpys_elsewhere(
    tiny_config: Build,
) -> None:
    model, images = HJEPA(tiny_config()), random_images(2)
    figure = feature_maps.draw_similarity(model, images, patch=(5, 2))
    for level, x in enumerate(map(np.array, model.encode(images))):
        shown = np.asarray(figure.axes[2 * (1 + level) + 1].images[0].get_array())
        assert shown[5, 2] == pytest.approx(1, abs=1e-6)
        pool = 2**level
        a, b = x[1, 0], x[1, 5 // pool * (8 // pool) + 2 // pool]
        expected = a @ b / np.linalg.norm(a) / np.linalg.norm(b)
        assert shown[0, 0] == pytest.approx(expected, abs=1e-5)
    with pytest.raises(UsageError, match="no patch"):
        feature_maps.draw_similarity(model, images, patch=(8, 0))


def test_a_neighbour_is_the_image_itself_when_it_is_in_the_bank(tiny_config: Build) -> None:
    images, labels = random_images(9), np.arange(9) % 2
    names = ("$\\frac{$", "<b>\n" + "x" * 99)  # neither formula nor too long
    bank = Samples(images, labels, names)
    query = Samples(images[4:5], labels[4:5], names)
    figure = neighbours.draw(HJEPA(tiny_config()), query, bank, level=0, k=20)
    assert len(figure.axes) == 1 + 9  # no more than there are
    assert np.array_equal(np.asarray(figure.axes[1].images[0].get_array()), images[4])
    assert figure.axes[1].get_xlabel() == "✓ 1.000\n$\\frac{$"
    signs = [ax.get_xlabel()[0] for ax in figure.axes[1:]]
    assert (signs.count("✓"), signs.count("✗")) == (5, 4)
    assert png(figure).startswith(PNG)


def test_names_from_outside_become_one_short_printable_line() -> None:
    assert label("tench, Tinca\n\x1b[31mtinca \udcff") == "tench, Tinca […"
    assert label("Bag") == "Bag"


def test_samples_are_of_different_classes_first_each_with_its_label(tiny_config: Build) -> None:
    labels = np.array([0] * 50 + [1] * 3 + [2] * 3)
    source = make_source("x", Pixels(random_images(56), "x"), labels, ("a", "b", "c"))
    assert sorted(samples(source, tiny_config(), 3).labels) == [0, 1, 2]
    everything = samples(source, tiny_config(), 99)
    assert np.bincount(everything.labels).tolist() == [50, 3, 3]
    for image, kind in zip(everything.images, everything.labels, strict=True):
        matches = (source.images.array == image).all((1, 2, 3))  # type: ignore[attr-defined]
        assert labels[matches] == kind


def lines(figure: Figure) -> dict[str, list[np.ndarray]]:
    drawn = {ax.get_title(loc="left"): ax.lines for ax in figure.axes}
    return {title: [np.asarray(x.get_xydata()) for x in found] for title, found in drawn.items()}


def test_curves_are_the_logged_values(run: Run) -> None:
    figure = curves.draw(run.metrics)
    drawn = lines(figure)
    for title, line, key in (
        ("Effective rank", 2, "effective_rank_level_2"),
        ("Prediction loss", 2, "loss_level_1"),  # each with its dashed one after it
        ("Prediction loss", 3, "position_only_loss_level_1"),
    ):
        logged = [(row["step"], row[key]) for row in run.metrics if key in row]
        assert len(logged) >= 2
        assert np.array_equal(drawn[title][line], logged)
    solid, dashed = figure.axes[0].lines[2:4]
    assert (solid.get_linestyle(), dashed.get_linestyle()) == ("-", "--")
    assert solid.get_color() == dashed.get_color() == figure.axes[1].lines[1].get_color()
    assert len({line.get_color() for line in figure.axes[1].lines}) > 2
    assert "k-NN accuracy" not in drawn


def test_all_the_levels_that_a_run_can_have_are_drawn() -> None:
    rows = [{"step": step, **{f"loss_level_{n}": 1.0 + n for n in range(8)}} for step in (1, 2)]
    (panel,) = curves.draw(rows).axes
    assert [line.get_ydata()[0] for line in panel.lines] == [1.0 + n for n in range(8)]
    assert len({(line.get_color(), line.get_marker()) for line in panel.lines}) == 8


def test_one_row_of_a_torn_file_can_be_drawn(tmp_path: Path) -> None:
    row = {"step": 20, "loss_level_0": 0.5, "knn_level_0": 71.0, "knn_whitened": 76.0, "lr": None}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(row) + '\n{"step": 40, "lo')
    figure = curves.draw(Run(tmp_path).metrics)
    drawn = lines(figure)
    assert set(drawn) == {"Prediction loss", "k-NN accuracy", "k-NN, all levels whitened"}
    assert drawn["k-NN accuracy"][0].tolist() == [[20, 71]]
    assert drawn["k-NN, all levels whitened"][0].tolist() == [[20, 76]]
    assert png(figure).startswith(PNG)
    with pytest.raises(HJEPAError, match="no curves yet"):
        curves.draw([{"step": 0}])


def links(html: str) -> list[str]:
    return re.findall(r"""\b(?:src|href|srcset)\s*=\s*["']?([^"'\s>]*)""", html)


def test_the_page_holds_every_picture_and_nothing_from_elsewhere(run: Run) -> None:
    (run.path / "eval.json").write_text(json.dumps(SCORES))
    html_path, *pictures = page.make(run)
    assert [p.name for p in pictures] == [
        "masks.png", "pca.png", "similarity.png", "attention.png", "neighbours.png", "map.png",
        "curves.png",
    ]  # fmt: skip
    html = html_path.read_text()
    assert len(links(html)) == len(pictures)
    assert all(link.startswith("data:image/png;base64,") for link in links(html))
    assert all(path.read_bytes().startswith(PNG) for path in pictures)
    assert not re.search(r"https?:|url\(", html)
    assert all(accuracy in html for accuracy in ("51.5", "42.8", "80.2"))
    assert "lr: 0.001" in html


def test_the_page_escapes_text_from_outside(run: Run, tmp_path: Path) -> None:
    hostile = '<script>alert("1")</script>[link=http://x]$title[/]'
    copy = Run(shutil.copytree(run.path, tmp_path / "<i>copy"))
    report = SCORES | {"protocol": SCORES["protocol"] | {"data": hostile}}
    (copy.path / "eval.json").write_text(json.dumps(report))
    html = page.page(copy, hostile, {})
    assert not re.search(r"<(script|i)\b", html)
    assert links(html) == []
    assert html.count("&lt;script&gt;") >= 3  # the data set's name, and the titles of both tables


def test_a_damaged_or_old_evaluation_does_not_stop_the_page(tmp_path: Path) -> None:
    for text in ("{", '{"knn": {"level_0": 50}}', "3"):
        (tmp_path / "eval.json").write_text(text)
        assert "hjepa-mlx eval" in page.evaluation(Run(tmp_path))
    assert page.evaluation(Run(tmp_path / "none")) == ""


def test_a_run_without_checkpoint_leaves_nothing_behind(run: Run, tmp_path: Path) -> None:
    copy = Run(shutil.copytree(run.path, tmp_path / "copy"))
    shutil.rmtree(copy.checkpoints)
    with pytest.raises(UsageError, match="no checkpoint yet"):
        page.make(copy, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_command_prints_what_it_wrote_or_one_line(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = shutil.copytree(run.path, tmp_path / "copy")
    (copy / "metrics.jsonl").unlink()
    viz(str(copy), None, None, str(tmp_path / "out"))
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == str(tmp_path / "out" / "report.html")
    assert sorted(printed) == sorted(map(str, (tmp_path / "out").iterdir()))
    assert "curves" not in "".join(printed)  # there is nothing to draw them from
    for folder, data in ((tmp_path, None), (run.path, "dmeo")):
        with pytest.raises(typer.Exit) as stopped:
            viz(str(folder), data, None, None)
        assert stopped.value.exit_code == 2
        assert len(capsys.readouterr().err.splitlines()) == 1


def test_without_matplotlib_one_line_says_what_to_install() -> None:
    code = "import sys, hjepa_mlx; sys.modules['matplotlib'] = None; import hjepa_mlx.viz"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    words = "UsageError: This needs matplotlib: pip install 'hjepa-mlx[viz]'"
    assert done.stderr.strip().endswith(words)
