"""Fine-tuning: a trained encoder and a linear head learn the classes of a data set together.

The head starts as the linear probe of the frozen features, so that a head that knows nothing does
not pull the encoder away (LP-FT, Kumar et al., arXiv 2202.10054). Learning rates fall from block to
block towards the image (BEiT, arXiv 2106.08254). Everything is computed in float32.
"""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_map

from hjepa_mlx import backend, checkpoint, schedules
from hjepa_mlx.config import Config
from hjepa_mlx.data.folder import record_of
from hjepa_mlx.data.pipeline import Skipped, training_batches
from hjepa_mlx.data.source import Source, open_sources, pictures
from hjepa_mlx.errors import HJEPAError, UsageError
from hjepa_mlx.eval import linear_probe
from hjepa_mlx.eval.arrays import accuracy, interval
from hjepa_mlx.eval.features import Encoded, Encoder, Features, extract, replica
from hjepa_mlx.eval.labels import check_evaluable, judged
from hjepa_mlx.eval.report import CLASSIFIER
from hjepa_mlx.files import atomic_folder, read_json, sha256, write_json
from hjepa_mlx.flat import Layout
from hjepa_mlx.models.hjepa import HJEPA
from hjepa_mlx.models.vit import VisionTransformer, patchify
from hjepa_mlx.optimizer import AdamW
from hjepa_mlx.progress import bar
from hjepa_mlx.recipes import load_config
from hjepa_mlx.rng import generator
from hjepa_mlx.state import steps_per_epoch

BETAS = [0.9, 0.999]
LEAST_L2 = 1e-4  # of a probe to start from: larger weights throw the encoder about
WEIGHTS = "model.safetensors"


class Classifier(nn.Module):
    """An encoder, and a linear head on the mean of its tokens, standardised.

    classes: their names. Built from the config of a run; `load` reads a trained one.
    """

    def __init__(self, config: Config, classes: tuple[str, ...]) -> None:
        super().__init__()
        self.config, self.classes = config, classes
        self.encoder = VisionTransformer(config)
        self.mean, self.scale = mx.zeros(self.encoder.dim), mx.ones(self.encoder.dim)  # fixed
        self.head = nn.Linear(self.encoder.dim, len(classes))

    def patches(self, images: mx.array) -> mx.array:
        """Images [B, S, S, 3] uint8 as the encoder sees them: [B, (S/p)², p·p·3]."""
        model = self.config.model
        return patchify(images, model.patch_size, model.image_mean, model.image_std)

    def features(self, patches: mx.array) -> mx.array:
        """The mean [B, D] of the tokens of patches [B, N, p·p·3]."""
        return self.encoder(patches)[0].mean(1)

    def scores(self, features: mx.array) -> mx.array:
        """Class scores [B, C] of features [B, D]."""
        return self.head((features - self.mean) / self.scale)

    @property
    def layers(self) -> dict[str, Any]:
        """The trained weights from the image to the head, a tree for each layer."""
        tree = self.parameters()
        encoder = tree["encoder"]
        first = {part: encoder[part] for part in encoder if part not in ("blocks", "norm")}
        last = {"norm": encoder["norm"], "head": tree["head"]}
        layers = [first, *encoder["blocks"], last]
        return {str(number): layer for number, layer in enumerate(layers)}

    def put(self, layers: dict[str, Any]) -> None:
        """Take weights as `layers` gives them."""
        first, *blocks, last = layers.values()
        encoder = {**first, "blocks": blocks, "norm": last["norm"]}
        self.update({"encoder": encoder, "head": last["head"]})


