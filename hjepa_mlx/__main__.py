"""`python -m hjepa_mlx` is `hjepa-mlx`."""

from hjepa_mlx.cli import main

main()
