"""Random numbers that depend only on what they are for: counter-based, so runs can be resumed."""

from __future__ import annotations

import zlib

import numpy as np


def generator(seed: int, purpose: str, *counters: int) -> np.random.Generator:
    """A generator that is the same for the same (seed, purpose, counters) on every machine."""
    entropy = [seed, zlib.crc32(purpose.encode()), *counters]
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(entropy)))
