"""Sentences by rule, from two captions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from pc_clip.core.config.write import WordingConfig
from pc_clip.core.errors import check_choice
from pc_clip.core.random import stream
from pc_clip.data.graded_nouns import compared
from pc_clip.data.wordings import Wordings, as_phrase
from pc_clip.example.captions import parse
from pc_clip.example.world import COMPARATIVES
from pc_clip.write.writers import Job, Writer

# Rare facts are preferred, so that every kind of difference is written about as often: left to chance,
# most sentences would be about shape and count and hardly any about the background.
_PREFERENCE = {
    "background": 3.0,
    "size": 9.0,
    "position": 3.0,
    "texture": 2.0,
    "colour": 1.0,
    "shape": 1.0,
    "count": 1.0,
}
_ORDER = {"size": ("small", "medium", "large"), "background": ("dark", "grey", "light"), "count": (1, 2, 3)}


PLAIN = WordingConfig(["plain"], ["first_image"], "first")  # where nothing else is asked for, as in an evaluation


class RulesWriter(Writer):
    """Compares two captions by rule, in one of many wordings (data/wordings.py).

    Captions of the example are parsed, and one attribute that both mention and that differs is put into
    words. Any other two captions are set against each other: "The first image shows a man on a moped,
    while the second shows two cats."
    """

    needs_cleaning = False  # what it writes is as it is meant

    def __init__(self, options: WordingConfig = PLAIN) -> None:
        self.graded = options.graded
        check_choice("wording.order", options.order, ("both", "first"))
        self.wordings = Wordings(options.families, options.schemes, options.order, options.openers, options.without)

    def stream(self, jobs: Sequence[Job]) -> Iterator[tuple[int, str]]:
        for n, job in enumerate(jobs):
            yield n, self._write(job)

    def _write(self, job: Job) -> str:
        if not job.second:
            return job.first  # a description by rule is found where the classes are known (data/class_text.py)
        rng = stream(job.seed, "rules")
        a, b = parse(job.first), parse(job.second)
        kinds = [kind for kind in _PREFERENCE if kind in a and kind in b and a[kind] != b[kind]]
        wording = self.wordings.draw(rng)
        if not kinds:
            if self.graded and rng.random() < self.graded and (phrases := compared(job.first, job.second, rng)):
                return wording.say(*phrases)
            return wording.say(as_phrase(job.first), as_phrase(job.second))
        weights = np.array([_PREFERENCE[kind] for kind in kinds])
        kind = kinds[int(rng.choice(len(kinds), p=weights / weights.sum()))]
        return wording.say(*_phrases(kind, a[kind], b[kind]))

    def describe(self) -> dict[str, Any]:
        chosen = {"families": list(self.wordings.families), "schemes": list(self.wordings.schemes)}
        shares = {"openers": self.wordings.openers, "graded": self.graded}
        return {"writer": "rules", **chosen, "order": self.wordings.order, **shares}


def _phrases(kind: str, a: str | int, b: str | int) -> tuple[str, str]:
    if kind in _ORDER:
        more, less = COMPARATIVES[kind]
        return (more, less) if _ORDER[kind].index(a) > _ORDER[kind].index(b) else (less, more)
    pattern = {"colour": "{} objects", "texture": "{} objects", "shape": "a {}", "position": "an object {}"}[kind]
    return pattern.format(a), pattern.format(b)
