"""H-JEPA: hierarchical I-JEPA self-supervised pretraining in MLX.

import hjepa_mlx as hj
config = hj.load_config("demo", ["optim.epochs=2"])
run = hj.train(config)
model = hj.load(run.path)
levels = model.encode(images)  # images: [B, S, S, 3] uint8
report = hj.evaluate(model)

Change one thing: `hj.train(config, loss_fn=my_loss)` or `hj.train(config, sampler=my_masks)`, or
write the loop yourself with `hj.Step`, `hj.MaskSampler` and `hj.training_batches`.
"""

from hjepa_mlx import backend  # isort: skip  (first: it loads OpenBLAS, which MLX must find)
from hjepa_mlx.config import Config
from hjepa_mlx.data.pipeline import training_batches
from hjepa_mlx.data.source import open_source
from hjepa_mlx.errors import HJEPAError
from hjepa_mlx.eval.evaluation import Protocol, evaluate
from hjepa_mlx.eval.report import Report
from hjepa_mlx.masks import MaskSampler
from hjepa_mlx.models.hjepa import HJEPA
from hjepa_mlx.recipes import load_config
from hjepa_mlx.runs import Run, load
from hjepa_mlx.step import Schedule, Step
from hjepa_mlx.train import train

__version__ = "0.1.0"

__all__ = [
    "HJEPA",
    "Config",
    "HJEPAError",
    "MaskSampler",
    "Protocol",
    "Report",
    "Run",
    "Schedule",
    "Step",
    "backend",
    "evaluate",
    "load",
    "load_config",
    "open_source",
    "train",
    "training_batches",
]
