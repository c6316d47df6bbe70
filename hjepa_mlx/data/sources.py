"""Names that other modules still import from here; they live in source.py."""

from hjepa_mlx.data.source import SOURCES as SOURCES
from hjepa_mlx.data.source import Source as Source
from hjepa_mlx.data.source import data_root as data_root
from hjepa_mlx.data.source import layout as layout
from hjepa_mlx.data.source import open_source as open_source
