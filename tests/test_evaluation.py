"""Whole evaluations: from images to the report, and what the command line says of wrong use."""

import copy
import hashlib
import io
import json
import re
import sys
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_args

import layouts
import mlx.core as mx
import numpy as np
import pytest
from layouts import CMC, KAGGLE
from mlx.utils import tree_map
from numpy.testing import assert_allclose, assert_array_equal
from PIL import Image
from rich.console import Console
from sklearn.neighbors import KNeighborsClassifier
from threadpoolctl import threadpool_limits
from typer.testing import CliRunner

import hjepa_mlx as hj
from hjepa_mlx import backend, checkpoint, runs
from hjepa_mlx.cli import app
from hjepa_mlx.config import Config, Data
from hjepa_mlx.data.pipeline import Skipped
from hjepa_mlx.data.source import Split
from hjepa_mlx.errors import HJEPAError, UsageError
from hjepa_mlx.eval import linear_probe
from hjepa_mlx.eval.features import Encoder, Features, extract, model_features
from hjepa_mlx.eval.verdict import verdicts

LEVELS = ["level_0", "level_1", "level_2"]
ALL = {*LEVELS, "all_levels"}
QUICK = hj.Protocol(draws=0, token_gb=0)
COLOURS = {"blue": (30, 30, 220), "green": (30, 220, 30), "red": (220, 30, 30)}


def pictures(root: Path, count: int, classes: tuple[str, ...] = tuple(COLOURS)) -> Path:
    """A folder a class with `count` noisy 16×16 pictures of one colour."""
    rng = np.random.default_rng(zlib.crc32(root.name.encode()))
    for name in classes:
        (root / name).mkdir(parents=True)
        for number in range(count):
            noise = rng.integers(-30, 30, (16, 16, 3))
            pixels = np.clip(COLOURS[name] + noise, 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(root / name / f"{number:03d}.png")
    return root


@pytest.fixture(scope="module", autouse=True)
def _threads() -> Iterator[None]:
    """One BLAS thread, as evaluation has it."""
    with backend.computing_threads():
        yield


@pytest.fixture(scope="module")
def build(tiny_config: Callable[..., Config]) -> Callable[..., hj.HJEPA]:
    """A tiny model for 16×16 images, whose two encoders and random initialisation all differ."""

    def made(**data: Any) -> hj.HJEPA:
        model, *others = (
            hj.HJEPA(tiny_config(seed=seed, data={"image_size": 16, **data})) for seed in range(3)
        )
        model.target_encoder.update(others[0].target_encoder.parameters())
        model.context_encoder.update(others[1].context_encoder.parameters())
        mx.eval(model.parameters())
        return model

    return made


@pytest.fixture(scope="module")
def demo(build: Callable[..., hj.HJEPA]) -> tuple[hj.HJEPA, hj.Report]:
    """A model and its evaluation on the demo images, with everything in it."""
    model = build(name="demo", limit=200)
    return model, hj.evaluate(model)


def encoders(model: hj.HJEPA) -> Callable[[], list[Encoder]]:
    return lambda: [model_features(model, tokens=True)]


# Features


def test_features_are_the_means_of_what_the_model_encodes_with_labels_and_indices_aligned(
    build: Callable[..., hj.HJEPA], tmp_path: Path
) -> None:
    folder = pictures(tmp_path / "train", 50)
    pictures(tmp_path / "val", 1)
    broken = folder / "green" / "017.png"
    broken.write_bytes(broken.read_bytes()[:200])
    model = build(name="folder", dir=str(tmp_path))
    source = hj.open_source(model.config.data, "train")
    stride, skipped = 3, Skipped()
    (found,) = extract(encoders(model), source, model.config, skipped, stride)
    assert list(skipped.reasons) == [str(broken)]
    paths = sorted(path for path in folder.rglob("*.png") if path != broken)
    assert [source.name_of(int(i)) for i in found.indices] == list(map(str, paths))
    assert [sorted(COLOURS)[label] for label in found.labels] == [p.parent.name for p in paths]
    images = np.stack([np.asarray(Image.open(path)) for path in paths])
    assert len(found) == len(images) == 149  # batches of 64: not a multiple of the stride
    for number, level in enumerate(map(np.array, model.encode(images))):
        assert_allclose(found.by_name[f"level_{number}"], level.mean(1), atol=1e-5)
        kept = level[::stride]
        deviation = np.sqrt(kept.var(2, keepdims=True) + 1e-5)
        expected = (kept - kept.mean(2, keepdims=True)) / deviation
        assert_allclose(found.tokens[f"level_{number}"], expected, atol=5e-3)
    assert_array_equal(found.token_labels, found.labels[::stride])
    assert set(found.by_name) == ALL


@pytest.mark.parametrize("compiled", [False, "auto"])
def test_several_threads_make_the_same_features_as_one(
    build: Callable[..., hj.HJEPA], monkeypatch: pytest.MonkeyPatch, compiled: Any
) -> None:
    model = build(name="demo", limit=650)
    model.config.compile = compiled
    source = hj.open_source(model.config.data, "train")

    def by(threads: int) -> Features:
        @contextmanager
        def computing_threads() -> Iterator[int]:
            with threadpool_limits(1, "blas"):
                yield threads

        monkeypatch.setattr(backend, "computing_threads", computing_threads)
        return extract(encoders(model), source, model.config, Skipped(), 2)[0]

    one = by(1)
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)  # threads that could disturb each other then do
    try:
        found = [by(8) for _ in range(3)]
    finally:
        sys.setswitchinterval(before)
    for several in found:
        assert_array_equal(one.indices, several.indices)
        assert_array_equal(one.labels, several.labels)
        for first, second in ((one.by_name, several.by_name), (one.tokens, several.tokens)):
            assert first.keys() == second.keys()
            assert all(np.array_equal(first[name], second[name]) for name in first)


