"""Captions of scenes: like a person's, each names some attributes and leaves others out."""

from __future__ import annotations

import re

import numpy as np

from pc_clip.example.scenes import BACKGROUNDS, COLOURS, SHAPES, SIZES, TEXTURES, Scene, Thing

COUNT_WORDS = {1: "one", 2: "two", 3: "three"}
OPENINGS = ("", "", "a picture of ", "an image of ", "a photo of ")
PLACES = {
    "left": "on the left",
    "right": "on the right",
    "top": "at the top",
    "bottom": "at the bottom",
    "middle": "in the middle",
}


def caption(scene: Scene, rng: np.random.Generator) -> str:
    """One caption with a random subset of the scene's facts, all of them true.

    When things differ, each is named: a caption that named one of two would make "one" a false word.
    """
    if scene.alike:
        text = noun_phrase(scene.things[0], len(scene.things), rng)
        if scene.position and rng.random() < 0.7:
            text += " " + PLACES[scene.position]
    else:
        text = _several(scene, rng)
    if rng.random() < 0.45:
        text += f" on a {scene.background} background"
    return str(rng.choice(OPENINGS)) + text


def noun_phrase(thing: Thing, count: int, rng: np.random.Generator) -> str:
    """For example "two large striped red stars"; each adjective is there or not by chance."""
    adjectives = [word for word, share in zip(thing.looks[:3], (0.5, 0.5, 0.65)) if rng.random() < share]
    noun = thing.shape if rng.random() < 0.85 else str(rng.choice(("object", "shape")))
    noun = noun if count == 1 else _plural(noun)
    words = [*adjectives, noun]
    if count == 1 and rng.random() < 0.7:
        article = "an" if words[0][0] in "aeiou" else "a"
        return " ".join([article, *words])
    return " ".join([COUNT_WORDS[count], *words])


def _plural(noun: str) -> str:
    return noun + ("es" if noun.endswith("s") else "s")


def relation(a: Thing, b: Thing) -> str | None:
    """How `a` stands to `b`: left of, right of, above or below; None when it is not clear-cut."""
    dx, dy = a.x - b.x, a.y - b.y
    if abs(dx) > 1.5 * abs(dy):
        return "left of" if dx < 0 else "right of"
    if abs(dy) > 1.5 * abs(dx):
        return "above" if dy < 0 else "below"
    return None


def _several(scene: Scene, rng: np.random.Generator) -> str:
    order = rng.permutation(len(scene.things))
    things = [scene.things[i] for i in order]
    phrases = [noun_phrase(thing, 1, rng) for thing in things]
    if len(things) == 2:
        link = relation(*things)
        if link and rng.random() < 0.6:
            return f"{phrases[0]} {link} {phrases[1]}"
    return ", ".join(phrases[:-1]) + " and " + phrases[-1]


# -- reading a caption back ----------------------------------------------------------------------------

_ADJECTIVES = {"size": tuple(SIZES), "texture": TEXTURES, "colour": tuple(COLOURS)}
_NOUNS = {plural: shape for shape in (*SHAPES, "object", "shape") for plural in (shape, _plural(shape))}
_NUMBERS = {"a": 1, "an": 1, "one": 1, "two": 2, "three": 3}
_OPENING = re.compile("^(?:" + "|".join(sorted({re.escape(o) for o in OPENINGS if o})) + ")")
_BACKGROUND = re.compile(rf" on a ({'|'.join(BACKGROUNDS)}) background$")
_PLACE = re.compile(rf" ({'|'.join(PLACES.values())})$")
_BETWEEN = re.compile(r", | and | left of | right of | above | below ")


def parse(text: str) -> dict[str, str | int]:
    """The facts of a caption of this grammar; empty for any other text.

    Keys among size, texture, colour, shape, count, background, position. Looks are given only when the
    caption is about one kind of thing; the count always, because every thing is named.
    """
    facts: dict[str, str | int] = {}
    text = _OPENING.sub("", text)
    for key, pattern in (("background", _BACKGROUND), ("position", _PLACE)):
        if match := pattern.search(text):
            facts[key] = match.group(1)
            text = text[: match.start()]
    phrases = [_parse_phrase(phrase) for phrase in _BETWEEN.split(text)]
    if any(phrase is None for phrase in phrases):
        return {}
    facts["count"] = sum(phrase.pop("count") for phrase in phrases)
    return {**facts, **phrases[0]} if len(phrases) == 1 else facts


def _parse_phrase(phrase: str) -> dict[str, str | int] | None:
    words = phrase.split()
    if len(words) < 2 or words[0] not in _NUMBERS or words[-1] not in _NOUNS:
        return None
    facts: dict[str, str | int] = {"count": _NUMBERS[words[0]]}
    if (noun := _NOUNS[words[-1]]) in SHAPES:
        facts["shape"] = noun
    for word in words[1:-1]:
        kinds = [kind for kind, values in _ADJECTIVES.items() if word in values]
        if not kinds:
            return None
        facts[kinds[0]] = word
    return facts
