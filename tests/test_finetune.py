"""Fine-tuning, its saved classifier, and what it predicts."""

import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from evaluating import COLOURS, network, pictures, saved
from mlx.utils import tree_flatten
from scipy.special import log_softmax
from typer.testing import CliRunner

import hjepa_mlx as hj
from hjepa_mlx.cli import app
from hjepa_mlx.config import Config
from hjepa_mlx.data.pipeline import Skipped
from hjepa_mlx.eval import linear_probe
from hjepa_mlx.eval.features import extract, model_features
from hjepa_mlx.finetune import Classifier, finetune, load, mixed_loss, predict, save


@pytest.fixture(scope="module")
def model(tiny_config: Callable[..., Config], tmp_path_factory: pytest.TempPathFactory) -> hj.HJEPA:
    folder = pictures(tmp_path_factory.mktemp("coloured") / "images", 20)
    return network(tiny_config, name="folder", dir=str(folder), batch_size=54)


def but_for(model: hj.HJEPA, seed: int = 0, **settings: float) -> Config:
    """The model's config with these settings of fine-tuning."""
    config = model.config.model_copy(deep=True)
    config.seed = seed
    config.finetune = config.finetune.model_copy(update=settings)
    return config


def weights(classifier: Classifier) -> dict[str, np.ndarray]:
    return {name: np.array(w) for name, w in tree_flatten(classifier.layers)}