def finetune(
    model: HJEPA, config: Config | None = None, scratch: bool = False
) -> tuple[Classifier, dict[str, Any]]:
    """Fine-tune the target encoder of `model` on labels.

    config: that of the run (the default) but for `data`, `finetune` and `seed`. scratch: start from
    random weights instead, to compare. Returns the classifier, and its accuracy in per cent on test
    images, before ("frozen": the linear probe) and after. Raises UsageError without classes.
    """
    config = (config or model.config).model_copy(deep=True)
    config.optim.accumulate = 1
    config.data.crop_scale, config.data.flip = config.finetune.crop_scale, config.finetune.flip
    if config.model != model.config.model:
        raise UsageError("The network cannot be changed now: leave model.* as the run has it.")
    run, step = (model.origin.run, model.origin.step) if model.origin else (None, None)
    record = record_of(run, model.config.data, config.data)
    opened = open_sources(config.data, record, ("train", "test"))
    train, test, left_out = judged(opened["train"], opened["test"])
    config.data.bits = train.bits or config.data.bits
    if not train.classes:
        raise UsageError(f"{train.name} has no labels to learn. {' '.join(left_out)}".rstrip())
    check_evaluable(train, test)
    total = (n := config.finetune.epochs) and n * steps_per_epoch(config, len(train))
    backend.set_memory_limits()
    skipped, classifier = Skipped(), Classifier(config, train.classes)
    classifier.encoder.update((HJEPA(config) if scratch else model).target_encoder.parameters())
    mx.eval(classifier.parameters())
    x, y = (found := _outputs(classifier, train, skipped)).pooled["features"], found.labels
    probe = linear_probe.fit(x, y)
    classifier.mean, classifier.scale = mx.array(probe.mean), mx.array(probe.scale)
    classifier.head.update(_linear(probe))
    scores = {"frozen": _accuracy(classifier, test, skipped)}
    if scratch:  # the probe of random features would be a head start
        classifier.head.update(tree_map(mx.zeros_like, classifier.head.parameters()))
    elif total and probe.l2 < LEAST_L2:
        probe = next(linear_probe.solutions(x, y, len(train.classes), [LEAST_L2], probe.weights))
        classifier.head.update(_linear(probe))
    if total:
        _train(classifier, train, total, skipped, scratch)
        scores["fine_tuned"] = _accuracy(classifier, test, skipped)
    return classifier, {
        **scores,
        "confidence_95": {name: interval(value, len(test)) for name, value in scores.items()},
        "scratch": scratch,
        "run_step": step if record else None,  # of the run, with its own data
        "train_images": len(train),
        "test_images": len(test),
        "skipped_images": len(skipped),
        "left_out": left_out,
    }


def _linear(probe: linear_probe.LinearProbe) -> dict[str, mx.array]:
    return {"weight": mx.array(probe.weights[:-1].T), "bias": mx.array(probe.weights[-1])}


def _outputs(classifier: Classifier, source: Source, skipped: Skipped) -> Features:
    """Features [N, D] and class probabilities [N, C] of all images of a source, by these names."""

    def make() -> list[Encoder]:
        own = replica(classifier)

        def compute(images: mx.array) -> dict[str, mx.array]:
            x = own.features(own.patches(images))
            return {"features": x, "probabilities": mx.softmax(own.scores(x), axis=-1)}

        run = mx.compile(compute, inputs=[own.state]) if backend.compiles(own.config) else compute
        return [lambda x: Encoded({k: np.array(v) for k, v in run(mx.array(x)).items()}, {})]

    return extract(make, source, classifier.config, skipped)[0]


def _accuracy(classifier: Classifier, source: Source, skipped: Skipped) -> float:
    found = _outputs(classifier, source, skipped)
    return accuracy(found.pooled["probabilities"].argmax(1), found.labels)


def mixed_loss(scores: mx.array, labels: mx.array, mix: mx.array, smoothing: float) -> mx.array:
    """Cross-entropy of scores [B, C] of images of which 1 − mix is the image across the batch."""
    own, other = (
        nn.losses.cross_entropy(scores, y, label_smoothing=smoothing, reduction="mean")
        for y in (labels, labels[::-1])
    )
    return mix * own + (1 - mix) * other


