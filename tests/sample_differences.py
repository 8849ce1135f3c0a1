"""Sixty differences about the first scenes of the embedded example, for runs that only have to run."""

from pathlib import Path

import numpy as np

from pc_clip.data.differences import Difference, to_line
from pc_clip.data.registry import open_dataset


def write(path: Path, split: str = "train") -> None:
    """Sentences that all have a mirror, about pairs drawn by seed."""
    ids = open_dataset("example", split=split).ids
    rng = np.random.default_rng(0)
    lines = []
    for n in range(60):
        i, j = rng.choice(len(ids), 2, replace=False)
        text = f"The first image shows {['a star', 'two rings', 'hearts'][n % 3]}, while the second shows thing {n}."
        lines.append(to_line(Difference(ids[i], ids[j], text)))
    path.write_text("".join(lines))
