"""One function a format: it writes the files and returns what reads features through them.

A converter that needs torch gets the timm model.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten
from PIL import Image

from hjepa_mlx import pretrained, weights
from hjepa_mlx.errors import required
from hjepa_mlx.files import write_json
from hjepa_mlx.masks import pooling
from hjepa_mlx.models.hjepa import HJEPA

Reader = Callable[[np.ndarray], list[np.ndarray]]  # [B, S, S, 3] uint8 to features of each level
WEIGHTS = "model.safetensors"
TIMM = "vit_small_patch16_224"  # any ViT of timm: its sizes are replaced


def _arrays(model: HJEPA, encoder: str) -> dict[str, mx.array]:
    """The encoder's weights by name, and its positions as a table [N, D], fixed or not."""
    vit = getattr(model, f"{encoder}_encoder")
    return {**dict(tree_flatten(vit.parameters())), "pos_embed": vit.positions(model.config.grid)}


def _arrays_of_timm(model: HJEPA, encoder: str) -> dict[str, mx.array]:
    """The same in timm's shapes: patches are embedded by a convolution [D, 3, p, p]."""
    arrays, p = _arrays(model, encoder), model.config.model.patch_size
    kernel = arrays["patch_embed.proj.weight"].reshape(-1, p, p, 3).transpose(0, 3, 1, 2)
    own = {"patch_embed.proj.weight": mx.contiguous(kernel), "pos_embed": arrays["pos_embed"][None]}
    return {**arrays, **own}


def _safetensors(model: HJEPA, encoder: str, folder: Path) -> Reader:
    mx.save_safetensors(str(folder / WEIGHTS), _arrays(model, encoder))
    again = HJEPA(model.config)
    pretrained.put(weights.read(folder), again, whole=True)
    return lambda images: [np.array(level) for level in again.encode(images)]


def _timm(model: HJEPA, encoder: str, folder: Path) -> Reader:
    return _run(_through_timm(model, encoder, folder))


def _through_timm(model: HJEPA, encoder: str, folder: Path) -> Any:
    """Write timm's files and open them as a torch module."""
    timm, own, size = required("timm", "export"), model.config.model, model.config.data.image_size
    sizes = {
        "img_size": size, "patch_size": own.patch_size, "embed_dim": own.dim, "depth": own.depth,
        "num_heads": own.heads, "class_token": False, "global_pool": "", "num_classes": 0,
    }  # fmt: skip
    pictures = {
        "input_size": [3, size, size], "mean": own.image_mean, "std": own.image_std,
        "crop_pct": 1.0, "interpolation": "bilinear", "num_classes": 0, "classifier": "head",
        "first_conv": "patch_embed.proj",
    }  # fmt: skip
    facts = {"architecture": TIMM, "num_features": own.dim, "model_args": sizes}
    write_json(folder / "config.json", {**facts, "pretrained_cfg": pictures})
    mx.save_safetensors(str(folder / WEIGHTS), _arrays_of_timm(model, encoder), {"format": "pt"})
    network = timm.create_model(TIMM, checkpoint_path=str(folder / WEIGHTS), **sizes)

    def features(x: Any) -> dict[int, Any]:
        after = sorted(set(model.level_blocks))
        found = network.forward_intermediates(
            x, indices=[n - 1 for n in after], output_fmt="NLC", intermediates_only=True
        )
        pairs = zip(after, found, strict=True)
        return {n: network.norm(x) if n == own.depth else x for n, x in pairs}

    return _module(network, features, model)


def _transformers(model: HJEPA, encoder: str, folder: Path) -> Reader:
    auto, own = required("transformers", "export").AutoModel, model.config.model
    size = model.config.data.image_size
    sizes = {
        "architectures": ["IJepaModel"], "model_type": "ijepa", "hidden_size": own.dim,
        "num_hidden_layers": own.depth, "num_attention_heads": own.heads, "image_size": size,
        "intermediate_size": 4 * int(own.dim), "hidden_act": "gelu", "layer_norm_eps": 1e-6,
        "patch_size": own.patch_size, "torch_dtype": "float32",
    }  # fmt: skip
    pictures = {
        "image_processor_type": "ViTImageProcessor", "size": {"height": size, "width": size},
        "image_mean": own.image_mean, "image_std": own.image_std,
    }  # fmt: skip
    write_json(folder / "config.json", sizes)
    write_json(folder / "preprocessor_config.json", pictures)
    arrays = weights.as_transformers(_arrays_of_timm(model, encoder))
    mx.save_safetensors(str(folder / WEIGHTS), arrays, {"format": "pt"})
    network = auto.from_pretrained(folder)

    def features(x: Any) -> dict[int, Any]:
        found = network(pixel_values=x, output_hidden_states=True)
        return {**dict(enumerate(found.hidden_states)), int(own.depth): found.last_hidden_state}

    return _run(_module(network, features, model))


