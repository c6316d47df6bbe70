"""The page of a run in a real browser, and the pictures of attention and of all embeddings."""

import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import hjepa_mlx as hj
from hjepa_mlx.config import Config
from hjepa_mlx.models.hjepa import HJEPA
from hjepa_mlx.viz import attention, embedding_map, page
from hjepa_mlx.viz.canvas import png
from hjepa_mlx.viz.samples import Samples

Build = Callable[..., Config]
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
LOOK = """<script>
  const root = document.documentElement, facts = {}
  root.style.width = "400px"
  facts.width = Math.max(...[...document.querySelectorAll("h1,h2,p,figure,img,table,pre,td")]
    .filter(one => !one.parentElement.closest("pre"))
    .map(one => one.getBoundingClientRect().right))
  facts.images = [...document.images].map(image => image.complete && image.naturalWidth)
  facts.text = getComputedStyle(document.body).color
  const box = document.querySelector("pre[tabindex]")
  box.focus()
  facts.focus = document.activeElement === box
  const told = document.createElement("p")
  told.textContent = "facts " + JSON.stringify(facts) + " end"
  document.body.append(told)
</script>"""


@pytest.fixture(scope="module")
def written(tiny_config: Build, tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = tiny_config(
        data={"name": "demo", "limit": 32, "batch_size": 16},
        optim={"epochs": 1, "warmup_epochs": 0.5},
        run={"dir": str(tmp_path_factory.mktemp("r") / "run")},
    )
    return page.make(hj.train(config))[0]


def browsed(file: Path, *options: str) -> tuple[dict, str]:
    """What a script finds on the page, and what the browser's console says."""
    command = [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu",
               "--enable-logging=stderr", f"--user-data-dir={file.parent / 'profile'}",
               "--virtual-time-budget=5000",
               "--dump-dom", *options, file.as_uri()]  # fmt: skip
    ended = subprocess.run(command, capture_output=True, text=True, timeout=200)
    said = re.search(r"facts (\{.*\}) end", ended.stdout)
    return json.loads(said[1]) if said else {}, "\n".join(re.findall(".*CONSOLE.*", ended.stderr))


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_the_page_reads_well_in_a_browser_narrow_and_in_the_dark(written: Path) -> None:
    facts, console = browsed(written)
    assert (facts, console) == ({}, "")  # as it is: its policy allows no script, and no error
    html = re.sub("<meta http-equiv.*", "", written.read_text()).replace("</html>", LOOK)
    (looked := written.with_name("looked.html")).write_text(html)
    facts, console = browsed(looked)
    assert console == ""
    assert len(facts["images"]) == 7
    assert all(facts["images"])
    assert facts["width"] <= 400
    assert facts["focus"]
    dark, _ = browsed(looked, "--blink-settings=preferredColorScheme=0")
    assert facts["text"] == "rgb(0, 0, 0)"
    assert dark["text"] == "rgb(255, 255, 255)"


def test_attention_is_the_softmax_of_numpy_and_sums_to_one(tiny_config: Build) -> None:
    model = HJEPA(tiny_config(precision="float32"))
    images = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), dtype=np.uint8)
    found = attention.received(model, images)
    block = model.target_encoder.blocks[2]
    (x,) = model.target_encoder(model.patches(images), after=[2])
    qkv = np.array(block.attn.qkv(block.norm1(x)), np.float64).reshape(2, 64, 3, 2, 32)
    for head in range(2):
        q, k = qkv[:, :, 0, head], qkv[:, :, 1, head]
        weights = np.exp(q @ k.swapaxes(1, 2) / 32**0.5)
        weights /= weights.sum(-1, keepdims=True)
        assert found[:, head] == pytest.approx(weights.mean(1), rel=1e-4)
    assert found.sum(-1) == pytest.approx(1, rel=1e-5)
    assert len(attention.draw(model, images).axes) == 2 * (1 + 3)


def test_the_map_lies_by_principal_components_and_names_the_outlier() -> None:
    rng = np.random.default_rng(0)
    means = np.concatenate([c + 0.1 * rng.normal(size=(20, 8)) for c in np.eye(8)[:3] * 5])
    means[7] = -means[30]  # like no other
    images = rng.integers(0, 256, (60, 32, 32, 3), dtype=np.uint8)
    places, share = embedding_map.components(means.astype(np.float32))
    assert share > 0.8
    groups = [places[[r for r in range(n, n + 20) if r != 7]].mean(0) for n in (0, 20, 40)]
    for first, second in ((0, 1), (0, 2), (1, 2)):
        assert np.linalg.norm(groups[first] - groups[second]) > 8
    pictures = Samples(images, np.arange(60) // 20, ("a", "b", "c"), tuple(map(str, range(60))))
    figure = embedding_map.draw(means.astype(np.float32), pictures)
    assert figure.axes[1].get_xlabel().startswith("7\n")
    shown = embedding_map.visible(places)
    assert len({tuple(place) for place in places}) == len(shown)
    assert png(figure).startswith(b"\x89PNG")


def test_one_picture_or_equal_ones_have_a_map() -> None:
    for count in (1, 3):
        images = np.zeros((count, 8, 8, 3), np.uint8)
        bare = Samples(images, np.zeros(0, int), ())
        assert png(embedding_map.draw(np.ones((count, 4), np.float32), bare))
