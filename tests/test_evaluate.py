"""Whole evaluations, from images to scores."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import mlx.core as mx
import numpy as np
import pytest
from evaluating import ALL, LEVELS, QUICK, network, pictures
from sklearn.neighbors import KNeighborsClassifier

import hjepa_mlx as hj
from hjepa_mlx import tables
from hjepa_mlx.config import Config
from hjepa_mlx.data.pipeline import Skipped
from hjepa_mlx.data.source import Split
from hjepa_mlx.eval.features import Encoded, extract


@pytest.fixture(scope="module")
def demo(tiny_config: Callable[..., Config]) -> tuple[hj.HJEPA, hj.Report]:
    """A model and its evaluation on the demo images, with everything in it."""
    model = network(tiny_config, name="demo", limit=200)
    return model, hj.evaluate(model)


def test_the_scores_have_the_form_that_was_promised_in_json_too(
    demo: tuple[hj.HJEPA, hj.Report], tmp_path: Path
) -> None:
    demo[1].save(tmp_path / "eval.json")
    scores = json.loads((tmp_path / "eval.json").read_text(), parse_constant=pytest.fail)
    assert tables.text(hj.Report(scores)) == tables.text(demo[1])
    assert f"{scores['attentive_probe']['level_1']:.1f}" in tables.text(demo[1])
    random, context = (scores["baselines"][name] for name in ("random_init", "context_encoder"))
    for part in (scores, random, context):
        for protocol in ("linear_probe", "knn"):
            assert part[protocol].keys() == ALL
            for level, value in part[protocol].items():
                assert 0 <= value <= 100
                low, high = part["confidence_95"][protocol][level]
                assert low < value < high
        assert all(1 <= part["feature_rank"][level] <= 64 for level in LEVELS)
        assert part["features"].keys() == part["feature_rank"].keys() == set(LEVELS)
        assert all(0 < figures["feature_std"] < 1 for figures in part["features"].values())
    for part in (scores, random):
        assert part["attentive_probe"].keys() == set(LEVELS)
        for share in ("few_labels_1_percent", "few_labels_10_percent"):
            assert all(0 < part[share][level]["mean"] < 100 for level in ALL)
            assert all(0 < part[share][level]["std"] < 30 for level in ALL)
    pixels = scores["baselines"]["pixels"]
    assert pixels.keys() == {"linear_probe", "knn", "knn_whitened"}
    assert all(50 < value < 85 for value in pixels.values())  # of 10 classes
    assert scores["protocol"]["bank_images"] == scores["protocol"]["attentive_bank_images"] == 200
    assert scores["protocol"]["query_images"] == 1000
    assert scores["protocol"]["data"] == scores["trained"]["images"] == "demo"
    assert scores["promises"] == []


def test_every_score_stands_under_the_name_of_its_encoder_and_level(
    demo: tuple[hj.HJEPA, hj.Report],
) -> None:
    model, report = demo
    baselines = report.scores["baselines"]
    parts = []
    for split in get_args(Split)[1:]:
        source = hj.open_source(model.config.data, split)
        (found,) = extract(
            lambda: [lambda x: Encoded({"images": x}, {})], source, model.config, Skipped()
        )
        parts.append((found.pooled["images"], found.labels))
    (images, labels), (queries, truth) = parts
    reference = KNeighborsClassifier(
        20, metric="cosine", algorithm="brute", weights=lambda d: np.exp((1 - d) / 0.07)
    )
    grey, asked = (x[..., 0].reshape(len(x), -1).astype(float) for x in (images, queries))
    expected = 100 * reference.fit(grey, labels).score(asked, truth)
    assert baselines["pixels"]["knn"] == pytest.approx(expected, abs=0.5)
    ranks = set()
    for trained, encoder, scores in (
        (model, "target", report.scores),
        (model, "context", baselines["context_encoder"]),
        (hj.HJEPA(model.config), "target", baselines["random_init"]),
    ):
        bank_levels, query_levels = (trained.encode(x, encoder) for x in (images, queries))
        for name, *levels in zip(LEVELS, bank_levels, query_levels, strict=True):
            bank, asked = (np.array(level.mean(1), np.float64) for level in levels)
            expected = 100 * reference.fit(bank, labels).score(asked, truth)
            assert scores["knn"][name] == pytest.approx(expected, abs=0.5)
            share = np.linalg.svd(asked - asked.mean(0), compute_uv=False) ** 2
            share /= share.sum()
            rank = np.exp(-(share * np.log(share)).sum())
            assert scores["feature_rank"][name] == pytest.approx(rank, rel=1e-4)
            ranks.add(round(rank, 3))
    assert len(ranks) == 9  # nothing could be mistaken for something else


def test_classes_that_a_glance_tells_apart_are_told_apart_every_time(
    tiny_config: Callable[..., Config], tmp_path: Path
) -> None:
    model = network(tiny_config, name="folder", dir=str(pictures(tmp_path, 80)))
    scores, again = (hj.evaluate(model).scores for _ in range(2))
    assert scores == again
    assert scores["knn"]["level_2"] == scores["linear_probe"]["level_2"] == 100
    assert scores["attentive_probe"]["level_0"] == 100
    pixels = scores["baselines"]["pixels"]
    assert pixels["knn"] == pixels["linear_probe"] == 100
    assert scores["protocol"]["bank_images"] == 216
    assert scores["protocol"]["query_images"] == 24


def test_a_model_is_evaluated_on_another_data_set(
    tiny_config: Callable[..., Config], tmp_path: Path
) -> None:
    model = network(tiny_config, name="demo", limit=50)  # which is no limit of the other data set
    pictures(tmp_path / "own", 30)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"data: {{name: folder, dir: {tmp_path / 'own'}}}")
    for data, folder in (("folder", str(tmp_path / "own")), (str(recipe), None)):
        found = hj.evaluate(model, data, folder, QUICK).scores
        protocol = found["protocol"]
        assert (protocol["bank_images"], protocol["query_images"]) == (81, 9)
        assert protocol["data"] == "folder"
        assert found["trained"]["images"] == "demo"
        assert found["knn"].keys() == ALL
        assert found["promises"] == []


def test_the_protocol_is_followed_and_written_down(
    tiny_config: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pictures(tmp_path / "train", 12)
    folder = pictures(tmp_path / "val", 12)
    for name in ("blue/003.png", "red/000.png"):
        (folder / name).write_bytes(b"")
    model = network(tiny_config, name="folder", dir=str(tmp_path))
    report = hj.evaluate(model, protocol=hj.Protocol(5, 0.1, 0, 0))
    assert (report.scores["protocol"]["k"], report.scores["protocol"]["temperature"]) == (5, 0.1)
    assert not any(key.startswith(("few_labels", "attentive")) for key in report.scores)
    assert report.scores["protocol"]["skipped_images"] == 2
    assert report.scores["protocol"]["query_images"] == 34
    assert "2 images could not be read." in report.findings()
    capped = hj.evaluate(model, protocol=hj.Protocol(draws=0, attentive_images=20)).scores
    assert capped["protocol"]["attentive_bank_images"] == 20
    assert capped["protocol"]["attentive_query_images"] == 34
    assert capped["attentive_probe"].keys() == set(LEVELS)
    of_an_image = 2 * (16 + 4 + 1) * 64  # bytes of float16
    monkeypatch.setattr("hjepa_mlx.eval.evaluation.TOKEN_BYTES", 25 * of_an_image)
    fitting = hj.evaluate(model, protocol=hj.Protocol(draws=0)).scores["protocol"]
    assert (fitting["attentive_bank_images"], fitting["bank_images"]) == (25, 36)
    assert 20 < fitting["attentive_query_images"] <= 25  # two of all 36 cannot be read


def test_without_classes_only_label_free_figures_are_made(
    tiny_config: Callable[..., Config], tmp_path: Path
) -> None:
    folder = pictures(tmp_path, 40, ("red",))
    report = hj.evaluate(network(tiny_config, name="folder", dir=str(folder)))
    assert not {"knn", "linear_probe", "attentive_probe"} & report.scores.keys()
    assert report.scores["feature_rank"].keys() == set(LEVELS)
    assert report.scores["baselines"]["random_init"]["feature_rank"].keys() == set(LEVELS)
    assert report.scores["promises"] == []
    assert report.scores["baselines"]["pixels"] == {}
    assert report.findings() == ["This data set has no labels, so there are no k-NN and no probes."]
    assert f"{report.scores['feature_rank']['level_1']:.1f}" in tables.text(report)
    assert "linear probe" not in tables.text(report)


def test_a_model_is_evaluated_as_it_was_built_and_random_numbers_go_on(
    tiny_config: Callable[..., Config], tmp_path: Path
) -> None:
    data = {"image_size": 16, "name": "folder", "dir": str(pictures(tmp_path, 12))}
    model = hj.HJEPA(tiny_config(data=data))  # its weights are promises yet
    mx.random.seed(5)
    expected = mx.random.uniform(shape=(3,)).tolist()
    mx.random.seed(5)
    scores = hj.evaluate(model, protocol=QUICK).scores
    assert mx.random.uniform(shape=(3,)).tolist() == expected
    assert scores["knn"] == scores["baselines"]["random_init"]["knn"]
    assert scores["protocol"]["attentive_bank_images"] == 0