def test_features_too_large_for_memory_are_the_same_features(
    build: Callable[..., hj.HJEPA], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build(name="demo", limit=150)
    source = hj.open_source(model.config.data, "train")
    (in_memory,) = extract(encoders(model), source, model.config, Skipped())
    monkeypatch.setattr("hjepa_mlx.eval.features.IN_MEMORY", 0)
    (on_disk,) = extract(encoders(model), source, model.config, Skipped())
    for first, second in ((in_memory.by_name, on_disk.by_name), (in_memory.tokens, on_disk.tokens)):
        for name in first:
            assert isinstance(second[name], np.memmap)
            assert_array_equal(first[name], second[name])


def test_a_data_set_without_a_readable_image_is_refused(
    build: Callable[..., hj.HJEPA], tmp_path: Path
) -> None:
    for path in pictures(tmp_path, 15).rglob("*.png"):
        path.write_bytes(b"\x89PNG torn")
    with pytest.raises(HJEPAError, match=r"none of the 41 images can be read\. First: .*png"):
        hj.evaluate(build(name="folder", dir=str(tmp_path)))


# The report of a whole evaluation


def test_the_scores_have_the_form_that_was_promised(demo: tuple[hj.HJEPA, hj.Report]) -> None:
    scores = json.loads(json.dumps(demo[1].scores, allow_nan=False))
    random, context = (scores["baselines"][name] for name in ("random_init", "context_encoder"))
    for part in (scores, random, context):
        for protocol in ("linear_probe", "knn"):
            assert part[protocol].keys() == ALL
            for level, value in part[protocol].items():
                assert 0 <= value <= 100
                low, high = part["confidence_95"][protocol][level]
                assert low < value < high
        assert all(1 <= part["feature_rank"][level] <= 64 for level in LEVELS)
        assert 1 <= part["feature_rank"]["all_levels"] <= 3 * 64
        assert part["features"].keys() == ALL
        assert all(0 < figures["alignment"] < 4 for figures in part["features"].values())
    for part in (scores, random):
        assert part["attentive_probe"].keys() == set(LEVELS)
        for share in ("few_labels_1_percent", "few_labels_10_percent"):
            assert all(0 < part[share][level]["mean"] < 100 for level in ALL)
            assert all(0 < part[share][level]["std"] < 30 for level in ALL)
    pixels = scores["baselines"]["pixels"]
    assert pixels.keys() == {"linear_probe", "knn"}
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
        (found,) = extract(lambda: [lambda x: {"images": x}], source, model.config, Skipped())
        parts.append((found.by_name["images"], found.labels))
    (images, labels), (queries, truth) = parts
    reference = KNeighborsClassifier(
        20, metric="cosine", algorithm="brute", weights=lambda d: np.exp((1 - d) / 0.07)
    )
    grey, asked = (x[..., 0].reshape(len(x), -1).astype(float) for x in (images, queries))
    expected = 100 * reference.fit(grey, labels).score(asked, truth)
    assert baselines["pixels"]["knn"] == pytest.approx(expected, abs=0.5)
    ranks = set()
    for network, encoder, scores in (
        (model, "target", report.scores),
        (model, "context", baselines["context_encoder"]),
        (hj.HJEPA(model.config), "target", baselines["random_init"]),
    ):
        bank_levels, query_levels = (network.encode(x, encoder) for x in (images, queries))
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
    build: Callable[..., hj.HJEPA], tmp_path: Path
) -> None:
    model = build(name="folder", dir=str(pictures(tmp_path, 80)))
    scores, again = (hj.evaluate(model).scores for _ in range(2))
    assert scores == again
    assert scores["knn"]["level_2"] == scores["linear_probe"]["level_2"] == 100
    assert scores["attentive_probe"]["level_0"] == 100
    assert scores["baselines"]["pixels"] == {"knn": 100, "linear_probe": 100}
    assert scores["protocol"]["bank_images"] == 216
    assert scores["protocol"]["query_images"] == 24


