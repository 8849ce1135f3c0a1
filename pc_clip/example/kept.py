"""Pairs of scenes and their sentences, kept in data/cache/example once they are found.

Three things seldom have room in a picture at the first try, so that 24,000 pairs take half a minute to find, and every
command on them asks for all. All of data/cache may be deleted at any time.
"""

from __future__ import annotations

import hashlib
import inspect
import json
from pathlib import Path
from typing import Any

import numpy as np

from pc_clip.core import cache
from pc_clip.example import changes, scenes
from pc_clip.example.changes import Pair, View
from pc_clip.example.scenes import Scene, Thing

CACHE = Path("data/cache/example")
FEW = 500  # pairs, which are as soon found as read

Told = tuple[Pair, tuple[str, ...]]


def told_pairs(split: str, n: int) -> list[Told]:
    """The first `n` pairs of a split, each with its sentences: `changes.pair` and `changes.sentences`, but sooner."""
    if n <= FEW:
        return [(changes.pair(split, i), changes.sentences(split, i)) for i in range(n)]
    made_by = "".join(map(inspect.getsource, (changes, scenes)))
    key = {"split": split, "pairs": str(n), "numpy": np.__version__}
    key["made by"] = hashlib.sha256(made_by.encode()).hexdigest()
    text = cache.cached("changes", key, lambda: {"json": _written(split, n)}, CACHE)["json"]
    return [_pair(*row) for row in json.loads(text.tobytes())]


def _written(split: str, n: int) -> np.ndarray:
    rows = [_row(changes.pair(split, i), changes.sentences(split, i)) for i in range(n)]
    return np.frombuffer(bytearray(json.dumps(rows).encode()), dtype=np.uint8)


def _row(pair: Pair, said: tuple[str, ...]) -> list[Any]:
    def plain(thing: Thing | None) -> list[Any] | None:
        return thing and list(vars(thing).values())

    views = [
        [[plain(thing) for thing in view.scene.things], view.scene.background, view.scene.level, view.gain]
        for view in (pair.before, pair.after)
    ]
    return [*views, pair.kind, plain(pair.thing), pair.value, said]


def _pair(before: list[Any], after: list[Any], kind: str, thing: list[Any] | None, value: str, said: list[str]) -> Told:
    def view(things: list[list[Any]], background: str, level: int, gain: float) -> View:
        return View(Scene(tuple(Thing(*each) for each in things), background, level), gain)

    return Pair(view(*before), view(*after), kind, thing and Thing(*thing), value), tuple(said)
