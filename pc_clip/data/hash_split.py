"""A random split that is the same on every machine."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

SEED = 0
SHARES = {"train": ("train-90pct", "nine tenths"), "test": ("test-10pct", "a tenth")}


def split_rows(ids: Sequence[str], part: str, seed: int = SEED) -> list[int]:
    """The rows of one part of a 90/10 split, in their order: part is "train", "test" or "all".

    Images are ordered by the SHA-256 of "{seed} {id}", and the first tenth of them (rounded, at least one) is test. So
    nothing depends on the version of a random generator or on the order in which a file system lists files.
    """
    if part == "all":
        return list(range(len(ids)))
    order = sorted(range(len(ids)), key=lambda row: hashlib.sha256(f"{seed} {ids[row]}".encode()).digest())
    n_test = max(1, (len(ids) + 5) // 10)
    return sorted(order[:n_test] if part == "test" else order[n_test:])


def split_label(part: str, seed: int = SEED) -> str:
    """How results name a part of such a split."""
    return f"{SHARES[part][0]}-seed{seed}" if part in SHARES else part


def split_note(part: str, seed: int = SEED) -> str:
    """What is to be known about it, in words; nothing for all the images."""
    if part not in SHARES:
        return ""
    return f"{part} is {SHARES[part][1]} of the images, drawn by us with seed {seed}: not anyone else's split"