def test_a_classifier_is_whole_or_absent(
    model: hj.HJEPA, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hjepa_mlx.finetune.write_json", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        save(Classifier(model.config, ("a", "b")), tmp_path / "made", {})
    assert not list(tmp_path.iterdir())


def test_a_frozen_encoder_gets_the_linear_probe_as_its_head(model: hj.HJEPA) -> None:
    config = but_for(model, epochs=0)
    config.data.batch_size = 1_000  # more than there are: there is no step to fill
    classifier, scores = finetune(model, config)
    assert "fine_tuned" not in scores
    train, test = (
        extract(lambda: [model_features(model)], source, model.config, Skipped())[0]
        for source in (hj.open_source(model.config.data, split) for split in ("train", "test"))
    )
    probe = linear_probe.fit(train.pooled["level_2"], train.labels)
    expected = probe.predict(test.pooled["level_2"])
    assert scores["frozen"] == 100 * (expected == test.labels).mean()
    name = hj.open_source(model.config.data, "test").name_of
    paths, found, _ = predict(classifier, [name(index) for index in test.indices])
    np.testing.assert_array_equal(found.argmax(1), expected)
    assert [Path(path).name for path in paths] == [Path(name(i)).name for i in test.indices]
    np.testing.assert_allclose(found.sum(1), 1, rtol=1e-5)
    encoder = dict(tree_flatten(model.target_encoder.parameters()))
    for key, value in tree_flatten(classifier.encoder.parameters()):
        assert mx.array_equal(value, encoder[key]), key


def test_epochs_are_whole_also_where_training_accumulated(model: hj.HJEPA) -> None:
    config = but_for(model, epochs=1, lr=1e-3)
    once = weights(finetune(model, config)[0])
    config.optim.accumulate = 1000  # batches an update, of pretraining
    for name, weight in weights(finetune(model, config)[0]).items():
        np.testing.assert_array_equal(weight, once[name])


def test_a_layers_update_falls_by_the_decay_towards_the_image(model: hj.HJEPA) -> None:
    start, whole, decayed = (
        weights(finetune(model, but_for(model, epochs=epochs, layer_decay=decay, mixup=0.5))[0])
        for epochs, decay in ((0, 1.0), (1, 1.0), (1, 0.5))  # one step an epoch
    )
    moved = set()
    for name, before in start.items():
        above = 4 - int(name.split(".")[0])  # patches, three blocks, and the head
        full = whole[name] - before
        np.testing.assert_allclose(decayed[name] - before, 0.5**above * full, atol=2e-6)
        moved |= {name.split(".")[0]} if np.abs(full).max() > 1e-5 else set()
    assert moved == set("01234")


def test_a_learned_table_of_positions_is_fine_tuned_too(model: hj.HJEPA) -> None:
    config = but_for(model, epochs=1, lr=1e-3)
    config.model.positions = "learned"
    learned = hj.HJEPA(config)
    found = finetune(learned, config)[0].encoder.pos_embed
    assert mx.abs(found - learned.target_encoder.pos_embed).max().item() > 1e-5


def test_the_loss_is_the_cross_entropy_of_mixed_and_smoothed_labels() -> None:
    rng = np.random.default_rng(0)
    scores, labels = rng.normal(size=(6, 5)), rng.integers(0, 5, 6)
    wanted = 0.7 * np.eye(5)[labels] + 0.3 * np.eye(5)[labels[::-1]]
    wanted = 0.9 * wanted + 0.1 / 5
    expected = -(wanted * log_softmax(scores, axis=1)).sum(1).mean()
    found = mixed_loss(mx.array(scores.astype(np.float32)), mx.array(labels), mx.array(0.7), 0.1)
    assert found.item() == pytest.approx(expected, rel=1e-5)


def test_a_network_learns_from_scratch_and_its_seed_decides(model: hj.HJEPA) -> None:
    config = but_for(model, seed=3, epochs=8, lr=1e-3)
    one, scores = finetune(model, config, scratch=True)
    again, _ = finetune(model, config, scratch=True)
    assert scores["fine_tuned"] > 90  # a third by chance
    assert scores["scratch"]
    for name, array in weights(one).items():
        np.testing.assert_array_equal(array, weights(again)[name])


def test_the_commands_save_a_classifier_and_name_the_class_of_each_image(
    model: hj.HJEPA, tmp_path: Path
) -> None:
    run, out = saved(model, tmp_path / "run"), tmp_path / "predictions.csv"
    scores = tmp_path / "scores.json"
    made = CliRunner().invoke(
        app, ["finetune", run, "--set", "finetune.epochs=1", "--json", str(scores)]
    )
    assert made.exit_code == 0, made.output
    assert "frozen features 100.0 %" in made.output
    folder = Path(run) / "finetuned"
    assert json.loads(scores.read_text())["test_images"] == 6
    assert load(folder).config.finetune.epochs == 1
    assert sorted(p.name for p in folder.iterdir()) == [
        "classifier.json",
        "config.yaml",
        "model.safetensors",
    ]
    images = pictures(tmp_path / "new", 3)
    (images / "torn.jpg").write_bytes(b"torn")
    single = str(images / "red/000.png")
    ended = CliRunner().invoke(
        app, ["predict", str(folder), str(images), single, "--out", str(out)]
    )
    assert ended.exit_code == 0, ended.output
    assert f"Left out {images / 'torn.jpg'}" in ended.stderr
    with open(out) as file:
        rows = list(csv.DictReader(file))
    assert [(row["path"], row["label"]) for row in rows] == [
        (f"{name}/00{n}.png", name) for name in sorted(COLOURS) for n in range(3)
    ]  # `single` is in the folder, and named once
    assert all(0.5 < float(row["probability"]) <= 1 for row in rows)
    shutil.rmtree(images)
    images.mkdir()
    for name in ("a.txt", "b.jpg"):
        (images / name).write_bytes(b"torn")
    ended = CliRunner().invoke(app, ["predict", str(folder), str(images), "--out", str(out)])
    assert ended.exit_code == 1
    assert "First: " in ended.stderr
    assert "b.jpg: not an image" in ended.stderr
    assert "a.txt" not in ended.stderr
    refused = CliRunner().invoke(app, ["finetune", run])
    assert "is there already. Choose another --out" in refused.stderr


def test_where_a_classifier_cannot_be_written_none_is_trained(
    model: hj.HJEPA, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def trained(*_: object) -> None:
        raise AssertionError

    monkeypatch.setattr("hjepa_mlx.finetune.finetune", trained)
    run = saved(model, tmp_path / "run")
    for command, words in (
        (["finetune", run, "--out", f"{run}/config.yaml/new"], "Nothing can be written in"),
        (["finetune", "hf:someone/run"], "Say where to write what is made of hf:someone/run"),
        (["finetune", run, "--data", "demo", "--set", "data.limit=9"], "Write them into a YAML"),
    ):
        assert words in CliRunner().invoke(app, command).stderr


def test_evaluation_shows_fine_tuned_accuracy_beside_that_from_scratch(
    model: hj.HJEPA, tmp_path: Path
) -> None:
    run, short = saved(model, tmp_path / "run"), ["--set", "finetune.epochs=1"]
    quick = ["--draws", "0", "--attentive-images", "0"]
    scores = {}
    for folder, options in {"finetuned": [], "scratch": ["--scratch"], "eval": quick}.items():
        command = "eval" if folder == "eval" else "finetune"
        more = [] if folder == "eval" else short
        ended = CliRunner().invoke(app, [command, run, *options, *more])
        assert ended.exit_code == 0, ended.output
        if folder != "eval":
            about = json.loads((Path(run) / folder / "classifier.json").read_text())
            scores[folder] = about["scores"]["fine_tuned"]
    assert "fine-tuned" in ended.output
    found = json.loads((Path(run) / "eval.json").read_text())
    assert found["fine_tuned"] == {"level_2": scores["finetuned"]}
    assert found["baselines"]["random_init"]["fine_tuned"] == {"level_2": scores["scratch"]}
    assert found["confidence_95"].keys() >= {"fine_tuned"}
    shutil.rmtree(Path(run) / "finetuned")
    ended = CliRunner().invoke(app, ["finetune", run, "--set", "finetune.epochs=2"])
    now = json.loads((Path(run) / "eval.json").read_text())
    assert now == found | {key: now[key] for key in ("fine_tuned", "confidence_95")}
    other = CliRunner().invoke(app, ["eval", run, *quick, "--image-size", "24"])
    assert "fine-tuned" not in other.output  # its accuracy is of the size of training


def test_what_is_no_classifier_or_damaged_ends_in_one_line(model: hj.HJEPA, tmp_path: Path) -> None:
    classifier = Classifier(model.config, ("a", "b"))
    with pytest.raises(hj.HJEPAError, match=r"no classifier: it has no classifier\.json"):
        load(tmp_path)
    save(classifier, tmp_path / "good", {})
    assert load(tmp_path / "good").classes == ("a", "b")
    with pytest.raises(hj.HJEPAError, match="nowhere does not exist"):
        predict(classifier, ["nowhere"])
    about = json.loads((tmp_path / "good/classifier.json").read_text())
    for name, damage in (
        ("model.safetensors", (tmp_path / "good/model.safetensors").read_bytes()[:-40]),
        ("classifier.json", json.dumps(about | {"classes": ["a"]}).encode()),
        ("classifier.json", b"{"),
    ):
        shutil.rmtree(tmp_path / "bad", ignore_errors=True)
        save(classifier, tmp_path / "bad", {})
        (tmp_path / "bad" / name).write_bytes(damage)
        with pytest.raises(hj.HJEPAError, match=r"bad is damaged: .* fine-tune again"):
            load(tmp_path / "bad")
    with pytest.raises(hj.HJEPAError, match="leave model"):
        finetune(model, hj.load_config("demo"))
