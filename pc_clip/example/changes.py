"""Pairs of scenes before and after one change, sentences on what changed, and what is right in such a sentence.

All things of a scene differ in colour and in shape, so "the red star" is one thing. In every pair the light and the
camera change as well (distractors, as in CLEVR-Change): nobody names those, and where nothing else changed, nothing
changed. Everything follows from (split, index) alone.
"""

from __future__ import annotations

import dataclasses
import math
import re
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image

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


@dataclass(frozen=True)
class View:
    """A scene in a light: every pixel is `gain` times as bright as the scene says."""

    scene: Scene
    gain: float = 1.0


@dataclass(frozen=True)
class Pair:
    """What is seen before and after, and the truth about it.

    thing: the one that changed, as it was before (after, if it was added); None where nothing changed. value: its new
    colour or texture, or the direction it went (left, right, up, down); empty for the other kinds.
    """

    before: View
    after: View
    kind: str
    thing: Thing | None
    value: str


# -- pairs ---------------------------------------------------------------------------------------------


@lru_cache(maxsize=1 << 15)
def pair(split: str, index: int) -> Pair:
    """Two things before; after, one of them changed, went or came, or none did."""
    rng = np.random.default_rng([SEEDS[split], index])
    kind = str(rng.choice(KINDS))
    while True:
        things = _things(COUNT + 1, rng)  # one to spare, whatever the kind: how full a scene is gives nothing away
        changed = _change(kind, things[:-1], things[-1], rng)
        if changed is not None:
            break
    after, thing, value = changed
    background = str(rng.choice(list(scenes.BACKGROUNDS)))
    level = scenes.BACKGROUNDS[background] + int(rng.integers(-25, 26))
    later = int(np.clip(level + rng.integers(-LEVEL, LEVEL + 1), *LEVELS))
    return Pair(
        View(Scene(things[:-1], background, level)),
        View(Scene(_jitter(after, rng), background, later), float(rng.uniform(*GAIN))),
        kind,
        thing,
        value,
    )


def draw(view: View) -> Image.Image:
    """A view as a 64 x 64 RGB picture. Deterministic."""
    brighter = [min(255, round(view.gain * value)) for value in range(256)]
    return scenes.draw(view.scene).point(brighter * 3)


def _things(count: int, rng: np.random.Generator) -> tuple[Thing, ...]:
    """Things of different colours and shapes, apart from one another: other sizes until they have room."""
    colours, shapes = (rng.permutation(list(values))[:count] for values in (COLOURS, SHAPES))
    textures = rng.choice(TEXTURES, size=count)
    while True:
        sizes = rng.choice(LARGE_ENOUGH, size=count)
        looks = zip(shapes, colours, textures, sizes)
        things: list[Thing] = []
        for shape, colour, texture, size in looks:
            radius = SIZES[size] * rng.uniform(0.92, 1.08)
            unplaced = Thing(str(shape), str(colour), str(texture), str(size), 0.0, 0.0, float(radius))
            placed = _place(unplaced, things, rng)
            if placed is None:
                break
            things.append(placed)
        else:
            return tuple(things)


def _place(thing: Thing, others: list[Thing], rng: np.random.Generator, tries: int = 20) -> Thing | None:
    """The thing at a random free place; None where none was found."""
    margin = EXTENT * thing.radius + OWN + EDGE
    for x, y in rng.uniform(margin, SIDE - margin, size=(tries, 2)).tolist():
        if all(math.hypot(x - o.x, y - o.y) > REACH * (thing.radius + o.radius) + GAP for o in others):
            return dataclasses.replace(thing, x=x, y=y)
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
    if kind == "colour":
        value = str(rng.choice([c for c in COLOURS if c not in {t.colour for t in things}]))
        new = dataclasses.replace(thing, colour=value)
    elif kind == "texture":
        value = str(rng.choice([t for t in TEXTURES if t != thing.texture]))
        new = dataclasses.replace(thing, texture=value)
    else:
        new = _place(thing, list(others), rng)
        value = new and direction(thing, new)
        if value is None:
            return None
    return (*things[:n], new, *things[n + 1 :]), thing, value


def direction(before: Thing, after: Thing) -> str | None:
    """Where a thing went: left, right, up or down; None when it is not clear."""
    dx, dy = after.x - before.x, after.y - before.y
    if abs(dx) >= FAR and abs(dy) <= STRAIGHT * abs(dx):
        return "left" if dx < 0 else "right"
    if abs(dy) >= FAR and abs(dx) <= STRAIGHT * abs(dy):
        return "up" if dy < 0 else "down"
    return None


def _jitter(things: tuple[Thing, ...], rng: np.random.Generator) -> tuple[Thing, ...]:
    """All things shifted together, as far as they stay inside the picture, and each a little of its own."""

    def shifts(axis: str) -> np.ndarray:
        reach = [EXTENT * thing.radius + OWN + EDGE for thing in things]
        low = min(getattr(thing, axis) - r for thing, r in zip(things, reach))
        high = min(SIDE - getattr(thing, axis) - r for thing, r in zip(things, reach))
        return rng.uniform(-min(CAMERA, low), min(CAMERA, high)) + rng.uniform(-OWN, OWN, size=len(things))

    moved = zip(things, shifts("x").tolist(), shifts("y").tolist())
    return tuple(dataclasses.replace(thing, x=thing.x + dx, y=thing.y + dy) for thing, dx, dy in moved)


