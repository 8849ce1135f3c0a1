"""Data sets of labelled images that torchvision reads."""

from __future__ import annotations

import hashlib
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pc_clip.datasets.dataset import Dataset, Question, digest
from pc_clip.errors import UserError


def open_torchvision(kind: str, root: Path, split: str) -> Dataset:
    from pc_clip._torchvision import torchvision
    from pc_clip.datasets import READERS

    try:
        data = getattr(torchvision.datasets, kind)(root, train=split == "train", download=False)
    except RuntimeError as error:
        raise UserError(f"{kind.lower()} is not at {root}. {READERS[kind.lower()].fetch}") from error
    names = tuple(name.replace("_", " ") for name in data.classes)
    question = Question("class", names, np.arange(len(data)), np.asarray(data.targets, dtype=np.int64))
    return Dataset(
        name=kind.lower(),
        split=split,
        ids=[str(i) for i in range(len(data))],
        load=partial(_read_torchvision, data),
        fingerprint=digest(kind, split, len(data), hashlib.sha256(data.data[:64].tobytes()).hexdigest()),
        questions=(question,),
    )


def _read_torchvision(data: Any, row: int) -> Image.Image:
    return data[row][0].convert("RGB")
