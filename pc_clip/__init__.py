"""Finetune CLIP so that the difference between two images means something in its embedding space.

import pc_clip
model = pc_clip.load("runs/mine")
model.rank("photos", "The first image shows a larger animal, the second a smaller one.")
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"
__all__ = ["Model", "evaluate", "finetune", "load", "open_dataset", "write_differences"]


def __getattr__(name: str) -> Any:
    """The API, imported when it is first asked for: the scripts read their settings before torch is imported."""
    if name not in __all__:
        raise AttributeError(f"module 'pc_clip' has no attribute {name!r}")
    return getattr(importlib.import_module("pc_clip.interface.api"), name)
