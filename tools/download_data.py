"""Downloads a data set: `hjepa-mlx datasets download` as a script.

python tools/download_data.py --dataset stl10
"""

import argparse

from hjepa_mlx.cli import app

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Download a data set, or go on where it stopped.")
    parser.add_argument("--dataset", required=True, help="a name from `hjepa-mlx datasets list`")
    parser.add_argument("--data-dir", help="default: $HJEPA_DATA, else ./data")
    arguments = parser.parse_args()
    place = ["--data-dir", arguments.data_dir] if arguments.data_dir else []
    app(["datasets", "download", arguments.dataset, *place])