def _train(
    classifier: Classifier, source: Source, total: int, skipped: Skipped, scratch: bool
) -> None:
    """AdamW over all layers for `total` steps, each layer with its share of the learning rate."""
    config = classifier.config
    settings, alpha = config.finetune, config.finetune.mixup
    layout = Layout(classifier.layers)
    weights = layout.join(classifier.layers)
    decay = 1.0 if scratch else settings.layer_decay
    shares = {layer: decay**above for above, layer in enumerate(reversed(list(weights)))}
    optimizer = AdamW(BETAS)
    optimizer.init(weights)
    optimizer.state["weight_decay"] = mx.array(settings.weight_decay)
    state = [weights, optimizer.state]

    def loss_fn(layers: dict, patches: mx.array, labels: mx.array, mix: mx.array) -> mx.array:
        classifier.put(layers)
        scores = classifier.scores(classifier.features(patches))
        return mixed_loss(scores, labels, mix, settings.label_smoothing)

    def update(images: mx.array, labels: mx.array, mix: mx.array, lr: mx.array) -> mx.array:
        patches = classifier.patches(images)
        patches = mix * patches + (1 - mix) * patches[::-1]
        layers = layout.split(weights)
        loss, gradients = mx.value_and_grad(loss_fn)(layers, patches, labels, mix)
        optimizer.learning_rate = lr
        updated = optimizer.apply_gradients(layout.join(gradients), weights)
        for layer, share in shares.items():  # an update of AdamW is proportional to the rate
            old, new = weights[layer], updated[layer]
            weights[layer] = {kind: old[kind] + share * (new[kind] - old[kind]) for kind in old}
        return loss

    if backend.compiles(config):
        update = mx.compile(update, inputs=state, outputs=state)
    batches = training_batches(source, config, skipped=skipped)
    with closing(batches), bar("Fine-tuning", total, "steps") as advance:
        for step in range(total):
            batch = next(batches)
            draws = generator(config.seed, "mixup", step)
            mix = draws.beta(alpha, alpha) if alpha else 1.0
            lr = schedules.warmup_cosine(step, total, total // 10, settings.lr, 0.0)
            values = (mx.array(value, mx.float32) for value in (mix, lr))
            labels = mx.array(source.labels[batch.numbers])
            loss = update(mx.array(batch.images), labels, *values)
            mx.eval(loss, state)
            if not mx.isfinite(loss):
                raise HJEPAError(f"The loss of step {step + 1} is {loss}. Lower finetune.lr.")
            advance(1)
    classifier.put(layout.split(weights))
    mx.eval(classifier.parameters())


def save(classifier: Classifier, folder: Path, scores: dict[str, Any]) -> None:
    """Write a folder that `load` reads: safetensors, the config, and the classes with `scores`."""
    with atomic_folder(folder) as part:
        with open(part / WEIGHTS, "wb") as file:
            mx.save_safetensors(file, dict(tree_flatten(classifier.parameters())))
        (part / "config.yaml").write_text(classifier.config.to_yaml())
        checksum = sha256(part / WEIGHTS)
        about = {"classes": classifier.classes, "scores": scores, "sha256": checksum}
        write_json(part / CLASSIFIER, about)


def load(folder: str | Path) -> Classifier:
    """The classifier that `save` wrote. UsageError if it is none, HJEPAError if it is damaged."""
    folder = Path(folder)
    if not (folder / CLASSIFIER).is_file():
        raise UsageError(
            f"{folder} is no classifier: it has no {CLASSIFIER}. Make one: finetune RUN."
        )
    try:
        about = read_json(folder / CLASSIFIER)
        classifier = Classifier(load_config(folder / "config.yaml"), tuple(about["classes"]))
        if sha256(folder / WEIGHTS) != about["sha256"]:
            raise ValueError(f"{WEIGHTS} does not match its checksum")
        found = checkpoint.read_safetensors(folder / WEIGHTS)
        classifier.load_weights([(name, w.astype(mx.float32)) for name, w in found.items()])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise HJEPAError(
            f"The classifier {folder} is damaged: {error}. Delete it and fine-tune again."
        ) from None
    mx.eval(classifier.parameters())
    return classifier


def predict(
    classifier: Classifier, images: list[str]
) -> tuple[list[str], np.ndarray, dict[str, str]]:
    """Class probabilities [N, C] of images in files, folders and lists; with their paths.

    Also what was left out: path → reason.
    """
    source, listing = pictures(images, classifier.config.data.bits)
    found = _outputs(classifier, source, skipped := Skipped())
    paths = [listing.names[index] for index in found.indices]
    return paths, found.pooled["probabilities"], {**listing.left_out, **skipped}
