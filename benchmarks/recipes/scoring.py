"""The scores of a network and of the baselines: by classes, and by what each patch shows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from math import isqrt
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

import hjepa_mlx as hj
from hjepa_mlx.data.pipeline import Skipped, evaluation_images
from hjepa_mlx.eval.evaluation import Protocol, class_scores, level_scores
from hjepa_mlx.eval.features import WHITENED, Encoded, Features, extract, model_features, whiten
from hjepa_mlx.eval.linear_probe import moments, standardised
from hjepa_mlx.eval.rank import rankme

ENCODERS = "target", "context"
CLASS_SCORES = ("knn", "linear_probe", "feature_rank")
SCORES = (*CLASS_SCORES, "standardised_rank", "orientation", "figure", "position")
LOCAL_IMAGES = 1_000  # whose patches are looked at for the orientation of edges
EDGES = 1e-3  # mean squared slope of a patch that has any, of grey from 0 to 1
COARSE = 16  # pixels of a side, of the images that the pixel baseline looks at
BINS = 4  # of each colour, in the histogram
Result = dict[str, Any]
Truth = tuple[np.ndarray, np.ndarray, np.ndarray]  # images [B, S, S, 3]; of each patch; which count
ByPatch = Callable[[np.ndarray], list[np.ndarray]]  # images to features [B·grid², D], by level


def encoded(model: hj.HJEPA) -> dict[str, tuple[Features, Features]]:
    """Features of training and test images, by encoder."""
    splits = (
        extract(
            lambda: [model_features(model, encoder) for encoder in ENCODERS],
            hj.open_source(model.config.data, split),
            model.config,
            Skipped(),
        )
        for split in ("train", "test")
    )
    return dict(zip(ENCODERS, zip(*splits, strict=True), strict=True))


def scores(model: hj.HJEPA) -> Result:
    """k-NN, linear probe, ranks and local scores of target and context encoder, by level."""
    found: Result = {}
    for encoder, (train, test) in encoded(model).items():
        joined = [side_by_side(list(part.pooled.values())) for part in (train, test)]
        whiten(train, test, model.config.repeated)
        train.pooled["all_levels"], test.pooled["all_levels"] = joined
        for name in train.pooled:
            every = level_scores(train, test, name, Protocol(draws=0))
            own = {kind: every[kind] for kind in CLASS_SCORES if kind in every}
            if name != WHITENED:
                own["standardised_rank"] = standardised_rank(test.pooled[name])
            found.setdefault(encoder, {})[name] = own
        local = local_scores(model.config, partial(_by_patch, model, encoder))
        for level, values in enumerate(local):
            found[encoder][f"level_{level}"] |= values
    return found


def side_by_side(levels: list[np.ndarray]) -> np.ndarray:
    """Features [N, ΣD] of all levels, each scaled to unit length: a cosine is their mean cosine."""
    units = [x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12) for x in levels]
    return np.concatenate(units, 1)


def standardised_rank(features: np.ndarray) -> float:
    """RankMe of standardised features: no direction counts for more because it is large."""
    return rankme(standardised(features, *moments(features)))


def baselines(config: hj.Config) -> Result:
    """The same scores of pixels and of colour histograms; a patch's pixels for the local ones."""
    train, test = (
        extract(lambda: [plain], hj.open_source(config.data, split), config, Skipped())[0]
        for split in ("train", "test")
    )
    pair = [replace(part, pooled={"pixels": part.pooled["pixels"]}) for part in (train, test)]
    whiten(pair[0], pair[1])
    mean = train.pooled["pixels"].mean(0)
    for part, whitened in zip((train, test), pair, strict=True):
        part.pooled.update(whitened.pooled, centred=part.pooled["pixels"] - mean)
    of = {name: class_scores(train, test, name, Protocol(draws=0)) for name in train.pooled}
    found = {k: {kind: of[k][kind] for kind in ("knn", "linear_probe")} for k in of}
    (local,) = local_scores(config, lambda images: [_patches(images, config.model.patch_size)])
    return {
        "pixels": {
            f"{COARSE}×{COARSE}": found["pixels"] | local,
            **{name: found[name] for name in ("centred", WHITENED)},
        },
        "histogram": {f"{BINS}×{BINS}×{BINS}": found["histogram"]},
    }


def plain(images: np.ndarray) -> Encoded:
    """Images [B, S, S, 3] as COARSE² pixels, and as the roots of a histogram of all colours."""
    B, S = images.shape[:2]
    side = S // COARSE
    coarse = images.reshape(B, COARSE, side, COARSE, side, 3).mean((2, 4))
    bins = images.astype(int) * BINS // 256 @ (BINS**2, BINS, 1)
    counts = [np.bincount(image.ravel(), minlength=BINS**3) for image in bins]
    return Encoded(
        {
            "pixels": coarse.reshape(B, -1).astype(np.float32),
            "histogram": np.sqrt(np.stack(counts) / S**2).astype(np.float32),
        },
        {},
    )


