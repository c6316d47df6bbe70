"""Pictures of a run: masks, features, neighbours, curves, and a page with all of them."""

from hjepa_mlx.errors import HJEPAError

try:
    import matplotlib  # noqa: F401
except ImportError:
    raise HJEPAError("viz needs matplotlib: pip install 'hjepa-mlx[viz]'") from None
