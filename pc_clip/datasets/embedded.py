"""The embedded example: scenes rendered by seed, with captions, questions and graded attributes."""

from __future__ import annotations

import hashlib
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from pc_clip.datasets.dataset import Attribute, Dataset, Question, digest
from pc_clip.example import scenes, world

EXAMPLE_SIZES = {"train": 6000, "val": 1000, "test": 2000}


def open_example(_: Path, split: str) -> Dataset:
    n = EXAMPLE_SIZES[split]
    return example(split, n)


def example(split: str, n: int) -> Dataset:
    """The first `n` scenes of a split of the embedded example."""
    shown = [world.scene(split, i) for i in range(n)]
    pixels = b"".join(scenes.draw(scene).tobytes() for scene in shown[:8])
    return Dataset(
        name="example",
        split=split,
        ids=[f"{split}-{i:05d}" for i in range(n)],
        load=partial(_draw_scene, shown),
        fingerprint=digest(split, n, hashlib.sha256(pixels).hexdigest()),
        captions=[world.captions(split, i) for i in range(n)],
        questions=tuple(_example_question(name, shown) for name in world.CLASSES),
        attributes=tuple(_example_attribute(name, shown) for name in ("size", "background", "count")),
        part=split,
    )


def _example_question(name: str, shown: list[scenes.Scene]) -> Question:
    answers = [world.answer(name, scene) for scene in shown]
    rows = np.array([row for row, a in enumerate(answers) if a is not None], dtype=np.int64)
    target = np.array([a for a in answers if a is not None], dtype=np.int64)
    return Question(name, world.CLASSES[name], rows, target, world.TEMPLATES[name])


def _example_attribute(name: str, shown: list[scenes.Scene]) -> Attribute:
    value = np.array([world.grade(name, scene) for scene in shown])
    more, less = world.COMPARATIVES[name]
    high, low = {
        "size": ("a large object", "a small object"),
        "background": ("an object on a light background", "an object on a dark background"),
        "count": ("three objects", "one object"),
    }[name]
    # A clear difference is wider than the spread within one class: 2.4 pixels at most, 50 grey levels.
    gap = {"size": 2.4, "background": 50.0, "count": 0.5}[name]
    return Attribute(name, value, more, less, high, low, gap)


def _draw_scene(shown: list[scenes.Scene], row: int) -> Image.Image:
    return scenes.draw(shown[row])