def _module(network: Any, features: Callable[[Any], dict[int, Any]], model: HJEPA) -> Any:
    """A torch module from images [B, 3, S, S] of 0–255 to the tuple that `encode` gives.

    features: of normalised images, after each block that a level needs.
    """
    import torch

    own = model.config.model
    mean, std = (255 * torch.tensor(x).reshape(3, 1, 1) for x in (own.image_mean, own.image_std))
    grid = model.config.grid
    pools = [torch.from_numpy(pooling(grid, grid, n)[0]) for n in model.config.level_pools]

    class Levels(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = network

        def forward(self, images: Any) -> Any:
            found = features((images - mean) / std)
            levels = zip(pools, model.level_blocks, strict=True)
            return tuple(pool @ found[number] for pool, number in levels)

    return Levels().eval()


def _run(module: Any) -> Reader:
    import torch

    def read(images: np.ndarray) -> list[np.ndarray]:
        with torch.no_grad():
            return [level.numpy() for level in module(torch.from_numpy(_planes(images)))]

    return read


def _planes(images: np.ndarray) -> np.ndarray:
    return images.transpose(0, 3, 1, 2).astype(np.float32)


def _converted(model: HJEPA, encoder: str, folder: Path) -> tuple[Any, Any, list[str]]:
    """To convert: a torch module, an image [1, 3, S, S] for it, and the names of its outputs."""
    module = _through_timm(model, encoder, folder)
    for name in (WEIGHTS, "config.json"):
        (folder / name).unlink()
    example = required("torch", "export").zeros(1, 3, *2 * [model.config.data.image_size])
    return module, example, [f"level_{number}" for number in range(len(model.level_blocks))]


def _onnx(model: HJEPA, encoder: str, folder: Path) -> Reader:
    runtime, _ = required("onnxruntime", "onnx"), required("onnxscript", "onnx")
    module, example, names = _converted(model, encoder, folder)
    import torch

    path = str(folder / "model.onnx")
    torch.onnx.export(
        module, (example.repeat(2, 1, 1, 1),), path, input_names=["images"], output_names=names,
        dynamic_shapes={"images": {0: torch.export.Dim("batch")}}, external_data=False,
        verbose=False,
    )  # fmt: skip
    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda images: session.run(None, {"images": _planes(images)})


def _coreml(model: HJEPA, encoder: str, folder: Path) -> Reader | float:
    coreml = required("coremltools", "coreml")
    module, example, names = _converted(model, encoder, folder)
    import torch

    path = str(folder / "model.mlpackage")
    coreml.convert(
        torch.jit.trace(module, example, check_trace=False),
        inputs=[coreml.ImageType("image", example.shape)],
        outputs=[coreml.TensorType(name) for name in names],
        compute_precision=coreml.precision.FLOAT32,
        minimum_deployment_target=coreml.target.macOS13,
    ).save(path)
    if sys.platform != "darwin":
        return _difference_of_weights(coreml, path, module)
    program = coreml.models.MLModel(path)

    def read(images: np.ndarray) -> list[np.ndarray]:
        found = [program.predict({"image": Image.fromarray(image)}) for image in images]
        return [np.concatenate([one[name] for one in found]) for name in names]

    return read


def _difference_of_weights(coreml: Any, path: str, module: Any) -> float:
    """The largest difference between a weight and the nearest of its size in the program."""
    held = required("coremltools.optimize.coreml", "coreml").get_weights_metadata(
        coreml.models.MLModel(path, skip_model_load=True), weight_threshold=1
    )
    constants, largest = [constant.val.ravel() for constant in held.values()], 0.0
    for weight in (weight.numpy().ravel() for weight in module.state_dict().values()):
        near = (np.abs(weight - x).max() for x in constants if x.shape == weight.shape)
        largest = max(largest, float(min(near, default=np.inf)))
    return largest


FORMATS: dict[str, Callable[[HJEPA, str, Path], Reader | float]] = {
    "timm": _timm,
    "transformers": _transformers,
    "safetensors": _safetensors,
    "onnx": _onnx,
    "coreml": _coreml,
}