# -- sentences -----------------------------------------------------------------------------------------

TEMPLATES = {
    "colour": (
        "the {thing} turned {value}",
        "the {thing} became {value}",
        "the {thing} is {value} now",
        "the colour of the {thing} changed to {value}",
    ),
    "texture": (
        "the {thing} turned {value}",
        "the {thing} became {value}",
        "the {thing} is {value} now",
        "the texture of the {thing} changed to {value}",
        "the {thing} changed from {old} to {value}",
    ),
    "move": (
        "the {thing} moved {to}",
        "the {thing} shifted {to}",
        "the {thing} was moved {to}",
        "the {thing} is further {value} now",
    ),
    "add": (
        "{a} {thing} appeared",
        "{a} {thing} was added",
        "{a} {thing} has come in",
        "there is a new {thing}",
    ),
    "drop": (
        "the {thing} disappeared",
        "the {thing} was removed",
        "the {thing} is gone",
        "the {thing} is no longer there",
    ),
    "none": (
        "nothing changed",
        "there is no change",
        "no change was made",
        "the two scenes are the same",
        "everything is as it was",
    ),
}
VALUES = {"colour": tuple(COLOURS), "texture": TEXTURES, "move": ("left", "right", "up", "down")}
TO = {"left": "to the left", "right": "to the right", "up": "up", "down": "down"}


def sentences(split: str, index: int) -> tuple[str, ...]:
    """Five different sentences about a pair, each of which says it all: the same every time."""
    rng = np.random.default_rng([SEEDS[split], index, 1])
    about = pair(split, index)
    found: list[str] = []
    while len(found) < SENTENCES_EACH:
        text = _sentence(about, rng)
        if text not in found:
            found.append(text)
    return tuple(found)


def _sentence(about: Pair, rng: np.random.Generator) -> str:
    template = str(rng.choice(TEMPLATES[about.kind]))
    if about.thing is None:
        return template
    words = [about.thing.colour, about.thing.shape]
    size, texture = rng.random(2) < NAMED
    if texture and about.kind != "texture":  # there "from ... to" says it
        words.insert(0, about.thing.texture)
    if size:
        words.insert(0, about.thing.size)
    article = "an" if words[0][0] in "aeiou" else "a"
    return template.format(
        thing=" ".join(words), a=article, value=about.value, to=TO.get(about.value), old=about.thing.texture
    )


# -- reading a sentence back ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Said:
    """What a sentence says. facts: the thing as it names it, keys among size, texture, colour, shape. value: the new
    colour or texture, or the direction; empty for the other kinds."""

    kind: str
    facts: dict[str, str]
    value: str


def parse(sentence: str) -> Said | None:
    """What a sentence of the templates says; None for any other, and for one that contradicts itself.

    The shape of a thing has to be there; its size, its texture and its colour may be, in this order. So a sentence may
    be understood that no template makes ("the striped star turned dotted"), if it says as clearly what changed.
    """
    for kind, pattern in _PATTERNS:
        if match := pattern.fullmatch(sentence):
            named = {key: word for key, word in match.groupdict().items() if word is not None}
            return _said(kind, named)
    return None


def _said(kind: str, named: dict[str, str]) -> Said | None:
    value = named.pop("value", "")
    if "to" in named:
        value = next(way for way, words in TO.items() if words == named["to"])
        del named["to"]
    if "old" in named:
        if "texture" in named:  # said twice
            return None
        named["texture"] = named.pop("old")
    if value and named.get(kind) == value:  # it became what it was
        return None
    return Said(kind, named, value)


def judge(truth: Pair, sentence: str) -> dict[str, bool]:
    """What is right in a sentence about a pair: "type", "object", "value"; all of it where the sentence is.

    type: the kind of the change. object: colour and shape are named, and all that is named is true of the thing that
    changed; where nothing changed, the type decides. value: the type, and the new colour, texture or direction if it
    has one. Nothing is right in a sentence that `parse` does not understand.
    """
    said = parse(sentence)
    if said is None:
        return {"type": False, "object": False, "value": False}
    kind = said.kind == truth.kind
    if truth.thing is None or said.kind == "none":
        named = kind
    else:
        named = {"colour", "shape"} <= said.facts.keys() and all(
            getattr(truth.thing, key) == word for key, word in said.facts.items()
        )
    return {"type": kind, "object": named, "value": kind and said.value == truth.value}


def _pattern(kind: str, template: str) -> re.Pattern[str]:
    def one(name: str, words: tuple[str, ...]) -> str:
        return f"(?P<{name}>{'|'.join(words)})"

    adjectives = {"size": tuple(SIZES), "texture": TEXTURES, "colour": tuple(COLOURS)}
    thing = "".join(f"(?:{one(name, words)} )?" for name, words in adjectives.items()) + one("shape", SHAPES)
    parts = {
        "thing": thing,
        "a": "(?:an(?= [aeiou])|a(?! [aeiou]))",
        "value": one("value", VALUES.get(kind, ())),
        "to": one("to", tuple(TO.values())),
        "old": one("old", TEXTURES),
    }
    return re.compile(template.format(**parts))


_PATTERNS = [(kind, _pattern(kind, template)) for kind, several in TEMPLATES.items() for template in several]
