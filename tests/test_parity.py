"""Equal weights give equal numbers in timm, transformers and torch (extra: parity)."""

import os

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_unflatten

from hjepa_mlx.checkpoint import _optimizer_arrays
from hjepa_mlx.masks import MaskSampler
from hjepa_mlx.models.hjepa import HJEPA
from hjepa_mlx.models.vit import VisionTransformer, patchify, sincos_positions
from hjepa_mlx.optimizer import Muon
from hjepa_mlx.recipes import load_config
from hjepa_mlx.sections import Model
from hjepa_mlx.step import Schedule, Step
from hjepa_mlx.views import render

MODEL = Model()
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # OpenBLAS and torch share the cores
foreign_warnings = pytest.mark.filterwarnings("ignore")  # torch, timm and transformers have theirs


def reference_positions(rows_columns, dim):
    """I-JEPA's get_2d_sincos_pos_embed: columns in the first half, sines before cosines."""
    table = np.zeros((len(rows_columns), dim))
    for n, (row, column) in enumerate(rows_columns):
        for half, position in enumerate((column, row)):
            for i in range(dim // 4):
                angle = position * (1 / 10000 ** (i / (dim / 4)))
                table[n, half * dim // 2 + i] = np.sin(angle)
                table[n, half * dim // 2 + dim // 4 + i] = np.cos(angle)
    return table.astype(np.float32)


def grid_positions(side, spacing=1.0):
    return [(row * spacing, column * spacing) for row in range(side) for column in range(side)]


@pytest.mark.parametrize(("side", "spacing", "dim"), [(14, 1, 384), (28, 1, 64), (15, 0.5, 192)])
def test_positions_equal_ijepa_s_formula_exactly(side, spacing, dim):
    positions = grid_positions(side, spacing)
    ours = sincos_positions(np.array(positions), dim)
    np.testing.assert_array_equal(ours, reference_positions(positions, dim))


def pictures(count, size):
    return np.random.default_rng(0).integers(0, 256, (count, size, size, 3), np.uint8)


def normalised(images):
    """What torch models take: [B, 3, S, S], less ImageNet's mean, over its deviation."""
    x = (images / 255 - np.array(MODEL.image_mean)) / np.array(MODEL.image_std)
    return x.transpose(0, 3, 1, 2).astype(np.float32)


def randomise(torch, model):
    """Weights large enough for every bias and norm to be seen."""
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, 1.0 if is_norm_scale(name) else 0.0, 0.05)
    return model.eval()


def is_norm_scale(name):
    return "norm" in name and name.endswith("weight")


def kernel_as_rows(kernel):
    """A convolution's [D, 3, p, p] as our [D, p·p·3]."""
    return kernel.transpose(0, 2, 3, 1).reshape(len(kernel), -1)


def features_of_ours(weights, images):
    vit = VisionTransformer(load_config("imagenet100"))  # ViT-S/16 at 224
    vit.load_weights([(name, mx.array(weight)) for name, weight in weights.items()])
    patches = patchify(mx.array(images), 16, MODEL.image_mean, MODEL.image_std)
    return np.array(vit(patches)[0])


@pytest.mark.parity
@foreign_warnings
def test_our_vit_equals_timm_s_vit_small(record_property):
    torch, timm = pytest.importorskip("torch"), pytest.importorskip("timm")
    model = timm.create_model(
        "vit_small_patch16_224", class_token=False, global_pool="", num_classes=0
    )
    model = randomise(torch, model)
    model.pos_embed.data = torch.from_numpy(reference_positions(grid_positions(14), 384))[None]
    weights = {name: p.detach().numpy() for name, p in model.named_parameters()}
    del weights["pos_embed"]
    weights["patch_embed.proj.weight"] = kernel_as_rows(weights["patch_embed.proj.weight"])
    images = pictures(2, 224)
    with torch.no_grad():
        expected = model.forward_features(torch.from_numpy(normalised(images))).numpy()
    difference = np.abs(features_of_ours(weights, images) - expected).max()
    record_property("max_difference", float(difference))
    assert difference < 1e-4


@pytest.mark.parity
@foreign_warnings
def test_our_vit_equals_transformers_ijepa(record_property):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    config = transformers.IJepaConfig(
        hidden_size=384, num_attention_heads=6, intermediate_size=1536, layer_norm_eps=1e-6
    )
    model = randomise(torch, transformers.IJepaModel(config))
    positions = torch.from_numpy(reference_positions(grid_positions(14), 384))[None]
    model.embeddings.position_embeddings.data = positions
    weights = named_as_ours({name: p.detach().numpy() for name, p in model.named_parameters()})
    images = pictures(2, 224)
    with torch.no_grad():
        expected = model(torch.from_numpy(normalised(images))).last_hidden_state.numpy()
    difference = np.abs(features_of_ours(weights, images) - expected).max()
    record_property("max_difference", float(difference))
    assert difference < 1e-4


def named_as_ours(theirs):
    """Transformers' I-JEPA weights under our names; q, k and v are one matrix here."""
    embedding, norm = "embeddings.patch_embeddings.projection", "layernorm"
    ours = {
        "patch_embed.proj.weight": kernel_as_rows(theirs[f"{embedding}.weight"]),
        "patch_embed.proj.bias": theirs[f"{embedding}.bias"],
    }
    for kind in ("weight", "bias"):
        ours[f"norm.{kind}"] = theirs[f"{norm}.{kind}"]
        for n in range(12):
            qkv = [theirs[f"layers.{n}.attention.{x}_proj.{kind}"] for x in "qkv"]
            ours[f"blocks.{n}.attn.qkv.{kind}"] = np.concatenate(qkv)
            for our_name, their_name in {
                "attn.proj": "attention.o_proj",
                "norm1": "layernorm_before",
                "norm2": "layernorm_after",
                "mlp.fc1": "mlp.fc1",
                "mlp.fc2": "mlp.fc2",
            }.items():
                ours[f"blocks.{n}.{our_name}.{kind}"] = theirs[f"layers.{n}.{their_name}.{kind}"]
    return ours


VIEWS = {"count": 1, "size": 12, "colour": 0.5}
VALUES = Schedule(lr=1e-3, weight_decay=0.4, momentum=0.9)


@pytest.fixture(params=["tokens", "mean", "both", "image level"])
def one_step(tiny_config, request):
    """One step of ours and torch's reference before it, from the same weights and masks."""
    pytest.importorskip("torch")
    import torch
    from torch_reference import TorchHJEPA

    model: dict = {"predictor_dim": 128, "predictor_context": request.param}
    changes: dict = {"model": model, "optim": {"grad_clip": 0.0, "kind": "adamw"}}
    if request.param == "image level":
        pools = {"levels": 3, "level_blocks": [1, 2, 3], "level_pool": [1, 2, "image"]}
        model |= {"predictor_context": "both", **pools}
        changes |= {"loss": {"vicreg": 0.2, "projection": 16}, "views": VIEWS}
    config = tiny_config(**changes)
    model = HJEPA(config)
    rng = np.random.default_rng(0)
    start = {
        name: rng.normal(1.0 if is_norm_scale(name) else 0.0, 0.1, weight.shape).astype(np.float32)
        for name, weight in tree_flatten(model.parameters())
    }
    model.update(tree_unflatten([(name, mx.array(w)) for name, w in start.items()]))
    images, masks = pictures(4, 32), MaskSampler(config)(0, 4)
    reference = TorchHJEPA(
        {name: torch.tensor(weight, requires_grad=True) for name, weight in start.items()},
        config,
        reference_positions(grid_positions(8), 64),
        reference_positions(grid_positions(15, 0.5), 128),
        reference_positions((np.array(grid_positions(3)) + 0.5) * 8 / 3 - 0.5, 64),
    )
    views = None
    if masks.views:
        drawn = tuple(map(mx.array, masks.views))
        views = np.array(render(mx.array(images), drawn, 12))  # compared with PIL in test_views.py
    loss = reference.loss(images, masks, views)
    loss.backward()
    step = Step(model, config)
    metrics = step([(mx.array(images), masks)], VALUES)
    return step, metrics["loss"].item(), reference.w, loss.item()


@pytest.mark.parity
@foreign_warnings
def test_loss_and_gradients_of_one_step_equal_torch_s(one_step, record_property):
    step, loss, reference, expected_loss = one_step
    record_property("loss_difference", abs(loss - expected_loss) / expected_loss)
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    # After one step from zero, AdamW's first moment is (1 − β₁) times the gradient.
    gradients = {
        name.removesuffix(".m"): np.array(m) / (1 - 0.9)
        for name, m in _optimizer_arrays(step).items()
        if name.endswith(".m")
    }
    assert gradients.keys() == {k for k, w in reference.items() if w.grad is not None}
    worst = 0.0
    for name, gradient in gradients.items():
        expected = reference[name].grad.numpy()
        difference = np.linalg.norm(gradient - expected) / np.linalg.norm(expected)
        assert difference < 1e-3, name
        worst = max(worst, float(difference))
    record_property("worst_gradient_difference", worst)


@pytest.mark.parity
@foreign_warnings
def test_weights_after_one_step_equal_torch_s_adamw_and_ema(one_step, record_property):
    import torch

    step, _, reference, _ = one_step
    start = {name: weight.detach().numpy().copy() for name, weight in reference.items()}
    trained = {name: w for name, w in reference.items() if w.grad is not None}
    optimizer = torch.optim.AdamW(
        [
            {"params": [w for w in trained.values() if w.ndim > 1], "weight_decay": 0.4},
            {"params": [w for w in trained.values() if w.ndim == 1], "weight_decay": 0.0},
        ],
        lr=VALUES.lr,
        betas=(0.9, 0.95),
    )
    optimizer.step()
    with torch.no_grad():
        for name in reference.keys() - trained.keys():
            context = reference[name.replace("target_encoder", "context_encoder")]
            reference[name].lerp_(context, 1 - VALUES.momentum)
    worst = 0.0
    for name, weight in tree_flatten(step.model.parameters()):
        ours, expected = np.array(weight), reference[name].detach().numpy()
        if name.endswith("qkv.bias"):
            # A key's bias shifts all of a query's scores alike: its gradient is rounding noise,
            # of which Adam makes a step of full length.
            ours, expected, start[name] = map(queries_and_values, (ours, expected, start[name]))
        difference = np.linalg.norm(ours - expected) / np.linalg.norm(expected - start[name])
        assert difference < 1e-3, name
        worst = max(worst, float(difference))
    record_property("worst_update_difference", worst)


def queries_and_values(bias):
    return np.delete(bias.reshape(3, -1), 1, axis=0)


@pytest.mark.parity
@pytest.mark.parametrize("shape", [(64, 64), (256, 64), (64, 256)])
def test_muon_s_updates_are_torch_s(shape):
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    weight = rng.normal(size=shape).astype(np.float32)
    theirs = torch.nn.Parameter(torch.tensor(weight))
    options = {"lr": 0.01, "weight_decay": 0.4, "adjust_lr_fn": "match_rms_adamw"}
    reference = torch.optim.Muon([theirs], **options)
    ours = mx.array(weight.T)[None]
    optimizer = Muon([0.9, 0.95])
    optimizer.init({"stack": ours})
    optimizer.learning_rate = mx.array(0.01)
    optimizer.state["weight_decay"] = mx.array(0.4)
    for _ in range(5):
        gradient = rng.normal(size=shape).astype(np.float32)
        theirs.grad = torch.tensor(gradient)
        reference.step()
        ours = optimizer.apply_gradients({"stack": mx.array(gradient.T)[None]}, {"stack": ours})[
            "stack"
        ]
    ours, theirs = np.array(ours[0]).T, theirs.detach().numpy()
    # theirs iterates in bfloat16
    assert np.linalg.norm(ours - theirs) < 0.02 * np.linalg.norm(theirs - weight)
