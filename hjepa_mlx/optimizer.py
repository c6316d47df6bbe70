"""The optimizers: AdamW, and Muon for the matrices of transformer blocks."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx.utils import tree_flatten

from hjepa_mlx.config import Config

# Of the quintic Newton-Schulz iteration, and how often: as in Muon's reference code
QUINTIC = 3.4445, -4.7750, 2.0315
ITERATIONS = 5
MUON_MOMENTUM = 0.95
MUON_RMS = 0.2  # of an update's numbers at rate 1: about AdamW's, so that both can share a rate


class AdamW(optim.AdamW):
    """AdamW whose weight decay is state, so it can follow a schedule; biases and norms have none.

    Biases, norms and the mask token have one axis, all that is decayed has more.
    """

    def __init__(self, betas: list[float]) -> None:
        super().__init__(learning_rate=0.0, betas=betas, bias_correction=True)
        self.state["weight_decay"] = mx.array(0.0)

    def apply_single(self, gradient: mx.array, parameter: mx.array, state: dict) -> mx.array:
        """One parameter's update."""
        self.weight_decay = self.state["weight_decay"] if parameter.ndim > 1 else 0.0
        return super().apply_single(gradient, parameter, state)


class Muon(AdamW):
    """Muon for stacks of matrices [n, in, out], AdamW for everything else.

    An update is the momentum of the gradients with all its singular values made about equal, so
    that weak directions are learned as fast as strong ones (kellerjordan.github.io/posts/muon). Its
    size and the decay of the weights are those of arXiv 2502.16982, equation 4: ready for AdamW's
    learning rates. Queries, keys and values are matrices of their own.
    """

    def init_single(self, parameter: mx.array, state: dict) -> None:
        """What is kept of one parameter."""
        if parameter.ndim == 3:
            state["m"] = mx.zeros_like(parameter)
        else:
            super().init_single(parameter, state)

    def apply_single(self, gradient: mx.array, parameter: mx.array, state: dict) -> mx.array:
        """One parameter's update."""
        if parameter.ndim < 3:
            return super().apply_single(gradient, parameter, state)
        state["m"] = MUON_MOMENTUM * state["m"] + (1 - MUON_MOMENTUM) * gradient
        ahead = MUON_MOMENTUM * state["m"] + (1 - MUON_MOMENTUM) * gradient  # Nesterov's
        n, rows, columns = parameter.shape
        count = side_by_side(rows, columns)
        x = ahead.reshape(n, rows, count, columns // count).swapaxes(1, 2)
        x = MUON_RMS * max(x.shape[2:]) ** 0.5 * orthogonalised(x)
        update = x.swapaxes(1, 2).reshape(parameter.shape)
        rate, decay = self.learning_rate, self.state["weight_decay"]
        return parameter * (1 - rate * decay) - rate * update


def of_block(name: str, weight: mx.array) -> bool:
    """Whether a weight, by its name in a part of the model, is a matrix of a transformer block."""
    return name.startswith("blocks.") and weight.ndim == 2


def by_muon(config: Config, model: nn.Module) -> list[mx.array]:
    """The weights that Muon trains."""
    if config.optim.kind != "muon":
        return []
    parts = model.trainable_parameters().values()
    named = [item for part in parts for item in dict(tree_flatten(part)).items()]
    return [weight for name, weight in named if of_block(name, weight)]


def side_by_side(rows: int, columns: int) -> int:
    """How many matrices one of [in, out] numbers is: three for queries, keys and values."""
    return 3 if columns == 3 * rows else 1


def orthogonalised(x: mx.array) -> mx.array:
    """Matrices [..., m, n] with singular values of about 1 (0.7 to 1.2) and the same directions."""
    a, b, c = QUINTIC
    wide = x.shape[-2] <= x.shape[-1]
    x = x if wide else x.swapaxes(-1, -2)
    x = x / (mx.sqrt(x.square().sum(-1, keepdims=True).sum(-2, keepdims=True)) + 1e-7)
    for _ in range(ITERATIONS):
        gram = x @ x.swapaxes(-1, -2)
        x = mx.addmm(a * x, mx.addmm(b * gram, gram, gram, alpha=c), x)
    return x if wide else x.swapaxes(-1, -2)


def muon_flop(shape: tuple[int, ...]) -> float:
    """FLOP of the update of a block's matrix [out, in], but for what is done number by number."""
    out, into = shape
    count = side_by_side(into, out)
    short, long = sorted((into, out // count))
    return count * ITERATIONS * (4 * short**2 * long + 2 * short**3)