@pytest.mark.parametrize("compared", [20, 100])
def test_alignment_compares_each_image_with_its_own_crop(
    build: Callable[..., hj.HJEPA],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    compared: int,
) -> None:
    """Crops of the whole area of a square are the image itself: any mix-up shows."""
    pictures(tmp_path / "train", 20)
    folder = pictures(tmp_path / "val", 15)
    for name in ("blue/003.png", "red/000.png"):
        (folder / name).write_bytes(b"")
    monkeypatch.setattr("hjepa_mlx.eval.evaluation.ALIGNED", compared)
    model = build(name="folder", dir=str(tmp_path), crop_scale=[1.0, 1.0])
    scores = hj.evaluate(model, protocol=QUICK).scores
    assert scores["protocol"]["skipped_images"] == 2
    assert scores["protocol"]["query_images"] == 43
    for figures in scores["features"].values():
        assert figures["alignment"] == pytest.approx(0, abs=1e-6)
        assert figures["uniformity"] < -0.01
    assert "2 images could not be read." in hj.Report(scores).findings()


def test_a_model_is_evaluated_on_another_data_set(
    build: Callable[..., hj.HJEPA], tmp_path: Path
) -> None:
    model = build(name="demo", limit=50)  # which is no limit of the other data set
    layouts.cifar10(tmp_path / "cifar10", per_batch=20)
    layouts.prepared(tmp_path, "cifar10")
    pictures(tmp_path / "own", 30)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"data: {{name: folder, dir: {tmp_path / 'own'}}}")
    for data, folder, name, counts in (
        ("cifar10", str(tmp_path), "cifar10", (100, 20)),
        ("folder", str(tmp_path / "own"), "folder", (81, 9)),
        (str(recipe), None, "folder", (81, 9)),
    ):
        found = hj.evaluate(model, data, folder, QUICK).scores
        protocol = found["protocol"]
        assert (protocol["bank_images"], protocol["query_images"]) == counts
        assert protocol["data"] == name
        assert found["trained"]["images"] == "demo"
        assert found["knn"].keys() == ALL
        assert found["promises"] == []


