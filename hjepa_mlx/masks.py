"""Masks: a seed and a step give integer indices of context and target tokens, in fixed counts.

Multi-block masking of I-JEPA (arXiv 2301.08243, section 3): M target blocks per image and one large
context block from which the targets are cut out. Three things differ on purpose. Blocks may lie
anywhere, the last row and column included. The context is a random subset of exactly
`context_tokens` of what is left, not the first ones in raster order. And block shapes come from a
short list, since every new shape is a recompilation of the training step.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from hjepa_mlx.config import Config
from hjepa_mlx.errors import UsageError
from hjepa_mlx.rng import generator
from hjepa_mlx.views import Views, draw

MAX_SHAPES = 4  # target block shapes, each of which may be one more trace of the step
MIN_ACCEPTED = 0.2  # of the images drawn, this many must leave enough context


class Masks(NamedTuple):
    """B masks: of B images, or `masks.per_image` of each image, one after the other.

    K context tokens, M target blocks of h·w patches.

    `centres` holds, for each predicted level in turn, the M·n_l cells to predict, as indices into
    the half-cell position table of side 2·grid − 1 (cell centres fall on patches or between them).
    `pool` averages the patches of a block into its n_l cells: row-stochastic, one matrix per level.
    `views` are of the same B / `masks.per_image` images, for the image level.
    """

    context: np.ndarray  # [B, K] int32, sorted, unique
    targets: np.ndarray  # [B, M, h·w] int32
    centres: np.ndarray  # [B, M·Σ n_l] int32
    pool: tuple[np.ndarray, ...]  # masked levels × [n_l, h·w] float32
    views: Views | None = None

    def rows(self, rows: slice) -> Masks:
        """Some of the masks, all of an image's; with the views of these images."""
        views = None
        if self.views:
            each = len(self.views.boxes) / len(self.context)
            of = slice(round(each * rows.start), round(each * rows.stop))
            views = Views(*(field[of] for field in self.views))
        return Masks(self.context[rows], self.targets[rows], self.centres[rows], self.pool, views)


class BlockShape(NamedTuple):
    """Height and width of a target block, in patches."""

    height: int
    width: int

    @property
    def area(self) -> int:
        """Patches in the block."""
        return self.height * self.width


