"""Rows in blocks: what is too large to be copied at once is looked at a part at a time."""

from __future__ import annotations

from collections.abc import Iterator


def blocks(count: int, size: int) -> Iterator[slice]:
    """Slices of up to `size` rows that cover `count` rows in order."""
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))
