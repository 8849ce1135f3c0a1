"""Named streams of random numbers: every random choice takes one, and nothing touches the global generators."""

from __future__ import annotations

import hashlib

import numpy as np


def seed_of(seed: int, name: str, *numbers: int) -> int:
    """A 63-bit seed for libraries that take an integer (torch.Generator.manual_seed).

    It depends on the run's seed, on what is drawn, and on which one it is (an epoch, a row). Different arguments
    give unrelated seeds, which lists of integers do not: numpy pads them, so that [s, 5] and [s, 5, 0] are one stream.
    """
    key = "/".join(map(str, (seed, name, *numbers)))
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") >> 1


def stream(seed: int, name: str, *numbers: int) -> np.random.Generator:
    """A numpy generator for one kind of choice: `stream(seed, "anchor")`, `stream(seed, "batches", epoch)`."""
    return np.random.default_rng(seed_of(seed, name, *numbers))
