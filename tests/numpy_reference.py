"""A vision transformer in numpy, and what resizing means for its positions and patches."""

import numpy as np
from PIL import Image
from scipy.special import erf


def positions(side, trained, dim):
    """I-JEPA's table for places of `side` patches stretched over an image of `trained` patches."""
    table = np.zeros((side * side, dim))
    for n in range(side * side):
        place = [(index + 0.5) * trained / side - 0.5 for index in divmod(n, side)]
        for i in range(dim // 4):
            angles = [x / 10000 ** (4 * i / dim) for x in place[::-1]]  # column, then row
            for half, angle in enumerate(angles):
                table[n, half * dim // 2 + i] = np.sin(angle)
                table[n, half * dim // 2 + dim // 4 + i] = np.cos(angle)
    return table


def resized(plane, side):
    """A square plane [n, n] at another size, by PIL's antialiased bilinear filter."""
    return np.array(Image.fromarray(plane.astype(np.float32)).resize((side, side), Image.BILINEAR))


def resampled(weight, old, new):
    """FlexiViT's patch embedding for another patch size: the least squares over all of B."""
    basis = np.eye(old * old).reshape(-1, old, old)
    B = np.stack([resized(plane, new).ravel() for plane in basis], axis=1)  # [new², old²]
    pixels = weight.reshape(-1, old * old, 3)
    found = [np.linalg.lstsq(B.T, pixels[:, :, c].T, rcond=None)[0] for c in range(3)]
    return np.stack(found).transpose(2, 1, 0).reshape(len(weight), -1)  # [D, new²·3]


def norm(x, w, name, epsilon=1e-6):
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + epsilon)
    return x * w[f"{name}.weight"] + w[f"{name}.bias"]


def linear(x, w, name):
    return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]


def features(images, w, table, heads, mean, std):
    """Features of [B, S, S, 3] uint8 after each block, the last one's normed; w: as named here."""
    B, S = images.shape[:2]
    side = round(len(table) ** 0.5)
    p = S // side
    x = (images / 255 - np.array(mean)) / np.array(std)
    x = x.reshape(B, side, p, side, p, 3).transpose(0, 1, 3, 2, 4, 5).reshape(B, side * side, -1)
    x, found = linear(x, w, "patch_embed.proj") + table, []
    while f"blocks.{len(found)}.norm1.weight" in w:
        block = f"blocks.{len(found)}"
        qkv = linear(norm(x, w, f"{block}.norm1"), w, f"{block}.attn.qkv")
        q, k, v = qkv.reshape(B, -1, 3, heads, x.shape[-1] // heads).transpose(2, 0, 3, 1, 4)
        scores = q @ k.swapaxes(-1, -2) / q.shape[-1] ** 0.5
        e = np.exp(scores - scores.max(-1, keepdims=True))
        attended = (e / e.sum(-1, keepdims=True)) @ v
        x = x + linear(attended.swapaxes(1, 2).reshape(x.shape), w, f"{block}.attn.proj")
        hidden = linear(norm(x, w, f"{block}.norm2"), w, f"{block}.mlp.fc1")
        x = x + linear(hidden * (1 + erf(hidden / 2**0.5)) / 2, w, f"{block}.mlp.fc2")
        found.append(x)
    return [*found[:-1], norm(found[-1], w, "norm")]
