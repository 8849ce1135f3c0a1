"""The embedded example as data sets: example (captions, questions, graded attributes), example_relations
(statements), example_changes (scenes before and after a change)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pc_clip.core.cache import cached
from pc_clip.data.dataset import Attribute, Change, Dataset, Question, Statement, digest
from pc_clip.example import changes, relations, scenes, world

EXAMPLE_SIZES = {"train": 6000, "val": 1000, "test": 2000}
CHANGES_SIZES = {"train": 24000, "val": 500, "test": 2000}  # pairs
CACHE = Path("data/cache/example")
FEW = 500  # pairs, which are as soon found as read


def example(split: str, n: int | None = None) -> Dataset:
    """The first `n` scenes of a split of the embedded example; all of them if None."""
    n = n or EXAMPLE_SIZES[split]
    shown = [world.scene(split, i) for i in range(n)]
    return Dataset(
        name="example",
        split=split,
        ids=[f"{split}-{i:05d}" for i in range(n)],
        load=partial(_load, shown),
        fingerprint=digest(split, n, _digest_of(shown[:8])),
        captions=[world.captions(split, i) for i in range(n)],
        questions=tuple(_example_question(name, shown) for name in world.CLASSES),
        attributes=tuple(_example_attribute(name, shown) for name in _GRADED),
        part=split,
    )


def example_relations(split: str, n: int | None = None) -> Dataset:
    """The first `n` scenes of two things of a split, with statements about them; all of them if None.

    The questions, for a probe, are whether an image embedding tells where the thing of a colour is.
    """
    n = n or EXAMPLE_SIZES[split]
    shown = [relations.scene(split, i) for i in range(n)]
    ids = [f"{split}-{i:05d}" for i in range(n)]
    return Dataset(
        name="example_relations",
        split=split,
        ids=ids,
        load=partial(_load, shown),
        fingerprint=digest("relations", split, n, _digest_of(shown[:8])),
        questions=tuple(_place_question(kind, colour, shown) for kind in _PLACES for colour in scenes.COLOURS),
        part=split,
        statements=tuple(Statement(key, *fact) for i, key in enumerate(ids) for fact in relations.statements(split, i)),
    )


def example_changes(split: str, n: int | None = None) -> Dataset:
    """The first `n` pairs of a split, all of them if None: pair i is the images 2i and 2i + 1, and changes[i].

    It can judge sentences.
    """
    n = n or CHANGES_SIZES[split]
    pairs, sentences = zip(*change_pairs(split, n))
    shown = [view for pair in pairs for view in (pair.before, pair.after)]
    ids = [f"{split}-{i:05d}-{when}" for i in range(n) for when in ("before", "after")]
    return Dataset(
        name="example_changes",
        split=split,
        ids=ids,
        load=partial(_load, shown),
        fingerprint=digest("changes", split, n, _digest_of(shown[:16]), list(sentences)),
        part=split,
        changes=tuple(Change(ids[2 * i], ids[2 * i + 1], sentences[i], pair.kind) for i, pair in enumerate(pairs)),
        judge=partial(_judge, pairs),
    )


def change_pairs(split: str, n: int) -> list[tuple[changes.Pair, tuple[str, ...]]]:
    """The first `n` pairs of a split, each with its sentences; more than a few are kept in data/cache/example.

    Three things seldom have room in a picture at the first try: to find 24,000 pairs takes half a minute.
    """

    def find() -> list[tuple[changes.Pair, tuple[str, ...]]]:
        return [(changes.pair(split, i), changes.sentences(split, i)) for i in range(n)]

    def as_json() -> dict[str, np.ndarray]:
        return {"json": np.frombuffer(bytearray(json.dumps(find(), default=vars).encode()), dtype=np.uint8)}

    if n <= FEW:
        return find()
    source = b"".join(Path(file).read_bytes() for file in (changes.__file__, scenes.__file__, changes.WORDINGS))
    key = {"split": split, "pairs": str(n), "numpy": np.__version__, "made by": hashlib.sha256(source).hexdigest()}
    text = cached("changes", key, as_json, CACHE)["json"].tobytes()
    return [(_read_pair(**fields), tuple(texts)) for fields, texts in json.loads(text)]


def _read_pair(before: dict, after: dict, thing: dict | None, **fields: str) -> changes.Pair:
    def scene(things: list[dict], **rest: Any) -> scenes.Scene:
        return scenes.Scene(tuple(scenes.Thing(**each) for each in things), **rest)

    return changes.Pair(scene(**before), scene(**after), thing=thing and scenes.Thing(**thing), **fields)


def _judge(pairs: Sequence[changes.Pair], row: int, sentence: str) -> dict[str, bool]:
    return changes.judge(pairs[row], sentence)


def _digest_of(shown: Sequence[scenes.Scene]) -> str:
    return hashlib.sha256(b"".join(scenes.draw(each).tobytes() for each in shown)).hexdigest()


_PLACES = {
    "side": ("x", ("on the left", "on the right")),
    "height": ("y", ("at the top", "at the bottom")),
}


def _place_question(kind: str, colour: str, shown: list[scenes.Scene]) -> Question:
    axis, classes = _PLACES[kind]
    answered = [
        (row, answer) for row, scene in enumerate(shown) if (answer := relations.half(scene, colour, axis)) is not None
    ]
    rows, target = np.array(answered, dtype=np.int64).reshape(-1, 2).T
    article = "an" if colour[0] in "aeiou" else "a"
    return Question(f"{kind} of the {colour} object", classes, rows, target, (f"{article} {colour} object {{}}",))


def _example_question(name: str, shown: list[scenes.Scene]) -> Question:
    answers = [world.answer(name, scene) for scene in shown]
    rows = np.array([row for row, a in enumerate(answers) if a is not None], dtype=np.int64)
    target = np.array([a for a in answers if a is not None], dtype=np.int64)
    return Question(name, world.CLASSES[name], rows, target, world.TEMPLATES[name])


_GRADED = {  # of much and of little of it; a clear difference is wider than the spread within one class
    "size": ("a large object", "a small object", 2.4),  # pixels
    "background": ("an object on a light background", "an object on a dark background", 50.0),  # grey levels
    "count": ("three objects", "one object", 0.5),
}


def _example_attribute(name: str, shown: list[scenes.Scene]) -> Attribute:
    value = np.array([world.grade(name, scene) for scene in shown])
    return Attribute(name, value, *world.COMPARATIVES[name], *_GRADED[name])


def _load(shown: Sequence[scenes.Scene], row: int) -> Image.Image:
    return Image.frombytes("RGB", (scenes.SIDE, scenes.SIDE), _drawn(shown[row]))


@lru_cache(maxsize=3 << 14)  # 600 MB at most: where the image tower learns, every epoch wants them all
def _drawn(scene: scenes.Scene) -> bytes:
    return scenes.draw(scene).tobytes()
