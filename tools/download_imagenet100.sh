#!/bin/sh
# Downloads ImageNet-100 (about 8.5 GB) and prepares it for training.
# Takes the options of `hjepa-mlx datasets download`: --data-dir FOLDER, --remove-originals.
# Can be run again at any time; it goes on where it stopped.
set -eu
project=$(dirname "$0")/..
"$project/tools/setup.sh" .venv hub
"$project/.venv/bin/hjepa-mlx" datasets download imagenet100 "$@"
