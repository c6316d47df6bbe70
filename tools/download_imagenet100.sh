#!/bin/sh
# Downloads ImageNet-100 (about 8.5 GB) and makes it fast to train on; takes --data-dir FOLDER.
# Can be run again at any time; it goes on where it stopped.
set -eu
project=$(dirname "$0")/..
"$project/tools/setup.sh" .venv hub
"$project/.venv/bin/hjepa-mlx" datasets download imagenet100 "$@"
"$project/.venv/bin/hjepa-mlx" datasets prepare imagenet100 "$@"