def pooling(height: int, width: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Average `height` × `width` patches over cells of `size` × `size` (smaller at the far edges).

    Returns the row-stochastic matrix [n, height·width] and the cells' centres [n, 2] as
    (row, column) in half patches, counted from the first patch's centre.
    """
    rows = np.arange(height) // size
    columns = np.arange(width) // size
    cell = rows[:, None] * (columns[-1] + 1) + columns[None, :]  # [height, width]
    matrix = np.equal.outer(np.arange(cell.max() + 1), cell.ravel()).astype(np.float32)
    matrix /= matrix.sum(1, keepdims=True)
    positions = np.indices((height, width)).reshape(2, -1)  # [2, height·width]
    centres = np.rint(2 * matrix @ positions.T).astype(np.int32)
    return matrix, centres


def target_shapes(grid: int, area: list[float], aspect: list[float]) -> list[BlockShape]:
    """Block shapes inside the area and aspect (height/width) ranges, at most MAX_SHAPES of them.

    Where no whole number of patches fits the ranges, the nearest shape in log area and aspect.
    """
    sides = range(1, grid)
    candidates = [BlockShape(h, w) for h in sides for w in sides]

    def outside(shape: BlockShape) -> float:
        """How far the shape is from the ranges; 0 inside."""
        return _outside(shape.area / grid**2, area) + _outside(shape.height / shape.width, aspect)

    nearest = min(map(outside, candidates))
    fitting = [shape for shape in candidates if outside(shape) <= nearest + 1e-9]
    fitting.sort(key=lambda shape: (shape.height / shape.width, shape.area))
    picked = np.linspace(0, len(fitting) - 1, min(MAX_SHAPES, len(fitting))).round().astype(int)
    return [fitting[i] for i in picked]


def context_shapes(grid: int, area: list[float]) -> list[BlockShape]:
    """Square or nearly square context blocks inside the area range, or the nearest to it."""
    sides = range(1, grid + 1)
    candidates = [BlockShape(h, w) for h in sides for w in sides if abs(h - w) <= 1]
    nearest = min(_outside(shape.area / grid**2, area) for shape in candidates)
    return [s for s in candidates if _outside(s.area / grid**2, area) <= nearest + 1e-9]


def _outside(value: float, bounds: list[float]) -> float:
    low, high = bounds
    return max(math.log(low / value), math.log(value / high), 0.0)


class MaskSampler:
    """Draws the masks of a batch from (seed, step, how many).

    Raises UsageError, with the numbers, when the grid is too small for what the config asks.
    """

    def __init__(self, config: Config) -> None:
        masks = config.masks
        self._config = config
        self.grid = config.grid
        self.seed = config.seed
        self.targets = masks.targets
        self.context_tokens = int(masks.context_tokens)
        self._where = (
            f"{self.grid}x{self.grid} grid (image {config.data.image_size}, "
            f"patch {config.model.patch_size})"
        )
        if self.grid < 4:
            size = config.data.image_size
            patch = next(p for p in range(max(1, size // 8), 0, -1) if size % p == 0)
            raise UsageError(
                f"A {self._where} is too small: masks need at least 4x4 patches, and 8x8 to leave "
                f"much to see. Use model.patch_size={patch}."
            )
        self.shapes = target_shapes(self.grid, masks.target_area, masks.target_aspect)
        self._context_shapes = np.array(context_shapes(self.grid, masks.context_area))
        pools = {level: config.level_pools[level] for level in config.masked}
        self._tables = {shape: self._table(shape, pools) for shape in self.shapes}
        for shape in self.shapes:
            self._check_context(shape)

    def __call__(self, step: int, count: int) -> Masks:
        """`count` masks for step `step`: one block shape for all, positions of each its own."""
        rng = generator(self.seed, "masks", step)
        return self.draw(rng, self.shapes[rng.integers(len(self.shapes))], count)

    def draw(self, rng: np.random.Generator, shape: BlockShape, count: int) -> Masks:
        """`count` masks whose target blocks all have the given shape."""
        corners = np.empty((count, self.targets, 2), np.int32)
        free = np.empty((count, self.grid**2), bool)
        pending = np.arange(count)
        while pending.size:  # images left with too little context are drawn again
            corners[pending], free[pending] = self._positions(rng, shape, pending.size)
            pending = pending[free[pending].sum(1) < self.context_tokens]
        context = self._context(rng, free)
        offsets, centre_offsets, pool = self._tables[shape]
        first = corners @ np.array([self.grid, 1], np.int32)  # [B, M] index of the block's corner
        targets = first[:, :, None] + offsets
        half = 2 * corners @ np.array([2 * self.grid - 1, 1], np.int32)
        centres = [(half[:, :, None] + level).reshape(count, -1) for level in centre_offsets]
        views = None
        if self._config.view_grid:
            views = draw(rng, self._config, count // self._config.masks.per_image)
        none = np.empty((count, 0), np.int32)
        return Masks(context, targets, np.concatenate([none, *centres], 1), pool, views)

    def cells(self, shape: BlockShape) -> list[int]:
        """Cells to predict in one target block, a number per masked level."""
        return [len(matrix) for matrix in self._tables[shape][2]]

    def _positions(
        self, rng: np.random.Generator, shape: BlockShape, n: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Target corners [n, M, 2] and what the context may use [n, grid²]."""
        sides = np.array(shape)
        corners = rng.integers(0, self.grid - sides + 1, (n, self.targets, 2))
        context_sides = self._context_shapes[rng.integers(len(self._context_shapes), size=n)]
        context_corner = rng.integers(0, self.grid - context_sides + 1)  # [n, 2]
        free = self._inside(context_corner, context_sides)
        for block in range(self.targets):
            free &= ~self._inside(corners[:, block], sides)
        return corners, free.reshape(n, -1)

    def _context(self, rng: np.random.Generator, free: np.ndarray) -> np.ndarray:
        """`context_tokens` random true columns of each row of `free` [n, N], sorted: [n, K]."""
        score = rng.random(free.shape, dtype=np.float32)
        score[~free] = 2.0
        count = self.context_tokens
        chosen = np.argpartition(score, count - 1, axis=1)[:, :count]
        return np.sort(chosen, axis=1).astype(np.int32)

    def _inside(self, corner: np.ndarray, sides: np.ndarray) -> np.ndarray:
        """Which patches [n, grid, grid] a block with this corner [n, 2] covers."""
        line = np.arange(self.grid)
        covered = (line >= corner[..., None]) & (line < (corner + sides)[..., None])  # [n, 2, grid]
        return covered[:, 0, :, None] & covered[:, 1, None, :]

    def _table(
        self, shape: BlockShape, pools: dict[int, int]
    ) -> tuple[np.ndarray, list[np.ndarray], tuple[np.ndarray, ...]]:
        """Patch offsets, centre offsets per level and pooling matrix per level of a block shape."""
        rows, columns = np.indices((shape.height, shape.width)).reshape(2, -1)
        offsets = (rows * self.grid + columns).astype(np.int32)
        cells = {level: pooling(shape.height, shape.width, size) for level, size in pools.items()}
        for finer, level in pairwise(pools):
            if pools[level] > pools[finer] and len(cells[level][0]) >= len(cells[finer][0]):
                fewer = ",".join(map(str, [*self._config.model.level_pool][:level]))
                raise UsageError(
                    f"Level {level} pools {pools[level]}x{pools[level]} patches, but target blocks "
                    f"are {shape.height}x{shape.width} on a {self._where}: it would be level "
                    f"{finer} again. Use model.level_pool=[{fewer}], a finer grid or larger "
                    "targets."
                )
        stride = np.array([2 * self.grid - 1, 1], np.int32)
        centres = [centre @ stride for _, centre in cells.values()]
        return offsets, centres, tuple(matrix for matrix, _ in cells.values())

    def _check_context(self, shape: BlockShape) -> None:
        """Refuse a context that the target blocks would rarely leave room for."""
        _, free = self._positions(generator(0, "mask check"), shape, 2000)
        available = np.sort(free.sum(1))
        most = int(available[int((1 - MIN_ACCEPTED) * len(available))])
        if self.context_tokens > most:
            advice = f"Lower masks.context_tokens to {most} or less, or " if most else ""
            raise UsageError(
                f"masks.context_tokens={self.context_tokens} does not fit a {self._where}: "
                f"{self.targets} target blocks of {shape.height}x{shape.width} leave "
                f"{int(np.median(available))} context tokens on average. "
                f"{advice or 'Use '}fewer or smaller target blocks."
            )
