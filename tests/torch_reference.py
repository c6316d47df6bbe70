"""One H-JEPA step in plain torch, written from the papers' equations; imported by parity tests.

Weights come in one flat dict under this package's parameter names, as torch leaves.
"""

import numpy as np
import torch
import torch.nn.functional as F

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class TorchHJEPA:
    """I-JEPA (arXiv 2301.08243) with targets pooled from several blocks of the target encoder."""

    def __init__(self, weights, config, encoder_positions, predictor_positions, view_positions):
        self.w = weights
        self.model, self.level_weights = config.model, config.loss.level_weights
        self.vicreg_weight = config.loss.vicreg
        self.view_positions = torch.from_numpy(view_positions)  # [view_grid², D]
        self.encoder_positions = torch.from_numpy(encoder_positions)  # [grid², D]
        self.predictor_positions = torch.from_numpy(predictor_positions)  # [(2·grid − 1)², P]
        self.grid = config.grid

    def loss(self, images, masks, views=None):
        """Weighted sum of the levels' smooth-L1 losses, and VICReg's terms.

        images: [B, S, S, 3] uint8; views: [B, s, s, 3], for the image level.
        """
        context, targets = (torch.from_numpy(m).long() for m in (masks.context, masks.targets))
        with torch.no_grad():
            truth = self.targets(images, targets, masks.pool)
        features = self.encode("context_encoder", images, context)[-1]
        predictions = self.predict(features, context, torch.from_numpy(masks.centres).long(), truth)
        spread = [features.mean(1)] if self.vicreg_weight else []
        if views is not None:
            with torch.no_grad():
                whole = self.encode("target_encoder", images)[-1].mean(1)
                whole = self.whitened(F.layer_norm(whole, whole.shape[-1:]))
            seen = self.encode("context_encoder", views, positions=self.view_positions)[-1].mean(1)
            both = torch.cat([features.mean(1), seen])
            truth.append(whole.repeat(2, 1))
            predictions.append(self.mlp("image_predictor", both))
            spread.append(self.mlp("projector", seen))
        return sum(
            weight * F.smooth_l1_loss(prediction, target)
            for weight, prediction, target in zip(
                self.level_weights, predictions, truth, strict=True
            )
        ) + sum(self.vicreg_weight * self.vicreg(x) for x in spread)

    def whitened(self, x):
        """The first batch's x, whitened by moments that begin with zeros and the identity."""
        mean = 0.02 * x.mean(0)
        gap = x - mean
        covariance = 0.98 * torch.eye(x.shape[1]) + 0.02 * gap.T @ gap / len(x)
        values, axes = torch.linalg.eigh(covariance)
        white = gap @ axes / torch.sqrt(values + 0.01 * values.mean()) @ axes.T
        return white / torch.sqrt((values / (values + 0.01 * values.mean())).mean())

    def vicreg(self, x):
        """Variance and covariance terms of VICReg (arXiv 2105.04906, equations 1 and 4), 25 : 1."""
        covariance = torch.cov(x.T)
        hinge = torch.relu(1 - torch.sqrt(covariance.diagonal() + 1e-4)).mean()
        off_diagonal = covariance - torch.diag(covariance.diagonal())
        return hinge + off_diagonal.square().sum() / x.shape[1] / 25

    def targets(self, images, indices, pool):
        """LayerNorm of the features of each target block, averaged over the cells of a level."""
        after_block = self.encode("target_encoder", images)
        truth = []
        for block, matrix in zip(self.model.level_blocks[: len(pool)], pool, strict=True):
            x = after_block[block - 1]
            cells = [
                [torch.from_numpy(matrix) @ x[b, block_indices] for block_indices in indices[b]]
                for b in range(len(x))
            ]  # B × M × [n, D]
            x = torch.stack([torch.cat(blocks) for blocks in cells])
            truth.append(F.layer_norm(x, x.shape[-1:]))
        return truth

    def predict(self, context, indices, centres, truth):
        """A pass over what is told of the context and a mask token for every cell of every level.

        Two passes where half of each level's cells is told the tokens and half their mean.
        """
        w, side = self.w, 2 * self.grid - 1
        rows, columns = indices // self.grid, indices % self.grid
        told = []
        if self.model.predictor_context != "mean":
            x = self.linear("predictor.embed", context)
            told.append(x + self.predictor_positions[2 * rows * side + 2 * columns])
        if self.model.predictor_context != "tokens":
            told.append(self.linear("predictor.embed", context).mean(1, keepdim=True))
        queries, start = [], 0
        for level, target in enumerate(truth):
            cells = centres[:, start : start + target.shape[1]]
            start += target.shape[1]
            query = w["predictor.mask_token"] + w["predictor.level_embed"][level]
            queries.append((query + self.predictor_positions[cells]).tensor_split(len(told), 1))
        found = []
        for part, x in enumerate(told):
            tokens = [x, *(query[part] for query in queries)]
            x = torch.cat(tokens, 1)
            for block in range(self.model.predictor_depth):
                x = self.block(f"predictor.blocks.{block}", x, self.model.predictor_dim // 64)
            x = self.norm("predictor.norm", x)
            found.append(x.split([tokens.shape[1] for tokens in tokens], 1)[1:])
        levels = [torch.cat(parts, 1) for parts in zip(*found, strict=True)]
        return [self.linear(f"predictor.heads.{level}", x) for level, x in enumerate(levels)]

    def encode(self, encoder, images, indices=None, positions=None):
        """Features after every block, the last one normalised, of all or the indexed patches."""
        p, dim = self.model.patch_size, self.model.dim
        pixels = (torch.from_numpy(images) / 255 - torch.tensor(MEAN)) / torch.tensor(STD)
        kernel = self.w[f"{encoder}.patch_embed.proj.weight"].reshape(dim, p, p, 3)
        bias = self.w[f"{encoder}.patch_embed.proj.bias"]
        x = F.conv2d(pixels.permute(0, 3, 1, 2), kernel.permute(0, 3, 1, 2), bias, stride=p)
        x = x.flatten(2).transpose(1, 2) + (
            self.encoder_positions if positions is None else positions
        )  # [B, grid², D]
        if indices is not None:
            x = torch.stack([tokens[chosen] for tokens, chosen in zip(x, indices, strict=True)])
        outputs = []
        for block in range(self.model.depth):
            x = self.block(f"{encoder}.blocks.{block}", x, self.model.heads)
            outputs.append(x)
        return [*outputs[:-1], self.norm(f"{encoder}.norm", x)]

    def block(self, name, x, heads):
        """Pre-norm transformer block."""
        x = x + self.attention(f"{name}.attn", self.norm(f"{name}.norm1", x), heads)
        return x + self.mlp(f"{name}.mlp", self.norm(f"{name}.norm2", x))

    def mlp(self, name, x):
        """Two linear layers with GELU between them."""
        return self.linear(f"{name}.fc2", F.gelu(self.linear(f"{name}.fc1", x)))

    def attention(self, name, x, heads):
        """softmax(q·kᵀ/√d)·v, head by head."""
        outputs = []
        qkv = self.linear(f"{name}.qkv", x).chunk(3, -1)
        for q, k, v in zip(*(part.chunk(heads, -1) for part in qkv), strict=True):
            scores = q @ k.transpose(1, 2) / np.sqrt(q.shape[-1])
            outputs.append(scores.softmax(-1) @ v)
        return self.linear(f"{name}.proj", torch.cat(outputs, -1))

    def linear(self, name, x):
        """Affine map."""
        return F.linear(x, self.w[f"{name}.weight"], self.w.get(f"{name}.bias"))

    def norm(self, name, x):
        """LayerNorm with affine."""
        return F.layer_norm(
            x, x.shape[-1:], self.w[f"{name}.weight"], self.w[f"{name}.bias"], eps=1e-6
        )
