"""H-JEPA: hierarchical I-JEPA self-supervised pretraining in MLX.

import hjepa_mlx as hj
config = hj.load_config("demo", ["optim.epochs=2"])
run = hj.train(config)
model = hj.load(run.path)
levels = model.encode(images)  # images: [B, S, S, 3] uint8
report = hj.evaluate(model)
"""

from hjepa_mlx import backend  # isort: skip  (first: it loads OpenBLAS, which MLX must find)
from hjepa_mlx.config import Config, load_config
from hjepa_mlx.errors import HJEPAError
from hjepa_mlx.eval.report import Report, evaluate
from hjepa_mlx.models.hjepa import HJEPA
from hjepa_mlx.runs import Run, load
from hjepa_mlx.train import train

__version__ = "0.1.0"

__all__ = [
    "HJEPA",
    "Config",
    "HJEPAError",
    "Report",
    "Run",
    "backend",
    "evaluate",
    "load",
    "load_config",
    "train",
]
