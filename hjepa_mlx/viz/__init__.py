"""Pictures of a run: masks, features, neighbours, curves, and a page with all of them."""

from hjepa_mlx.errors import required

required("matplotlib", "viz")
