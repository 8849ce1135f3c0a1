"""The embedded example: scenes rendered by seed, with captions, questions and graded attributes; scenes of two
different things, with statements on how they stand to one another; and pairs of scenes before and after a change."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
from PIL import Image

from pc_clip.data.dataset import Attribute, Change, Dataset, Question, Statement, digest
from pc_clip.example import changes, relations, scenes, world

EXAMPLE_SIZES = {"train": 6000, "val": 1000, "test": 2000}
CHANGES_SIZES = {"train": 24000, "val": 500, "test": 2000}  # pairs


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
        load=partial(_draw, shown),
        fingerprint=digest(split, n, hashlib.sha256(pixels).hexdigest()),
        captions=[world.captions(split, i) for i in range(n)],
        questions=tuple(_example_question(name, shown) for name in world.CLASSES),
        attributes=tuple(_example_attribute(name, shown) for name in ("size", "background", "count")),
        part=split,
    )


def open_relations(_: Path, split: str) -> Dataset:
    return example_relations(split, EXAMPLE_SIZES[split])


def example_relations(split: str, n: int) -> Dataset:
    """The first `n` scenes of two things of a split, with statements about them.

    The questions, for a probe, are whether an image embedding tells where the thing of a colour is.
    """
    shown = [relations.scene(split, i) for i in range(n)]
    ids = [f"{split}-{i:05d}" for i in range(n)]
    pixels = b"".join(scenes.draw(scene).tobytes() for scene in shown[:8])
    return Dataset(
        name="example_relations",
        split=split,
        ids=ids,
        load=partial(_draw, shown),
        fingerprint=digest("relations", split, n, hashlib.sha256(pixels).hexdigest()),
        questions=tuple(_place_question(kind, colour, shown) for kind in _PLACES for colour in scenes.COLOURS),
        part=split,
        statements=tuple(Statement(key, *said) for i, key in enumerate(ids) for said in relations.statements(split, i)),
    )


def open_changes(_: Path, split: str) -> Dataset:
    return example_changes(split, CHANGES_SIZES[split])


def example_changes(split: str, n: int) -> Dataset:
    """The first `n` pairs of a split: pair i is the images 2i and 2i + 1, and changes[i]. It can judge sentences."""
    pairs, said = zip(*changes.pairs(split, n))
    shown = [view for pair in pairs for view in (pair.before, pair.after)]
    ids = [f"{split}-{i:05d}-{when}" for i in range(n) for when in ("before", "after")]
    pixels = b"".join(scenes.draw(view).tobytes() for view in shown[:16])
    return Dataset(
        name="example_changes",
        split=split,
        ids=ids,
        load=partial(_draw, shown),
        fingerprint=digest("changes", split, n, hashlib.sha256(pixels).hexdigest(), list(said)),
        part=split,
        changes=tuple(Change(ids[2 * i], ids[2 * i + 1], said[i], pair.kind) for i, pair in enumerate(pairs)),
        judge=partial(_judge, pairs),
    )


def _judge(pairs: Sequence[changes.Pair], row: int, said: str) -> dict[str, bool]:
    return changes.judge(pairs[row], said)


_PLACES = {
    "side": ("x", ("on the left", "on the right")),
    "height": ("y", ("at the top", "at the bottom")),
}


def _place_question(kind: str, colour: str, shown: list[scenes.Scene]) -> Question:
    axis, classes = _PLACES[kind]
    found = [
        (row, answer) for row, scene in enumerate(shown) if (answer := relations.half(scene, colour, axis)) is not None
    ]
    rows, target = np.array(found, dtype=np.int64).reshape(-1, 2).T
    article = "an" if colour[0] in "aeiou" else "a"
    return Question(f"{kind} of the {colour} object", classes, rows, target, (f"{article} {colour} object {{}}",))


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


def _draw(shown: Sequence[scenes.Scene], row: int) -> Image.Image:
    return Image.frombytes("RGB", (scenes.SIDE, scenes.SIDE), _drawn(shown[row]))


@lru_cache(maxsize=3 << 14)  # 600 MB at most: where the image tower learns, every epoch wants them all
def _drawn(scene: scenes.Scene) -> bytes:
    return scenes.draw(scene).tobytes()
