"""Reports of made-up scores: promises, findings, tables in a terminal and in a notebook."""

import io
import json
import re
from collections import Counter
from typing import Any

import pytest
from evaluating import ALL, LEVELS
from rich.console import Console

import hjepa_mlx as hj
from hjepa_mlx.eval.report import add_fine_tuned, promises


def made_up(best: float = 60.0, knn: float = 50.0, rank: float = 40.0, random: float = 30.0) -> Any:
    """Scores as `evaluate` gives them, with the best of all in level 1."""
    behind = dict(zip([*LEVELS, "whitened"], (3.0, 0.0, 2.0, 1.0), strict=True))

    def below(top: float) -> dict[str, float]:
        return {level: top - less for level, less in behind.items()}

    def few(top: float, std: float) -> dict[str, Any]:
        return {level: {"mean": value, "std": std} for level, value in below(top).items()}

    def network(probe: float, neighbours: float) -> dict[str, Any]:
        best = {
            "effective_rank": rank * 7.68, "effective_rank_percent": rank, "rankme": 768.0,
            "rankme_percent": 100.0, "feature_std": 4.0,
        }  # fmt: skip
        return {
            "linear_probe": below(probe),
            "knn": below(neighbours),
            "attentive_probe": {level: below(probe + 3)[level] for level in LEVELS},
            "confidence_95": {
                kind: {level: [value - 2, value + 2] for level, value in below(top).items()}
                for kind, top in (("linear_probe", probe), ("knn", neighbours))
            },
            "features": {
                level: {key: top - less for key, top in best.items()} | {"dimension": 768}
                for level, less in behind.items()
            },
            "few_labels_1_percent": few(probe - 20, 12.3),
            "few_labels_10_percent": few(probe - 10, 10.4),
        }

    scores = network(best, knn)
    baselines = {name: network(random, random - 5) for name in ("context_encoder", "random_init")}
    for kind in ("few_labels_1_percent", "few_labels_10_percent", "attentive_probe"):
        del baselines["context_encoder"][kind]
    return {
        **scores,
        "promises": promises(scores, "stl10"),
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
    rows = promises(made_up(best, knn, rank), "stl10")
    assert [row["measure"] for row in rows] == ["linear_probe", "knn", "effective_rank_percent"]
    assert [row["verdict"] for row in rows] == [expected] * 3
    assert [row["measured"] for row in rows] == [best, knn, rank]
    assert [row["promised"] for row in rows] == [[55, 65], [50, 60], [45, 55]]
    assert {row["level"] for row in rows} == {"level_1"}


def test_a_promise_is_judged_by_the_best_single_level_and_its_rank() -> None:
    scores = made_up()
    scores["linear_probe"]["whitened"] = 99.0
    scores["linear_probe"]["level_2"] = 70.0
    scores["knn"]["level_0"] = 58.0
    probe, knn, rank = promises(scores, "stl10")
    assert (probe["level"], probe["measured"], probe["verdict"]) == ("level_2", 70.0, "above")
    assert (knn["level"], knn["measured"], knn["verdict"]) == ("level_0", 58.0, "met")
    assert (rank["level"], rank["measured"]) == ("level_2", 38.0)


def test_the_nearest_published_figures_stand_beside_the_promise() -> None:
    scores = made_up()
    scores["promises"] = promises(made_up(), "imagenet100")
    assert [row["published"] for row in scores["promises"]] == [42.3, 34.8, None]
    shown = " ".join(printed(hj.Report(scores)).split())
    assert "42.3" in shown
    assert "CNN-JEPA, arXiv 2408.07514" in shown
    assert "never measured" in shown


def test_the_image_level_is_named() -> None:
    scores = made_up()
    assert "is the image" not in printed(hj.Report(scores))
    scores["trained"]["image_level"] = "level_2"
    assert "Level 2 is the image" in " ".join(printed(hj.Report(scores)).split())


@pytest.mark.parametrize("name", ["demo", "fashion-mnist", "folder", "", "imagenet100+demo"])
def test_nothing_is_judged_where_nothing_was_promised(name: str) -> None:
    assert promises(made_up(), name) == []
    assert promises({"features": made_up()["features"]}, "stl10") == []  # no labels


def test_the_findings_compare_with_random_initialisation_and_pixels() -> None:
    (said,) = hj.Report(made_up(60, random=30)).findings()
    assert said == (
        "Target encoder, best by linear probe: level 1, 60.0 % (95 % interval 58.0–62.0); "
        "+30.0 points against random initialisation, +34.5 against raw pixels."
    )


@pytest.mark.parametrize(
    ("scores", "words"),
    [
        (made_up(60, knn=70, random=58), "by k-NN, not clearly so by linear probe"),
        (made_up(50, knn=70, random=58), "by k-NN, worse by linear probe"),
        (made_up(60, knn=26, random=30), "by linear probe, not clearly so by k-NN"),
        (made_up(60, knn=20, random=30), "by linear probe, worse by k-NN"),
        (made_up(60, knn=51, random=58), "Not clearly better than random initialisation by linear"),
        (made_up(50, knn=40, random=58), "Not clearly better than random initialisation by linear"),
    ],
)
def test_what_is_not_clearly_better_than_random_is_said_so(scores: Any, words: str) -> None:
    assert words in hj.Report(scores).findings()[1]


def test_the_fine_tuned_accuracy_stands_where_nothing_else_could_be_judged(tmp_path) -> None:
    scores = {"fine_tuned": 50.0, "run_step": 5, "confidence_95": {"fine_tuned": [40.0, 60.0]}}
    (tmp_path / "finetuned").mkdir()
    (tmp_path / "finetuned" / "classifier.json").write_text(json.dumps({"scores": scores}))
    own: Any = {"features": {"level_0": {}}, "baselines": {"random_init": {}}}
    own["trained"] = {"step": 5}
    add_fine_tuned(own, tmp_path)
    assert own["fine_tuned"] == {"level_0": 50.0}
    assert own["confidence_95"] == {"fine_tuned": {"level_0": [40.0, 60.0]}}


def test_a_damaged_classifier_costs_no_evaluation(tmp_path) -> None:
    (tmp_path / "scratch").mkdir()
    own: Any = {"features": {"level_0": {}}, "baselines": {"random_init": {}}}
    for damage in (b"{", b"[]", b"{}", b"\xff", b'{"scores": 1}'):
        (tmp_path / "scratch" / "classifier.json").write_bytes(damage)
        add_fine_tuned(own, tmp_path)
    assert own["baselines"] == {"random_init": {}}


def test_a_probe_that_stopped_early_is_named() -> None:
    scores = made_up() | {"probe_converged": {"level_0": True, "level_1": False}}
    assert "The linear probe of level 1 stopped before" in hj.Report(scores).findings()[1]


def printed(report: Any) -> str:
    """What a terminal of 80 columns shows."""
    file = io.StringIO()
    Console(file=file, width=80).print(report)
    return file.getvalue()


NUMBER = re.compile(r"(?<![\d.,])-?\d[\d,]*(?:\.\d+)?(?![\d,]*\.?\d)")


def numbers_of(scores: Any) -> Counter:
    """Every number that a report has to show, as it is to be written."""
    wanted: list[str] = []
    for part in (scores, *(scores["baselines"][n] for n in ("context_encoder", "random_init"))):
        for level in ALL:
            low, high = part["confidence_95"]["linear_probe"][level]
            figures = part["features"][level]
            few = [part.get(f"few_labels_{share}_percent", {}).get(level, {}) for share in (1, 10)]
            tenths = [part["linear_probe"][level], part["knn"][level], (high - low) / 2]
            tenths += [figures["effective_rank"], figures["rankme"]]
            tenths += [value for reached in few for value in reached.values()]
            if level in part.get("attentive_probe", {}):
                tenths.append(part["attentive_probe"][level])
            wanted += [f"{value:.1f}" for value in tenths]
            wanted += [f"{figures[f'{name}_percent']:.0f}" for name in ("effective_rank", "rankme")]
            wanted.append(f"{figures['feature_std']:.2f}")
    wanted += [f"{value:.1f}" for value in scores["baselines"]["pixels"].values()]
    for row in scores["promises"]:
        wanted += [f"{row['measured']:.1f}", *(f"{bound:g}" for bound in row["promised"])]
    wanted += [f"{scores['protocol'][key]:,}" for key in ("bank_images", "query_images")]
    return Counter(wanted)


def test_a_report_of_80_columns_shows_every_number() -> None:
    widest = made_up(best=100.0, knn=100.0, rank=100.0, random=99.9)
    for scores in (made_up(), widest):
        lines = printed(hj.Report(scores))
        assert max(map(len, lines.splitlines())) <= 80
        shown = Counter(NUMBER.findall(lines.replace("–", " ")))
        assert not numbers_of(scores) - shown
    assert "Promised for 100 epochs" in lines
    assert lines.count("above") == 3


def test_scores_kept_before_some_figures_went_show_the_rest() -> None:
    old = made_up()
    old["features"]["level_0"] |= {"mean_cosine": -0.12, "uniformity": -3.94, "alignment": 1.57}
    old["protocol"]["linear_probe"] = "sgd on standardised features"
    assert printed(hj.Report(old)) == printed(hj.Report(made_up()))


def test_a_hostile_name_is_shown_as_it_is() -> None:
    scores = made_up()
    scores["protocol"]["data"] = "a[/b] [red]c"
    assert "a[/b] [red]c: accuracy" in printed(hj.Report(scores))
    scores["protocol"]["data"] = "<script>alert('x')</script>&amp;"
    shown = hj.Report(scores)._repr_mimebundle_()
    assert "<script" not in shown["text/html"]
    assert "&lt;script&gt;alert(" in shown["text/html"]
    assert "&amp;amp;" in shown["text/html"]
    assert "<script>alert('x')</script>&amp;" in shown["text/plain"]
