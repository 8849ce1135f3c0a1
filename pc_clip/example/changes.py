"""Pairs of scenes before and after one change, sentences on what changed, and what is right in such a sentence.

All things of a scene differ in colour and in shape, so "the red star" is one thing. In every pair the light and the
camera change as well (distractors, as in CLEVR-Change): no sentence names those, and where nothing else changed,
nothing changed. Everything follows from (split, index) alone.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import yaml

from pc_clip.example import scenes
from pc_clip.example.scenes import COLOURS, SHAPES, SIDE, SIZES, TEXTURES, Scene, Thing

SEEDS = {"train": 21, "val": 22, "test": 23}
KINDS = ("colour", "texture", "move", "add", "drop", "none")
COUNT = 2  # things before; one less or one more after
LARGE_ENOUGH = ("medium", "large")  # sizes at which shapes and textures can be told apart after a shift
SENTENCES_EACH = 5
NAMED = 0.25  # how often a sentence names a size or a texture that it need not name

LEVEL = 25  # the background gets this much darker or lighter at most,
LEVELS = (15, 235)  # and no darker or lighter than any background of `scenes`
GAIN = (0.85, 1.15)  # the light on everything, after against before
CAMERA = 2.5  # pixels that all things shift together at most, along x and along y
OWN = 0.5  # pixels that each thing shifts on top of it
EDGE = 0.5  # pixels between a thing and the edge of the picture at least, after that

FAR = 14.0  # pixels that a thing moves at least, along x or y
STRAIGHT = 0.5  # of that, at most so much along the other axis: with CAMERA and OWN, 10 pixels against 11
EXTENT = 1.1  # times its radius, a thing reaches along x and y at most (stars and diamonds)
REACH = 1.2  # times its radius, it reaches slantwise (corners of squares; of triangles a little more)
GAP = 3.0  # pixels between two things before they shift
TRIES = 20  # places that are tried for a thing

WORDINGS = Path(__file__).with_name("changes.yaml")


@dataclass(frozen=True)
class Pair:
    """Two scenes before and after a change, and the change.

    thing: the one that changed, as it was before (after, if it was added); None where nothing changed. value: its new
    colour or texture, or the direction it went (left, right, up, down); empty for the other kinds.
    """

    before: Scene
    after: Scene
    kind: str
    thing: Thing | None
    value: str


# -- pairs ---------------------------------------------------------------------------------------------


@lru_cache(maxsize=1 << 15)
def pair(split: str, index: int) -> Pair:
    """Two things before; after, one of them changed, went or came, or none did."""
    rng = np.random.default_rng([SEEDS[split], index])
    kind = str(rng.choice(KINDS))
    changed = None
    while changed is None:
        *things, spare = _things(COUNT + 1, rng)  # one to spare, whatever the kind: how full a scene is tells nothing
        changed = _change(kind, tuple(things), spare, rng)
    after, thing, value = changed
    background = str(rng.choice(list(scenes.BACKGROUNDS)))
    level = scenes.BACKGROUNDS[background] + int(rng.integers(-25, 26))
    later = int(np.clip(level + rng.integers(-LEVEL, LEVEL + 1), *LEVELS))
    after = Scene(_jitter(after, rng), background, later, float(rng.uniform(*GAIN)))
    return Pair(Scene(tuple(things), background, level), after, kind, thing, value)


def _things(count: int, rng: np.random.Generator) -> list[Thing]:
    """Things of different colours and shapes, apart from one another: other sizes until they have room."""
    colours, shapes = (rng.permutation(list(values))[:count].tolist() for values in (COLOURS, SHAPES))
    textures = rng.choice(TEXTURES, size=count).tolist()
    things: list[Thing] = []
    while len(things) < count:
        things = []
        sizes = rng.choice(LARGE_ENOUGH, size=count).tolist()
        for shape, colour, texture, size in zip(shapes, colours, textures, sizes):
            radius = SIZES[size] * rng.uniform(0.92, 1.08)
            place = _place(radius, things, rng)
            if place is None:
                break
            things.append(Thing(shape, colour, texture, size, *place, radius))
    return things


def _place(radius: float, others: list[Thing], rng: np.random.Generator) -> list[float] | None:
    """A random free place, [x, y]; None where none was found."""
    margin = EXTENT * radius + OWN + EDGE
    for x, y in rng.uniform(margin, SIDE - margin, size=(TRIES, 2)).tolist():
        if all(math.hypot(x - o.x, y - o.y) > REACH * (radius + o.radius) + GAP for o in others):
            return [x, y]
    return None


def _change(
    kind: str, things: tuple[Thing, ...], spare: Thing, rng: np.random.Generator
) -> tuple[tuple[Thing, ...], Thing | None, str] | None:
    """The things after a change of a kind, the one it happened to, and its value; None where there is no room."""
    if kind == "none":
        return things, None, ""
    if kind == "add":
        return (*things, spare), spare, ""
    n = int(rng.integers(len(things)))
    thing, others = things[n], things[:n] + things[n + 1 :]
    if kind == "drop":
        return others, thing, ""
    if kind == "move":
        place = _place(thing.radius, list(others), rng)
        value = place and _direction(place[0] - thing.x, place[1] - thing.y)
        if value is None:
            return None
        new = replace(thing, x=place[0], y=place[1])
    else:
        taken = {t.colour for t in things} | {thing.texture}
        value = str(rng.choice([value for value in VALUES[kind] if value not in taken]))
        new = replace(thing, **{kind: value})
    return (*things[:n], new, *things[n + 1 :]), thing, value


def _direction(dx: float, dy: float) -> str | None:
    """left, right, up or down; None when it is not clear."""
    if abs(dx) >= FAR and abs(dy) <= STRAIGHT * abs(dx):
        return "left" if dx < 0 else "right"
    if abs(dy) >= FAR and abs(dx) <= STRAIGHT * abs(dy):
        return "up" if dy < 0 else "down"
    return None


def _jitter(things: tuple[Thing, ...], rng: np.random.Generator) -> tuple[Thing, ...]:
    """All things shifted together, as far as they stay inside the picture, and each a little of its own."""

    def shifts(axis: str) -> list[float]:
        reach = [EXTENT * thing.radius + OWN + EDGE for thing in things]
        low = min(getattr(thing, axis) - r for thing, r in zip(things, reach))
        high = min(SIDE - getattr(thing, axis) - r for thing, r in zip(things, reach))
        return (rng.uniform(-min(CAMERA, low), min(CAMERA, high)) + rng.uniform(-OWN, OWN, size=len(things))).tolist()

    moved = zip(things, shifts("x"), shifts("y"))
    return tuple(replace(thing, x=thing.x + dx, y=thing.y + dy) for thing, dx, dy in moved)


# -- sentences -----------------------------------------------------------------------------------------

TEMPLATES: dict[str, list[str]] = yaml.safe_load(WORDINGS.read_text(encoding="utf-8"))  # by kind of change
VALUES = {"colour": tuple(COLOURS), "texture": TEXTURES, "move": ("left", "right", "up", "down")}


def sentences(split: str, index: int) -> tuple[str, ...]:
    """Five different sentences about a pair, each of which says it all: the same every time."""
    rng = np.random.default_rng([SEEDS[split], index, 1])
    about = pair(split, index)
    texts: dict[str, None] = {}
    while len(texts) < SENTENCES_EACH:
        texts[_sentence(about, rng)] = None
    return tuple(texts)


def _sentence(about: Pair, rng: np.random.Generator) -> str:
    template = str(rng.choice(TEMPLATES[about.kind]))
    if about.thing is None:
        return template
    size, texture = rng.random(2) < NAMED
    words = [about.thing.size] if size else []
    words += [about.thing.texture] if texture and about.kind != "texture" else []  # there "from ... to" says it
    words += [about.thing.colour, about.thing.shape]
    article = "an" if words[0][0] in "aeiou" else "a"
    to = "to the " if about.value in ("left", "right") else ""
    return template.format(thing=" ".join(words), a=article, to=to, value=about.value, old=about.thing.texture)


# -- reading a sentence back ---------------------------------------------------------------------------


class Meaning(NamedTuple):
    """The meaning of a sentence. facts: the thing it names, keys among size, texture, colour, shape. value: the new
    colour or texture, or the direction; empty for the other kinds."""

    kind: str
    facts: dict[str, str]
    value: str


def parse(sentence: str) -> Meaning | None:
    """The meaning of a sentence of the templates; None for any other, or a contradictory one.

    The shape of a thing has to be there; its size, its texture and its colour may be, in this order. So a sentence may
    be understood that no template makes ("the striped star turned dotted"), if it says as clearly what changed.
    """
    for kind, pattern in _PATTERNS:
        if match := pattern.fullmatch(sentence):
            facts = {key: word for key, word in match.groupdict().items() if word is not None}
            value, old = facts.pop("value", ""), facts.pop("old", None)
            twice = old is not None and "texture" in facts
            facts |= {"texture": old} if old else {}
            return None if twice or (value and facts.get(kind) == value) else Meaning(kind, facts, value)
    return None


def judge(truth: Pair, sentence: str) -> dict[str, bool]:
    """Which parts of a sentence about a pair are right: "type", "object", "value".

    type: the kind of the change. object: colour and shape are named, and all that is named is true of the thing that
    changed; where nothing changed, the type decides. value: the type, and the new colour, texture or direction if it
    has one. Nothing is right in a sentence that `parse` does not understand.
    """
    meaning = parse(sentence)
    if meaning is None:
        return {"type": False, "object": False, "value": False}
    kind = meaning.kind == truth.kind
    if truth.thing is None or meaning.kind == "none":
        thing = kind
    else:
        thing = {"colour", "shape"} <= meaning.facts.keys() and all(
            getattr(truth.thing, key) == word for key, word in meaning.facts.items()
        )
    return {"type": kind, "object": thing, "value": kind and meaning.value == truth.value}


def _pattern(kind: str, template: str) -> re.Pattern[str]:
    def one(name: str, words: tuple[str, ...]) -> str:
        return f"(?P<{name}>{'|'.join(words)})"

    adjectives = {"size": tuple(SIZES), "texture": TEXTURES, "colour": tuple(COLOURS)}
    thing = "".join(f"(?:{one(name, words)} )?" for name, words in adjectives.items()) + one("shape", SHAPES)
    article, to = "(?:an(?= [aeiou])|a(?! [aeiou]))", "(?:to the (?=left|right)|(?=up|down))"
    value, old = one("value", VALUES.get(kind, ())), one("old", TEXTURES)
    return re.compile(template.format(thing=thing, a=article, to=to, value=value, old=old))


_PATTERNS = [(kind, _pattern(kind, template)) for kind, several in TEMPLATES.items() for template in several]
