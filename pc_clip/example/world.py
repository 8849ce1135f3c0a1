"""The example's splits: which scenes there are, what is said of them, and what can be asked about them.

Every scene follows from (split, index) alone. Train, validation and test scenes never share a seed.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from pc_clip.example import scenes
from pc_clip.example.captions import PLACES, caption
from pc_clip.example.scenes import Scene

SEEDS = {"train": 1, "val": 2, "test": 3}
CAPTIONS_EACH = 4

# How good the base is at naming things: classes as they are put into a prompt, and the scenes asked about.
TEMPLATES = {
    "colour": ("a {} object", "a photo of a {} shape", "{} objects"),
    "shape": ("a {}", "a picture of a {}", "an image of a {}"),
    "texture": ("a {} object", "a photo of a {} shape", "{} objects"),
    "size": ("a {} object", "a photo of a {} shape", "{} objects"),
    "count": ("{}", "a picture of {}", "an image of {}"),
    "background": ("an object on a {} background", "a picture of a shape on a {} background"),
    "position": ("an object {}", "a picture of a shape {}"),
}
CLASSES = {
    "colour": tuple(scenes.COLOURS),
    "shape": scenes.SHAPES,
    "texture": scenes.TEXTURES,
    "size": tuple(scenes.SIZES),
    "count": ("one object", "two objects", "three objects"),
    "background": tuple(scenes.BACKGROUNDS),
    "position": tuple(PLACES.values()),
}

# What completes "The first image shows ..." when it has more, or less, of an attribute.
COMPARATIVES = {
    "size": ("larger objects", "smaller objects"),
    "background": ("a lighter background", "a darker background"),
    "count": ("more objects", "fewer objects"),
}


@lru_cache(maxsize=1 << 17)
def scene(split: str, index: int) -> Scene:
    return scenes.sample(np.random.default_rng([SEEDS[split], index]))


def captions(split: str, index: int) -> tuple[str, ...]:
    """The four captions of a scene, the same every time."""
    rng = np.random.default_rng([SEEDS[split], index, 1])
    return tuple(caption(scene(split, index), rng) for _ in range(CAPTIONS_EACH))


def answer(question: str, shown: Scene) -> int | None:
    """The class of a scene under one question, as an index into CLASSES; None where it has none."""
    if question == "background":
        return CLASSES["background"].index(shown.background)
    if question == "count":
        return len(shown.things) - 1
    if question == "position":
        return None if shown.position is None else list(PLACES).index(shown.position)
    if not shown.alike:
        return None
    return CLASSES[question].index(getattr(shown.things[0], question))


def grade(attribute: str, shown: Scene) -> float:
    """A number that orders scenes by size, count or background; NaN where a scene has no one size."""
    if attribute == "size":
        return float(np.mean([thing.radius for thing in shown.things])) if shown.alike else float("nan")
    return {"count": float(len(shown.things)), "background": float(shown.level)}[attribute]
