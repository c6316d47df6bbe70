"""Views: small crops of training images, changed in colour, which the image level looks at.

A view is drawn as a few numbers; cutting, shrinking and colouring happen in the compiled step.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from hjepa_mlx.config import Config
from hjepa_mlx.data.frame import CROP_ASPECT

JITTER = (0.8, 0.8, 0.8, 0.2)  # SimCLR's: brightness, contrast, saturation; turns of the hue
LUMA = np.array([0.299, 0.587, 0.114])  # of red, green and blue (ITU-R BT.601)
YIQ = np.array([LUMA, [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]])  # from RGB, as in NTSC
BLUR = (0.3, 1.0)  # deviation of the Gaussian in pixels of the view
SHARP = 1e-3  # likewise, where nothing is blurred


class Views(NamedTuple):
    """V views: `views.count` of each image, one after the other."""

    boxes: np.ndarray  # [V, 4] float32: top, left, height, width, as fractions of the image
    mirrored: np.ndarray  # [V] bool
    blur: np.ndarray  # [V] float32: deviation in pixels of the view
    colour: np.ndarray  # [V, 3, 3] float32: new colours from old, RGB
    grey: np.ndarray  # [V] float32: what is added of the view's mean grey


def draw(rng: np.random.Generator, config: Config, images: int) -> Views:
    """`views.count` views of each image."""
    views, count = config.views, images * config.views.count
    area = rng.uniform(views.area[0], views.area[1], count)
    low, high = np.log(CROP_ASPECT)
    root = np.exp(rng.uniform(low, high, count) / 2)
    sides = np.minimum(np.stack([np.sqrt(area) / root, np.sqrt(area) * root], 1), 1.0)
    corners = rng.random((count, 2)) * (1 - sides)
    mirrored = (rng.random(count) < 0.5) & config.data.flip
    blurred = rng.random(count) < views.blur
    blur = np.where(blurred, rng.uniform(*BLUR, count), SHARP)
    colour, grey = _colours(rng, count, views.colour, views.grey)
    boxes = np.concatenate([corners, sides], 1)
    return Views(*(x.astype(np.float32) for x in (boxes, mirrored, blur, colour, grey)))


def _colours(
    rng: np.random.Generator, count: int, strength: float, share: float
) -> tuple[np.ndarray, np.ndarray]:
    """Brightness, contrast, saturation, hue and loss of colour as one affine map for each view."""
    numbers = strength * rng.uniform(-1, 1, (4, count)) * np.array(JITTER)[:, None]
    brightness, contrast, saturation = 1 + numbers[:3]
    saturation = np.where(rng.random(count) < share, 0.0, saturation)
    angle = 2 * np.pi * numbers[3]
    turn = np.zeros((count, 3, 3))  # of the hue: a rotation about the axis of greys
    turn[:, 0, 0] = 1
    turn[:, 1, 1] = turn[:, 2, 2] = saturation * np.cos(angle)
    turn[:, 1, 2] = -saturation * np.sin(angle)
    turn[:, 2, 1] = saturation * np.sin(angle)
    matrix = (brightness * contrast)[:, None, None] * (np.linalg.inv(YIQ) @ turn @ YIQ)
    return matrix, brightness * (1 - contrast)


def render(images: mx.array, views: Sequence[mx.array], size: int) -> mx.array:
    """Views [V, size, size, 3] float32, 0 to 255, of images [B, S, S, 3].

    Shrunk with a triangle filter as wide as needed, as PIL's BILINEAR.
    """
    boxes, mirrored, blur, colour, grey = views
    B, S = images.shape[:2]
    V = len(boxes)
    rows = _weights(boxes[:, 0], boxes[:, 2], blur, size, S)  # [V, size, S]
    columns = _weights(boxes[:, 1], boxes[:, 3], blur, size, S)
    columns = mx.where(mirrored[:, None, None] > 0, columns[:, ::-1], columns)
    x = images.astype(mx.float32).reshape(B, 1, S, S * 3)
    x = rows.reshape(B, V // B, size, S) @ x  # [B, V/B, size, S·3]
    x = x.reshape(V, size, S, 3).swapaxes(1, 2).reshape(V, S, size * 3)
    x = (columns @ x).reshape(V, size, size, 3).swapaxes(1, 2)
    mean = (x.mean((1, 2)) @ mx.array(LUMA.astype(np.float32)))[:, None]  # [V, 1]
    x = x.reshape(V, size * size, 3) @ colour.swapaxes(1, 2) + (grey[:, None] * mean)[:, None]
    return mx.clip(x, 0, 255).reshape(V, size, size, 3)


def _weights(start: mx.array, length: mx.array, blur: mx.array, size: int, of: int) -> mx.array:
    """How much of each of `of` pixels is in each of `size`: [V, size, of], rows summing to 1.

    start, length: [V] of the part that is cut out, as fractions of the image.
    """
    scale = of * length / size  # pixels of the image for one of the view
    centres = of * start[:, None] + (mx.arange(size) + 0.5) * scale[:, None]  # [V, size]
    gaps = mx.abs(mx.arange(of) + 0.5 - centres[..., None])
    triangle = mx.maximum(1 - gaps / mx.maximum(scale, 1)[:, None, None], 0)
    triangle = triangle / triangle.sum(-1, keepdims=True)
    between = mx.arange(size) - mx.arange(size)[:, None]
    gauss = mx.exp(-0.5 * mx.square(between / blur[:, None, None]))
    return (gauss / gauss.sum(-1, keepdims=True)) @ triangle


def rendering_flop(size: int, of: int) -> int:
    """FLOP of the matmuls that render a view of `size` pixels from an image of `of`."""
    return 2 * size * (3 * of * (of + size) + 2 * size * of + 9 * size)