def local_scores(config: hj.Config, by_patch: ByPatch) -> list[Result]:
    """How well each level's cells know what is in each of their patches: R², %.

    A ridge regression from the features of the cell that a patch lies in. orientation: to
    (cos 2θ, sin 2θ) of the patch's structure tensor, as strong as its edges are aligned; patches
    without edges left out. figure, where the data set has some: to the share that a figure covers.
    position: the share of the features' variance that the patch's place in the image explains.
    """
    asked = {"orientation": edges}
    if config.data.dir and _figure_file(config, "train").is_file():
        asked["figure"] = figures
    found: list[Result] = []
    for kind, truth_of in asked.items():
        parts = []
        for split in ("train", "test"):
            images, truth, counted = truth_of(config, split)
            levels = by_patch(images)
            parts.append(([x[counted] for x in levels], truth[counted]))
        (learnt, y), (judged, truth) = parts
        found = found or [{"position": placed(x, config.grid**2)} for x in levels]
        for values, x, queries in zip(found, learnt, judged, strict=True):
            values[kind] = ridge(x, y, queries, truth)
    return found


def ridge(x: np.ndarray, y: np.ndarray, queries: np.ndarray, truth: np.ndarray) -> float:
    """R² in % of a ridge regression from standardised x [n, D] to y [n, K], on other patches."""
    mean, scale = x.mean(0), x.std(0) + 1e-6
    x, queries = (x - mean) / scale, (queries - mean) / scale
    weights = np.linalg.solve(x.T @ x + np.eye(x.shape[1]), x.T @ (y - y.mean(0)))
    error = np.square(queries @ weights + y.mean(0) - truth).sum()
    return 100 * float(1 - error / np.square(truth - truth.mean(0)).sum())


def placed(x: np.ndarray, places: int) -> float:
    """Variance of the mean features of each place over all of their variance, in %."""
    means = x.reshape(-1, places, x.shape[1]).mean(0)
    return 100 * float(means.var(0).sum() / x.var(0).sum())


def edges(config: hj.Config, split: hj.data.source.Split) -> Truth:
    """Some images of a split, and the orientation of the edges in their patches."""
    source = hj.open_source(config.data, split).some(LOCAL_IMAGES, "orientation")
    images = np.stack([image for _, image in evaluation_images(source, config, Skipped())])
    return images, *structure(images, config.model.patch_size)


def figures(config: hj.Config, split: str) -> Truth:
    """A split's figures on photographs, and the share of each patch that the figure covers."""
    size, grid = config.data.image_size, config.grid
    pixels = np.load(_figure_file(config, split))
    images, shares = [], []
    for picture in map(Image.fromarray, pixels):
        small = picture.convert("RGB").resize((size, size), Image.Resampling.BILINEAR)
        images.append(np.asarray(small))
        covered = picture.getchannel("A").resize((grid, grid), Image.Resampling.BOX)
        shares.append(np.asarray(covered).ravel() / 255)
    share = np.concatenate(shares)[:, None]
    return np.stack(images), share, np.ones(len(share), bool)


def _figure_file(config: hj.Config, split: str) -> Path:
    return Path(str(config.data.dir)) / f"{split}-figures.npy"


def structure(images: np.ndarray, patch: int) -> tuple[np.ndarray, np.ndarray]:
    """Of each patch: the direction of its structure tensor [n, 2], and whether it has edges [n]."""
    grey = images.mean(-1) / 255
    dy, dx = np.gradient(grey, axis=(1, 2))
    grid = images.shape[1] // patch

    def summed(x: np.ndarray) -> np.ndarray:
        return x.reshape(-1, grid, patch, grid, patch).sum((2, 4)).ravel()

    energy = summed(dx * dx + dy * dy)
    tensor = np.stack([summed(dx * dx - dy * dy), summed(2 * dx * dy)], 1)
    edged = energy > EDGES * patch**2
    return tensor / np.maximum(energy, 1e-9)[:, None], edged


def _by_patch(model: hj.HJEPA, encoder: str, images: np.ndarray) -> list[np.ndarray]:
    batches = np.array_split(images, -(-len(images) // 64))
    found = zip(*(model.encode(batch, encoder) for batch in batches), strict=True)
    grid, pools = model.config.grid, model.config.level_pools
    return [
        np.concatenate([_of_patches(np.array(x), grid, pool) for x in level])
        for level, pool in zip(found, pools, strict=True)
    ]


def _of_patches(cells: np.ndarray, grid: int, pool: int) -> np.ndarray:
    """Features of cells [B, n, D] of pool × pool patches, given to each of those: [B·grid², D]."""
    B, n, D = cells.shape
    side, places = isqrt(n), np.arange(grid) // pool
    return cells.reshape(B, side, side, D)[:, places][:, :, places].reshape(-1, D)


def _patches(images: np.ndarray, patch: int) -> np.ndarray:
    """The pixels of each patch of images [B, S, S, 3]: [B·grid², patch²·3]."""
    grid = images.shape[1] // patch
    split = images.reshape(-1, grid, patch, grid, patch, 3).swapaxes(2, 3)
    return split.reshape(-1, patch**2 * 3).astype(np.float32)
