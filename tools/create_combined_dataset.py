"""Writes a recipe that trains on several data sets: `hjepa-mlx datasets combine` as a script.

python tools/create_combined_dataset.py --datasets imagenet100 stl10 --output-config combined.yaml
"""

import argparse

from hjepa_mlx.cli import app

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Write a recipe for several data sets.")
    parser.add_argument("--datasets", nargs="+", required=True, help="two or more names")
    parser.add_argument("--output-config", required=True, help="the .yaml file to write")
    arguments = parser.parse_args()
    app(["datasets", "combine", *arguments.datasets, "--out", arguments.output_config])
