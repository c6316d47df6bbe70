"""The compiled update: the only place where gradients are taken.

Target features → context and prediction → loss → optimizer → EMA, in that order. Everything that
changes lives in explicit state, schedule values arrive as arrays, and every shape is fixed by the
config, so after the few target block shapes have been seen nothing is traced or compiled again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map, tree_reduce, tree_unflatten

from hjepa_mlx import backend, ema, losses, schedules, whitening, world
from hjepa_mlx.config import Config
from hjepa_mlx.flat import Flat, Layout
from hjepa_mlx.losses import LossFn
from hjepa_mlx.masks import Masks
from hjepa_mlx.models.hjepa import HJEPA
from hjepa_mlx.optimizer import AdamW, Muon

Metrics = dict[str, mx.array]
FIRST_SCALE, LARGEST_SCALE = 2.0**15, 2.0**24
LARGEST_FLOAT16 = 65_504
CONTEXT, TARGET = "context_encoder", "target_encoder"  # parts of the model
STEPS_TO_GROW = 200  # steps without overflow before the loss scale is doubled


class Schedule(NamedTuple):
    """The values that change with the step."""

    lr: float
    weight_decay: float
    momentum: float


def schedule(config: Config, step: int, total: int) -> Schedule:
    """Learning rate, weight decay and momentum of `step` (0 … total − 1).

    A run that goes on longer has the longer run's from there on (see longer.py).
    """
    c = config.optim
    # the last step is never warm-up: it gets final_lr
    warmup = min(round(total * c.warmup_epochs / c.epochs), max(0, total - 2))
    lr = schedules.warmup_cosine(step, total, warmup, c.lr, c.final_lr)
    if config.run.history:
        last = config.run.history[-1]
        begun = round(last.epoch * total / c.epochs)
        lr = schedules.joined(step - begun, min(warmup, total - begun), last.lr, lr)
    return Schedule(
        lr,
        schedules.cosine(step, total, *c.weight_decay),
        schedules.linear(step, total, *c.momentum),
    )


class Step:
    """One training step over explicit state: weights, optimizer, random numbers, loss scale.

    `moments` are those of the image level's targets, which are whitened by them.
    `weights` holds what changes in long arrays (flat.py), of which the model's weights are views.
    loss_fn: the prediction loss of a level, instead of the one that `loss.kind` names.
    """

    def __init__(self, model: HJEPA, config: Config, loss_fn: LossFn | None = None) -> None:
        self.model = model
        self.config = config
        self.loss_fn = loss_fn or losses.prediction_loss(config.loss.kind)
        self.dtype: mx.Dtype = getattr(mx, backend.precision(config))
        trained = model.trainable_parameters()
        shared = _shared(trained[CONTEXT], model.target_encoder)
        muon = config.optim.kind == "muon"
        self.layout = Layout({**trained, TARGET: shared}, stacked=muon)
        self.weights: Flat = {}
        self.adopt()
        self.optimizer = (Muon if muon else AdamW)(config.optim.betas)
        self.optimizer.init({k: part for k, part in self.weights.items() if k != TARGET})
        self.scaler = {"scale": mx.array(FIRST_SCALE), "good_steps": mx.array(0)}
        self.moments = whitening.start(int(config.model.dim)) if config.image_predicted else {}
        self.traces = 0
        self._value_and_grad = mx.value_and_grad(self._loss)
        self._whole = self.compile(self._whole_step)
        self._gradients = self.compile(self.compute_gradients)
        self._update = self.compile(self.apply_gradients)

    @property
    def state(self) -> list[Any]:
        """All that a step reads and writes."""
        return [self.weights, self.optimizer.state, mx.random.state, self.scaler, self.moments]

    def adopt(self) -> None:
        """Take the weights that the model has now."""
        self.weights.update(self.layout.join(self.model.parameters()))
        mx.eval(self.weights)
        self.place()

    def place(self, dtype: mx.Dtype = mx.float32) -> None:
        """Let the model compute with the weights in `dtype`."""
        self.model.update(self._parts(dtype))

    def __call__(self, batches: list[tuple[mx.array, Masks]], values: Schedule) -> Metrics:
        """Update once from one or more (images [B, S, S, 3] uint8, masks); mean metrics.

        Returns lazily computed 0-d arrays: loss, loss_level_l, grad_norm and what is switched on.
        """
        arrays = [mx.array(value, mx.float32) for value in values]
        inputs = [(images, *as_arrays(masks)) for images, masks in batches]
        if len(inputs) == 1 and world.size() == 1:
            metrics = self._whole(*inputs[0], *arrays)
        else:
            metrics, gradients = self._gradients(*inputs[0])
            for more in inputs[1:]:
                mx.eval(metrics, gradients)  # so that only one batch's activations are held
                metrics, gradients = tree_map(mx.add, (metrics, gradients), self._gradients(*more))
            mean = tree_map(lambda total: total / len(inputs), (metrics, gradients))
            mean = world.average(mean)
            metrics = {**mean[0], **self._update(mean[1], *arrays)}
        self.place()  # before the evaluation, which then reuses the old weights' memory
        mx.async_eval(metrics, self.state, self.model.parameters())
        return metrics

    def compile(self, function: Callable) -> Callable:
        """A function that reads and writes the state, compiled if the config says so."""
        if not backend.compiles(self.config):
            return function
        return mx.compile(function, inputs=self.state, outputs=self.state)

    def _whole_step(self, *inputs: Any) -> Metrics:
        *batch, lr, weight_decay, momentum = inputs
        metrics, gradients = self.compute_gradients(*batch)
        return {**metrics, **self.apply_gradients(gradients, lr, weight_decay, momentum)}

    def compute_gradients(self, images: mx.array, *masks: Any) -> tuple[Metrics, Flat]:
        """Metrics and gradients of images [B, S, S, 3] and B·V masks (as arrays)."""
        self.traces += 1
        context, targets, centres, pool, *drawn = masks
        patches = self.model.patches(images).astype(self.dtype)
        views = self.model.views(images, drawn).astype(self.dtype) if drawn else None
        whole = self.model.parameters()
        self.model.update(tree_map(lambda w: w.astype(self.dtype), whole))  # what is frozen, too
        parts = self._parts(self.dtype)
        self.model.update(parts)
        truth = self.model.targets(patches, targets, pool)
        if self.moments:
            truth[-1] = whitening.whitened(truth[-1].squeeze(1), self.moments)[:, None]
        parts.pop(TARGET, None)
        seen = patches, context, centres, views
        (_, metrics), gradients = self._value_and_grad(parts, *seen, truth)
        self.model.update(whole)  # also what a forward pass has changed
        joined = self.layout.join(gradients)
        return metrics, tree_map(lambda g: g.astype(mx.float32), joined)

    def _parts(self, dtype: mx.Dtype) -> dict[str, Any]:
        """The weights in `dtype`, a tree for each part of the model."""
        return self.layout.split(tree_map(lambda w: w.astype(dtype), self.weights))

    def _loss(
        self,
        trained: dict[str, Any],
        patches: mx.array,
        context: mx.array,
        centres: mx.array,
        views: mx.array | None,
        truth: list[mx.array],
    ) -> tuple[mx.array, Metrics]:
        c = self.config.loss
        self.model.update(trained)
        predictions: list[mx.array] = []
        means: dict[str, mx.array] = {}
        if masked := self.config.masked:
            cells = [target.shape[1] for target in truth[: len(masked)]]
            predictions, features = self.model.predict(patches, context, centres, cells)
            means[""] = features.astype(mx.float32).mean(1)  # [B·V, D]
        if views is not None:
            (features,) = self.model.context_encoder(views)
            means["_image"] = features.astype(mx.float32).mean(1)
        if self.config.image_predicted:
            seen = mx.concatenate([*means.values()]).astype(self.dtype)
            prediction = self.model.image_predictor(seen)
            predictions = [*predictions, prediction[:, None]]
            each = [len(seen) // len(patches) for seen in means.values()]
            whole = mx.concatenate([mx.repeat(truth[-1], count, axis=0) for count in each])
            truth = [*truth[:-1], whole]
        if "projector" in self.model:
            projected = self.model.projector(means["_image"].astype(self.dtype))
            means["_image"] = projected.astype(mx.float32)
        loss, metrics = mx.array(0.0), {}
        for level, prediction, target in zip(
            self.config.predicted, predictions, truth, strict=True
        ):
            metrics[f"loss_level_{level}"] = self.loss_fn(prediction, target)
            loss = loss + float(c.level_weights[level]) * metrics[f"loss_level_{level}"]
        for of, pooled in means.items():
            if c.vicreg:
                metrics["vicreg" + of] = losses.vicreg(pooled)
                loss = loss + c.vicreg * metrics["vicreg" + of]
            if c.sigreg:
                by_image = pooled.reshape(len(patches), -1, pooled.shape[1])
                metrics["sigreg" + of] = losses.sigreg(by_image.swapaxes(0, 1))
                loss = loss + c.sigreg * metrics["sigreg" + of]
        metrics["loss"] = loss
        if self.dtype == mx.float16:
            # a rank's mean is over fewer images, so its gradients are larger
            loss = loss * (self.scaler["scale"] / world.size())
        return loss, metrics

    def apply_gradients(
        self, gradients: Flat, lr: mx.array, weight_decay: mx.array, momentum: mx.array
    ) -> Metrics:
        """Optimizer, then EMA. In float16 an overflow leaves all but the loss scale untouched."""
        half = self.dtype == mx.float16
        if half:
            scale = self.scaler["scale"] / world.size()
            gradients = tree_map(lambda g: self._overflowing(g) / scale, gradients)
        norm = mx.sqrt(tree_reduce(lambda n, g: n + g.square().sum(-1).sum(), gradients, 0.0))
        if self.config.optim.grad_clip:
            factor = mx.minimum(self.config.optim.grad_clip / (norm + 1e-6), 1.0)
            gradients = tree_map(lambda g: g * factor, gradients)
        before = tree_map(lambda x: x, (self.weights, self.optimizer.state))
        self.optimizer.learning_rate = lr
        self.optimizer.state["weight_decay"] = weight_decay
        self.weights.update(self.optimizer.apply_gradients(gradients, self.weights))
        if TARGET in self.weights:
            old, new = self.weights[TARGET], self._followed()
            self.weights[TARGET] = ema.update(old, new, momentum)
        if not half:
            return {"grad_norm": norm}
        finite = mx.isfinite(norm)
        weights, state = tree_map(
            lambda new, old: mx.where(finite, new, old),
            (self.weights, self.optimizer.state),
            before,
        )
        self.weights.update(weights)
        self.optimizer.state.update(state)
        self._adapt_scale(finite)
        return {"grad_norm": norm, "loss_scale": self.scaler["scale"], "overflow": ~finite}

    @staticmethod
    def _overflowing(gradient: mx.array) -> mx.array:
        """The mean over ranks; infinite where their sum, which one process computes, would be."""
        if world.size() == 1:
            return gradient
        return mx.where(mx.abs(gradient) * world.size() > LARGEST_FLOAT16, mx.inf, gradient)

    def _followed(self) -> dict[str, mx.array]:
        """The context encoder's weights, in the places of the target encoder's."""
        if self.layout.shapes[TARGET] == self.layout.shapes[CONTEXT]:
            return self.weights[CONTEXT]
        parts = self.layout.split({CONTEXT: self.weights[CONTEXT]})
        return self.layout.join({TARGET: parts[CONTEXT]})[TARGET]

    def _adapt_scale(self, finite: mx.array) -> None:
        """Halve the loss scale after an overflow, double it after a long time without one."""
        scale, good = self.scaler["scale"], self.scaler["good_steps"] + 1
        grown = mx.where(good >= STEPS_TO_GROW, mx.minimum(2 * scale, LARGEST_SCALE), scale)
        self.scaler["scale"] = mx.where(finite, grown, mx.maximum(scale / 2, 1.0))
        self.scaler["good_steps"] = mx.where(finite & (good < STEPS_TO_GROW), good, 0)


def random_key() -> mx.array:
    """The state of MLX's random numbers."""
    return mx.random.state[0]  # type: ignore[index]


def reseed(key: Any) -> None:
    """Go back to a state of MLX's random numbers, two integers."""
    high, low = map(int, key)
    mx.random.seed((high << 32) | low)


def _shared(trained: Any, target: nn.Module) -> Any:
    """The trained weights of the context encoder that the target encoder has as well."""
    there = dict(tree_flatten(target.parameters()))
    weights = dict(tree_flatten(trained))
    return tree_unflatten([(name, weights[name]) for name in weights if name in there])


def as_arrays(masks: Masks) -> tuple[Any, ...]:
    """The masks' fields as arrays of MLX, those of the views after them."""
    pool = tuple(map(mx.array, masks.pool))
    views = map(mx.array, masks.views or ())
    return mx.array(masks.context), mx.array(masks.targets), mx.array(masks.centres), pool, *views
