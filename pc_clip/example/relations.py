"""Scenes of two different things, and statements on where they are and how they stand to one another.

As many are true as false, and nothing in a statement gives away which: it names things by colour and shape, which say
nothing about place and size, in either order, and a coin decides between what holds and its opposite. So whoever does
not look is right half the time.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np

from pc_clip.example import scenes
from pc_clip.example.captions import relation
from pc_clip.example.scenes import Scene, Thing

SEEDS = {"train": 11, "val": 12, "test": 13}
OPPOSITES = {
    "on the left": "on the right",
    "on the right": "on the left",
    "at the top": "at the bottom",
    "at the bottom": "at the top",
    "left of": "right of",
    "right of": "left of",
    "above": "below",
    "below": "above",
    "larger than": "smaller than",
    "smaller than": "larger than",
    "larger than the other": "smaller than the other",
    "smaller than the other": "larger than the other",
}
ROUNDS = 2  # statements of each kind a scene
CLEAR = 5.0  # pixels that a thing is off the middle at least, where it is said to be on one side


@lru_cache(maxsize=1 << 17)
def scene(split: str, index: int) -> Scene:
    """Two things of different colours and shapes, one of them clearly left of or above the other."""
    rng = np.random.default_rng([SEEDS[split], index])
    while True:
        candidate = scenes.sample(rng, count=2, alike=False)
        first, second = candidate.things
        if first.colour != second.colour and first.shape != second.shape and relation(first, second):
            return candidate


class SceneStatement(NamedTuple):
    """A text about a scene, what contradicts it, whether it holds, the relation it names, and what that is about."""

    text: str
    contradiction: str
    true: bool
    relation: str
    category: str


def statements(split: str, index: int) -> list[SceneStatement]:
    """Statements on a scene: where a thing is, where one is relative to the other, which one is larger.

    Statements on one thing are easier; without them a small model does not learn those on two.
    """
    things = scene(split, index).things
    rng = np.random.default_rng([SEEDS[split], index, 1])
    facts = []
    for _ in range(ROUNDS):
        for axis, (low, high) in {"x": ("on the left", "on the right"), "y": ("at the top", "at the bottom")}.items():
            thing = things[rng.integers(2)]
            off = getattr(thing, axis) - scenes.SIDE / 2
            if abs(off) > CLEAR:
                facts.append(_statement(_named(thing, rng), low if off < 0 else high, "", "place", rng))
        a, b = (things[n] for n in rng.permutation(2))
        facts.append(_statement(_named(a, rng), relation(a, b), _named(b, rng), "position", rng))
        a, b = (things[n] for n in rng.permutation(2))
        if a.size != b.size:
            larger = "larger than" if a.radius > b.radius else "smaller than"
            facts.append(_statement(_named(a, rng), larger, _named(b, rng), "size", rng))
            facts.append(_statement(_named(a, rng), f"{larger} the other", "", "size", rng))
    return facts


def _statement(subject: str, true: str, other: str, category: str, rng: np.random.Generator) -> SceneStatement:
    relation_named = true if rng.random() < 0.5 else OPPOSITES[true]
    text, contradiction = (f"{subject} {link} {other}".strip() for link in (relation_named, OPPOSITES[relation_named]))
    return SceneStatement(text, contradiction, relation_named == true, relation_named, category)


def _named(thing: Thing, rng: np.random.Generator) -> str:
    """A thing by its colour, its shape or both: enough to tell it from the other."""
    words = (f"{thing.colour} {thing.shape}", f"{thing.colour} object", thing.shape)[rng.integers(3)]
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def half(shown: Scene, colour: str, axis: str) -> int | None:
    """Whether the thing of a colour is in the left or upper half (0), or in the other (1); None without such a thing.

    axis: x or y.
    """
    return next((int(getattr(thing, axis) > scenes.SIDE / 2) for thing in shown.things if thing.colour == colour), None)
