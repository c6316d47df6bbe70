"""The study's `ijepa` once more, in PyTorch: what an independent implementation learns.

.venv-parity/bin/python benchmarks/recipes/torch_ijepa.py data/recipes --seed 0

Needs `make parity`. Of the package it uses what reads files and what evaluates: networks are the
peer's, on timm's blocks, crops torchvision's, AdamW torch's; masks, schedules and initial weights
are written again, as Meta's code has them.
"""

from __future__ import annotations

import argparse
import copy
import math
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from study import standardised_rank
from torch import nn
from torchvision.transforms import RandomResizedCrop

from hjepa_mlx.data.raw import read_idx
from hjepa_mlx.eval import linear_probe
from hjepa_mlx.eval.accuracy import accuracy
from hjepa_mlx.eval.knn import knn_accuracy

sys.path.insert(0, str(Path(__file__).parent.parent / "peers"))
from ijepa_torch import Encoder, Predictor, blocks, patchify, take

GRID, PATCH, HEADS = 8, 4, 3
MEAN, STD = (0.286, 0.286, 0.286), (0.353, 0.353, 0.353)
BATCH, EPOCHS, WARMUP = 128, 10, 1
LR, LAST_LR, DECAY, MOMENTUM = 1e-3, 1e-6, (0.04, 0.4), 0.996


def read(folder: Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Images [N, 32, 32] uint8, padded with black, and labels [N]."""
    images = read_idx(folder / f"{split}-images-idx3-ubyte.gz", 3)
    labels = read_idx(folder / f"{split}-labels-idx1-ubyte.gz", 1).astype(np.int64)
    return np.pad(images, ((0, 0), (2, 2), (2, 2))), labels


def patches(images: np.ndarray) -> torch.Tensor:
    """Normalised patches [B, N, p·p·3] of grey images [B, S, S]."""
    return patchify(torch.from_numpy(np.stack([images] * 3, -1)), PATCH, MEAN, STD)


def draw_masks(rng: np.random.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Indices of context [B, K] and target blocks [B, 4, A]; one block shape a batch."""
    area, aspect = int(GRID**2 * rng.uniform(0.15, 0.2)), rng.uniform(0.75, 1.5)
    height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
    tokens = np.arange(GRID**2).reshape(GRID, GRID)
    contexts: list[np.ndarray] = []
    targets: list[np.ndarray] = []
    while len(contexts) < BATCH:
        corners = rng.integers(0, (GRID - height, GRID - width), (4, 2))
        drawn = [tokens[y : y + height, x : x + width].ravel() for y, x in corners]
        context = np.setdiff1d(tokens[:-1, :-1], np.concatenate(drawn))
        if len(context) >= 4:
            contexts.append(context)
            targets.append(np.stack(drawn))
    least = min(map(len, contexts))
    context = np.stack([indices[:least] for indices in contexts])
    return torch.from_numpy(context), torch.from_numpy(np.stack(targets))


def initialised() -> tuple[Encoder, Predictor]:
    """Both networks with Meta's initial weights, and Xavier's for the patch embedding."""
    encoder, predictor = Encoder(GRID, PATCH, 192, 6), Predictor(GRID, 192, 96, 3)
    predictor.blocks = blocks(96, 3, HEADS)
    for network in (encoder, predictor):
        for module in network.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        for number, block in enumerate(network.blocks, 1):
            for linear in (block.attn.proj, block.mlp.fc2):
                linear.weight.data /= math.sqrt(2 * number)
    nn.init.xavier_uniform_(encoder.embed.weight)
    return encoder, predictor


def cosine(progress: float, start: float, end: float) -> float:
    """Half a cosine from `start` to `end`."""
    return end + (start - end) * (1 + math.cos(math.pi * progress)) / 2


def train(images: np.ndarray, rng: np.random.Generator) -> dict[str, Encoder]:
    """Target and context encoder after EPOCHS passes over images [N, 32, 32]."""
    context_encoder, predictor = initialised()
    target_encoder = copy.deepcopy(context_encoder).requires_grad_(False)
    learnt = [*context_encoder.parameters(), *predictor.parameters()]
    groups = [
        {"params": [w for w in learnt if w.ndim > 1]},
        {"params": [w for w in learnt if w.ndim == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=LR, fused=True)
    crop = RandomResizedCrop(images.shape[1], scale=(0.3, 1.0))
    per_epoch = len(images) // BATCH
    total, warmup = EPOCHS * per_epoch, WARMUP * per_epoch
    for step in range(total):
        epoch, place = divmod(step, per_epoch)
        if not place:
            order = rng.permutation(len(images))
        rows = order[place * BATCH : (place + 1) * BATCH]
        x = patches(np.stack([np.array(crop(Image.fromarray(images[row]))) for row in rows]))
        context, targets = draw_masks(rng)
        lr = cosine((step - warmup) / (total - warmup), LR, LAST_LR)
        for group in optimizer.param_groups:
            group["lr"] = LR * step / warmup if step < warmup else lr
        optimizer.param_groups[0]["weight_decay"] = cosine(step / total, *DECAY)
        with torch.no_grad():
            truth = target_encoder(x)
            truth = F.layer_norm(truth, truth.shape[-1:])
            truth = take(truth, targets.flatten(1)).reshape(-1, targets.shape[2], truth.shape[2])
        prediction = predictor(context_encoder(x, context), context, targets)
        loss = F.smooth_l1_loss(prediction, truth)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            theirs = list(context_encoder.parameters())
            share = (1 - MOMENTUM) * (1 - step / total)
            torch._foreach_lerp_(list(target_encoder.parameters()), theirs, share)
        if place == per_epoch - 1:
            print(f"epoch {epoch + 1}/{EPOCHS} loss {loss.item():.4f}", flush=True)
    return {"target": target_encoder, "context": context_encoder}


@torch.no_grad()
def features(encoder: Encoder, images: np.ndarray) -> np.ndarray:
    """Means over patches [N, 192] of images [N, 32, 32]."""
    parts = np.array_split(images, -(-len(images) // 250))
    return torch.cat([encoder(patches(part)).mean(1) for part in parts]).numpy()


def main() -> None:
    """Train, then print k-NN, linear probe and rank of both encoders on the test images."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("root", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    torch.manual_seed(asked.seed)
    folder = asked.root / "fashion" / "test"
    (images, labels), (queries, truth) = read(folder, "train"), read(folder, "t10k")
    encoders = train(images, np.random.default_rng(asked.seed))
    for name, encoder in encoders.items():
        x, q = features(encoder, images), features(encoder, queries)
        probe = linear_probe.fit(x, labels)
        print(
            f"{name}: k-NN {knn_accuracy(x, labels, q, truth):.1f} "
            f"linear {accuracy(probe.predict(q), truth):.1f} rank {standardised_rank(q):.1f}"
        )


if __name__ == "__main__":
    main()
