"""The same computation twice: the same bits on a CPU, nearly the same numbers on a GPU.

A GPU adds in no fixed order, and where a gradient is rounding noise Adam's direction is noise too.
"""

from typing import Any

import numpy as np
import pytest

from hjepa_mlx import backend

NEARLY = 0.01 if backend.on_gpu() else 0.0  # relative; on a GPU a guess


def nearly(value: Any) -> Any:
    """To be compared with: a number, or a dict of them."""
    return pytest.approx(value, rel=NEARLY, abs=0)


def assert_same(one: dict[str, Any], other: dict[str, Any]) -> None:
    """Arrays of the same names: each one's bits on a CPU, the norm of all on a GPU."""
    assert one.keys() == other.keys()
    pairs = {name: (np.array(one[name]), np.array(other[name])) for name in one}
    if NEARLY:
        mine, theirs = (np.concatenate([p[i].ravel() for p in pairs.values()]) for i in (0, 1))
        assert np.linalg.norm(mine - theirs) < NEARLY * np.linalg.norm(theirs)
    else:
        for name, pair in pairs.items():
            np.testing.assert_array_equal(*pair, err_msg=name)