def test_the_protocol_is_followed_and_written_down(
    build: Callable[..., hj.HJEPA], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linear_probe, "SGD_LEAST_STEPS", 50)
    model = build(name="folder", dir=str(pictures(tmp_path, 12)))
    scores = hj.evaluate(model, protocol=hj.Protocol(5, 0.1, "sgd", 0, 0)).scores
    assert (scores["protocol"]["k"], scores["protocol"]["temperature"]) == (5, 0.1)
    assert scores["protocol"]["linear_probe"].startswith("sgd ")
    assert not any(key.startswith(("few_labels", "attentive")) for key in scores)
    with_tokens = hj.evaluate(model, protocol=hj.Protocol(draws=0, token_gb=5e-5)).scores
    size = 33 * (16 + 4 + 1) * 64 * 2  # bytes
    stride = -(-size // 50_000)
    assert with_tokens["protocol"]["attentive_bank_images"] == -(-33 // stride) < 33


def test_without_classes_only_label_free_figures_are_made(
    build: Callable[..., hj.HJEPA], tmp_path: Path
) -> None:
    folder = pictures(tmp_path, 40, ("red",))
    report = hj.evaluate(build(name="folder", dir=str(folder)))
    assert not {"knn", "linear_probe", "attentive_probe"} & report.scores.keys()
    assert report.scores["feature_rank"].keys() == ALL
    assert report.scores["baselines"]["random_init"]["feature_rank"].keys() == ALL
    assert report.scores["promises"] == []
    assert report.findings() == ["No labels in this data set: k-NN and probes were left out."]
    assert f"{report.scores['feature_rank']['level_1']:.1f}" in printed(report)


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


def test_a_single_test_image_counts_as_collapsed(
    build: Callable[..., hj.HJEPA], tmp_path: Path
) -> None:
    folder = pictures(tmp_path, 13, ("red",))
    scores = hj.evaluate(build(name="folder", dir=str(folder))).scores
    json.dumps(scores, allow_nan=False)
    figures = scores["features"]["level_0"]
    assert (figures["mean_cosine"], figures["uniformity"], figures["feature_std"]) == (1, 0, 0)


# No image is learnt from and judged


def split_folders(root: Path) -> None:
    pictures(root / "train", 12)
    pictures(root / "val", 3)


SPLITS: dict[str, tuple[str, str, Callable[[Path], Any]]] = {
    "a folder without splits": ("folder", "", lambda root: pictures(root, 30)),
    "a folder with splits": ("folder", "", split_folders),
    "cifar10": ("cifar10", "cifar10", layouts.cifar10),
    "stl10": ("stl10", "stl10", layouts.stl10),
    "imagenet in folders": (
        "imagenet100", "imagenet100", lambda root: layouts.folders(root, layouts.photos(CMC)),
    ),
    "imagenet in parts": (
        "imagenet100", "imagenet100",
        lambda root: layouts.kaggle_hundred(root, layouts.photos(KAGGLE)),
    ),
    "imagenet's contest": (
        "imagenet100", "imagenet1k", lambda root: layouts.kaggle_contest(root, layouts.photos(CMC)),
    ),
    "imagenet in tars": (
        "imagenet1k", "imagenet1k", lambda root: layouts.tars(root, layouts.photos(CMC[:9])),
    ),
    "imagenet in parquet": (
        "imagenet100", "imagenet100", lambda root: layouts.parquet(root, layouts.photos(CMC)),
    ),
}  # fmt: skip


@pytest.mark.parametrize("layout", SPLITS)
def test_no_test_image_is_trained_on_or_learnt_from(layout: str, tmp_path: Path) -> None:
    name, inner, make = SPLITS[layout]
    make(tmp_path / inner)
    if name != "folder":
        layouts.prepared(tmp_path, name)
    seen = {}
    for split in get_args(Split):
        source = hj.open_source(Data(name=name, dir=str(tmp_path)), split)
        names = [source.name_of(i) for i in range(len(source))]
        contents = [hashlib.sha256(source.read(i).tobytes()).digest() for i in range(len(source))]
        assert len(set(names)) == len(names) > 0
        seen[split] = {*names, *contents}
    assert seen["test"].isdisjoint(seen["train"] | seen["pretrain"])


def test_no_demo_image_is_in_both_splits() -> None:
    train, test = (hj.open_source(Data(name="demo"), split) for split in ("train", "test"))
    known = {train.read(i).tobytes() for i in range(len(train))}
    assert not any(test.read(i).tobytes() in known for i in range(len(test)))


# Verdicts and findings on made-up scores


def made_up(best: float = 60.0, knn: float = 50.0, rank: float = 40.0, random: float = 30.0) -> Any:
    """Scores as `evaluate` gives them, with the best of all in level 1."""

    def network(probe: float, neighbours: float) -> dict[str, Any]:
        behind = dict(zip([*LEVELS, "all_levels"], (3.0, 0.0, 2.0, 1.0), strict=True))
        return {
            "linear_probe": {level: probe - less for level, less in behind.items()},
            "knn": {level: neighbours - less for level, less in behind.items()},
            "confidence_95": {
                kind: {level: [best - less - 2, best - less + 2] for level, less in behind.items()}
                for kind, best in (("linear_probe", probe), ("knn", neighbours))
            },
            "features": {
                level: {
                    "effective_rank": rank * 7.68 - less, "rankme": 768.0 - less,
                    "effective_rank_percent": rank - less, "rankme_percent": 100 - less,
                    "dimension": 768, "feature_std": 0.91, "mean_cosine": -0.12,
                    "uniformity": -3.94, "alignment": 1.57,
                }
                for level, less in behind.items()
            },
            "feature_rank": {level: rank * 7.68 - less for level, less in behind.items()},
            "few_labels_1_percent": {level: {"mean": probe - 20 - less, "std": 12.3}
                                     for level, less in behind.items()},
            "few_labels_10_percent": {level: {"mean": probe - 10 - less, "std": 10.4}
                                      for level, less in behind.items()},
            "attentive_probe": {level: probe + 3 - behind[level] for level in LEVELS},
        }  # fmt: skip

    scores = network(best, knn)
    baselines = {name: network(random, random - 5) for name in ("context_encoder", "random_init")}
    for kind in ("few_labels_1_percent", "few_labels_10_percent", "attentive_probe"):
        del baselines["context_encoder"][kind]
    return {
        **scores,
        "promises": verdicts(scores, "stl10"),
        "baselines": {**baselines, "pixels": {"linear_probe": 25.5, "knn": 24.5}},
        "protocol": {
            "data": "stl10", "k": 20, "bank_images": 1_281_167, "query_images": 50_000,
            "skipped_images": 0,
        },
        "trained": {"run": "runs/x", "step": 7, "epochs": 12.5, "images": "stl10",
                    "model": "ViT small (384 wide, 12 blocks), patch 16 at 224"},
    }  # fmt: skip


@pytest.mark.parametrize(
    ("best", "knn", "rank", "expected"),
    [  # STL-10 promises 55 to 65 % by linear probe, 50 to 60 % by k-NN, about 50 % of the dimension
        (54.9, 49.9, 44.9, "below"),
        (55.0, 50.0, 45.0, "met"),
        (65.0, 60.0, 55.0, "met"),
        (65.1, 60.1, 55.1, "above"),
    ],
)
def test_a_promise_is_met_inside_its_range(
    best: float, knn: float, rank: float, expected: str
) -> None:
    rows = verdicts(made_up(best, knn, rank), "stl10")
    assert [row["measure"] for row in rows] == ["linear_probe", "knn", "effective_rank_percent"]
    assert [row["verdict"] for row in rows] == [expected] * 3
    assert [row["measured"] for row in rows] == [best, knn, rank]
    assert [row["promised"] for row in rows] == [[55, 65], [50, 60], [45, 55]]
    assert {row["level"] for row in rows} == {"level_1"}


def test_a_promise_is_judged_by_the_best_single_level_and_its_rank() -> None:
    scores = made_up()
    scores["linear_probe"]["all_levels"] = 99.0
    scores["linear_probe"]["level_2"] = 70.0
    scores["knn"]["level_0"] = 58.0
    probe, knn, rank = verdicts(scores, "stl10")
    assert (probe["level"], probe["measured"], probe["verdict"]) == ("level_2", 70.0, "above")
    assert (knn["level"], knn["measured"], knn["verdict"]) == ("level_0", 58.0, "met")
    assert (rank["level"], rank["measured"]) == ("level_2", 38.0)


@pytest.mark.parametrize("name", ["demo", "fashion-mnist", "folder", "", "imagenet100+demo"])
def test_nothing_is_judged_where_nothing_was_promised(name: str) -> None:
    assert verdicts(made_up(), name) == []


def test_a_data_set_without_labels_is_not_judged() -> None:
    scores = made_up()
    assert verdicts({"linear_probe": {}, "features": scores["features"]}, "stl10") == []


def test_the_findings_compare_with_random_initialisation_and_pixels() -> None:
    (said,) = hj.Report(made_up(60, random=30)).findings()
    assert said == (
        "Best by linear probe: level 1, 60.0 % (95 % interval 58.0–62.0); +30.0 points against "
        "random initialisation, +34.5 against raw pixels."
    )


@pytest.mark.parametrize(
    ("scores", "words"),
    [
        (made_up(60, knn=70, random=58), "by k-NN, not clearly so by linear probe"),
        (made_up(50, knn=70, random=58), "by k-NN, worse by linear probe"),
        (made_up(60, knn=26, random=30), "by linear probe, not clearly so by k-NN"),
        (made_up(60, knn=20, random=30), "by linear probe, worse by k-NN"),
        (made_up(60, knn=51, random=58), "No better than random initialisation by linear probe or"),
        (made_up(50, knn=40, random=58), "No better than random initialisation by linear probe or"),
    ],
)
def test_what_is_not_clearly_better_than_random_is_said_so(scores: Any, words: str) -> None:
    assert words in hj.Report(scores).findings()[1]


def test_a_probe_that_stopped_early_is_named() -> None:
    scores = made_up() | {"probe_converged": {"level_0": True, "level_1": False}}
    assert "The linear probe of level 1 stopped before" in hj.Report(scores).findings()[1]


# How a report shows itself


def printed(report: Any) -> str:
    """What a terminal of 80 columns shows."""
    file = io.StringIO()
    Console(file=file, width=80).print(report)
    return file.getvalue()


NUMBER = re.compile(r"(?<![\d.,])-?\d[\d,]*(?:\.\d+)?(?![\d,]*\.?\d)")


def numbers_of(scores: Any) -> Counter:
    """Every number that a report has to show, as it is to be written."""
    wanted: Counter = Counter()
    networks = [scores, *(scores["baselines"][n] for n in ("context_encoder", "random_init"))]
    for part in networks:
        for level in ALL:
            wanted[f"{part['linear_probe'][level]:.1f}"] += 1
            wanted[f"{part['knn'][level]:.1f}"] += 1
            low, high = part["confidence_95"]["linear_probe"][level]
            wanted[f"{(high - low) / 2:.1f}"] += 1
            if level in part.get("attentive_probe", {}):
                wanted[f"{part['attentive_probe'][level]:.1f}"] += 1
            for share in ("few_labels_1_percent", "few_labels_10_percent"):
                for value in part.get(share, {}).get(level, {}).values():
                    wanted[f"{value:.1f}"] += 1
            figures = part["features"][level]
            for name in ("effective_rank", "rankme"):
                wanted[f"{figures[name]:.1f}"] += 1
                wanted[f"{figures[f'{name}_percent']:.0f}"] += 1
            for name in ("feature_std", "mean_cosine", "uniformity", "alignment"):
                wanted[f"{figures[name]:.2f}"] += 1
    for value in scores["baselines"]["pixels"].values():
        wanted[f"{value:.1f}"] += 1
    for row in scores["promises"]:
        wanted[f"{row['measured']:.1f}"] += 1
        wanted.update(f"{bound:g}" for bound in row["promised"])
    for key in ("bank_images", "query_images"):
        wanted[f"{scores['protocol'][key]:,}"] += 1
    return wanted


def test_a_report_of_80_columns_shows_every_number(demo: tuple[hj.HJEPA, hj.Report]) -> None:
    widest = made_up(best=100.0, knn=100.0, rank=100.0, random=99.9)
    for scores in (demo[1].scores, widest):
        lines = printed(hj.Report(scores))
        assert max(map(len, lines.splitlines())) <= 80
        shown = Counter(NUMBER.findall(lines.replace("–", " ")))
        assert not numbers_of(scores) - shown
    assert "Promised for 100 epochs" in lines
    assert lines.count("above") == 3


def test_a_report_read_back_from_json_prints_the_same(
    demo: tuple[hj.HJEPA, hj.Report], tmp_path: Path
) -> None:
    report = demo[1]
    report.save(tmp_path / "eval.json")
    again = hj.Report(json.loads((tmp_path / "eval.json").read_text()))
    assert printed(again) == printed(report)
    assert again.findings() == report.findings()


def test_what_looks_like_markup_is_shown_as_it_is(
    build: Callable[..., hj.HJEPA], tmp_path: Path
) -> None:
    scores = made_up()
    scores["protocol"]["data"] = "a[/b] [red]c"
    assert "a[/b] [red]c: accuracy" in printed(hj.Report(scores))
    run = hj.Run(saved(build(name="demo"), tmp_path / "a[b" / "c] [lr=1]"))
    assert "[lr=1]" in printed(run)


def test_a_notebook_shows_a_hostile_name_as_it_is() -> None:
    scores = made_up()
    scores["protocol"]["data"] = "<script>alert('x')</script>&amp;"
    shown = hj.Report(scores)._repr_mimebundle_()
    assert "<script" not in shown["text/html"]
    assert "&lt;script&gt;alert(" in shown["text/html"]
    assert "&amp;amp;" in shown["text/html"]
    assert "<script>alert('x')</script>&amp;" in shown["text/plain"]


# The command line


def saved(model: hj.HJEPA, folder: Path) -> str:
    """A run folder with the model in a checkpoint."""
    config = model.config.model_copy(deep=True)
    config.run.dir = str(folder)
    run = runs.create(config)
    step = hj.Step(model, config)
    state = {"epoch": 2.5, "images": 90, "position": [0, 0], "window": [], "milestone": True,
             "own_parts": {"loss_fn": None, "sampler": None, "model": None}}  # fmt: skip
    checkpoint.save(run.checkpoints, step, 7, state, 3)
    return str(folder)


def invoke(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["eval", *arguments])


FAST = ("--draws", "0", "--token-gb", "0")


def test_the_command_prints_tables_and_keeps_the_scores(
    build: Callable[..., hj.HJEPA], tmp_path: Path
) -> None:
    model = build(name="folder", dir=str(pictures(tmp_path / "images", 20)))
    run = saved(model, tmp_path / "run")
    ended = invoke(run, *FAST, "--k", "7", "--json", str(tmp_path / "scores.json"))
    assert ended.exit_code == 0, ended.stderr
    assert "k-NN 7" in ended.stdout
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert scores["protocol"]["k"] == 7
    assert scores["trained"] | {"model": ""} == {
        "run": run, "step": 7, "epochs": 2.5, "images": "folder", "model": "",
    }  # fmt: skip
    kept = hj.Run(run).report
    assert kept is not None
    assert kept.scores == scores
    expected = hj.evaluate(model, protocol=hj.Protocol(7, draws=0, token_gb=0)).scores
    assert {**scores, "trained": {}} == {**json.loads(json.dumps(expected)), "trained": {}}


def test_the_command_evaluates_elsewhere_without_touching_the_runs_own_scores(
    build: Callable[..., hj.HJEPA], tmp_path: Path
) -> None:
    run = saved(build(name="demo", limit=50), tmp_path / "run")
    folder = pictures(tmp_path / "images", 20)
    ended = invoke(run, "--data", "folder", "--data-dir", str(folder), *FAST, "--json", "-")
    assert ended.exit_code == 0, ended.stderr
    assert json.loads(ended.stdout)["protocol"]["data"] == "folder"
    assert not (tmp_path / "run" / "eval.json").exists()


def test_scores_are_kept_though_nobody_reads_them(
    build: Callable[..., hj.HJEPA], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gone(*arguments: Any, **options: Any) -> None:
        raise BrokenPipeError

    run = saved(build(name="demo", limit=50), tmp_path / "run")
    monkeypatch.setattr("rich.console.Console.print", gone)
    assert invoke(run, *FAST).exit_code
    assert "knn" in json.loads((tmp_path / "run" / "eval.json").read_text())


def test_the_command_says_that_there_are_no_labels(
    build: Callable[..., hj.HJEPA], tmp_path: Path
) -> None:
    folder = pictures(tmp_path / "images", 40, ("red",))
    run = saved(build(name="folder", dir=str(folder)), tmp_path / "run")
    ended = invoke(run)
    assert ended.exit_code == 0, ended.stderr
    assert "No labels in this data set: k-NN and probes were left out." in ended.stdout
    assert "RankMe" in ended.stdout
    assert "linear probe" not in ended.stdout
    assert "feature_rank" in json.loads((tmp_path / "run" / "eval.json").read_text())


@pytest.fixture(scope="module")
def places(
    build: Callable[..., hj.HJEPA], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, str]:
    """Runs and image folders with something wrong, by name."""
    root = tmp_path_factory.mktemp("wrong")
    images = pictures(root / "images", 20)
    pictures(root / "few", 4)
    pictures(root / "unlike" / "train", 12)
    pictures(root / "unlike" / "val", 2, ("red", "green"))
    pictures(root / "nine", 9, ("red",))
    model = build(name="folder", dir=str(images))
    run = saved(model, root / "run")
    broken = copy.copy(model.target_encoder.parameters())
    model.target_encoder.update(tree_map(lambda w: mx.full(w.shape, float("nan")), broken))
    saved(model, root / "nan")
    model.config.run.dir = str(root / "untrained")
    runs.create(model.config)
    names = ("images", "few", "unlike", "nine", "nan", "untrained")
    return {"run": run, **{name: str(root / name) for name in names}}


@pytest.mark.parametrize(
    ("command", "says"),
    [
        ("{images}", "is not a run: it has no config.yaml"),
        ("{untrained}", "has no checkpoint yet"),
        ("{nan}", "the features hold NaN or infinity"),
        ("{run} --probe svm", "No linear probe named 'svm'. There are: logistic_regression, sgd"),
        ("{run} --draws -1", "draws and token_gb at least 0"),
        ("{run} --token-gb -1", "draws and token_gb at least 0"),
        ("{run} --token-gb nan", "draws and token_gb at least 0"),
        ("{run} --token-gb inf", "draws and token_gb at least 0"),
        ("{run} --token-gb 1e-5", "holds the tokens of 4 training images"),
        ("{run} --k 0", "k and temperature must be positive"),
        ("{run} --k 55", "k-NN with k=55 needs at least 55 training images; there are 54"),
        ("{run} --data-dir {few}", "k=20 needs at least 20 training images; there are 11"),
        ("{run} --data-dir {unlike}", "different classes: 3 and 2; only blue for training"),
        ("{run} --data-dir {nine}", "no image is left for evaluation"),
        ("{run} --data-dir {run}/none", "The image folder {run}/none does not exist"),
        ("{run} --data folder", "give --data-dir FOLDER"),
        ("{run} --data imagnet", "No data set or config 'imagnet'"),
        ("{run} --json {run}/none/scores.json", "the folder {run}/none does not exist"),
    ],
)
def test_wrong_use_ends_with_one_line_and_status_2(
    places: dict[str, str], command: str, says: str
) -> None:
    ended = invoke(*command.format(**places).split())
    assert ended.exit_code == 2
    (line,) = ended.stderr.splitlines()
    assert line.startswith("hjepa-mlx: ")
    assert says.format(**places) in line
    assert ended.stdout == ""


@pytest.mark.parametrize(
    "wrong",
    [
        {"probe": "svm"},
        {"draws": -1},
        {"k": 0},
        {"temperature": 0.0},
        {"token_gb": -0.1},
        {"token_gb": float("inf")},
        {"temperature": float("nan")},
    ],
)
def test_a_protocol_that_means_nothing_cannot_be_made(wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        hj.Protocol(**wrong)
