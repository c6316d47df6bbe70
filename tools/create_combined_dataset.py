"""Writes a recipe that trains on several data sets: `hjepa-mlx datasets combine` as a script.

python tools/create_combined_dataset.py --datasets imagenet100 stl10 --output-config combined.yaml
"""

import argparse

from hjepa_mlx.cli import app

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Write a recipe for several data sets.")
    parser.add_argument("--datasets", nargs="+", required=True, help="two or more names")
    parser.add_argument("--weights", nargs="+", type=float, help="default: proportional to size")
    parser.add_argument("--output-config", required=True, help="the .yaml file to write")
    arguments = parser.parse_args()
    weights = [part for weight in arguments.weights or () for part in ("--weight", str(weight))]
    app(["datasets", "combine", *arguments.datasets, *weights, "--out", arguments.output_config])
