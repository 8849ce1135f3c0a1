"""What captions say of size, people, nature and light: comparisons for training, and values of images to rank.

graded_nouns.yaml grades everyday words. Sentences from captions alone name things and never compare them, so a model
learns no "larger" from them.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import yaml

from pc_clip.data.dataset import Attribute, Dataset

SUCH_AS = 0.5  # the share of comparisons that also name the thing: "something larger such as an elephant"
FILE = Path(__file__).with_suffix(".yaml")


class Grades(NamedTuple):
    """words: word -> value. phrases: (more, less) of training sentences; unseen: of none."""

    name: str
    words: dict[str, float]
    gap: float
    phrases: list[tuple[str, str]]
    unseen: list[tuple[str, str]]

    def of(self, caption: str) -> tuple[float, str] | None:
        """The value of the first graded word of a caption, and that word. Plurals count as their singular."""
        for word in re.findall(r"[a-z-]+", caption.lower()):
            for form in (word, word.removesuffix("s"), word.removesuffix("es")):
                if form in self.words:
                    return self.words[form], form
        return None


@cache
def table() -> tuple[Grades, ...]:
    content = yaml.safe_load(FILE.read_text(encoding="utf-8"))
    return tuple(
        Grades(
            name,
            {word: float(np.log2(value)) if each.get("log") else float(value) for word, value in each["words"].items()},
            float(each["gap"]),
            list(zip(each["more"], each["less"], strict=True)),
            [tuple(pair) for pair in each["unseen"]],
        )
        for name, each in content.items()
    )


def compared(first: str, second: str, rng: np.random.Generator) -> tuple[str, str] | None:
    """A phrase for each of two captions that compares what they show; None where no graded words tell them apart."""
    graded = [(grades, grades.of(first), grades.of(second)) for grades in table()]
    clear = [(grades, a, b) for grades, a, b in graded if a and b and abs(a[0] - b[0]) >= grades.gap]
    if not clear:
        return None
    grades, a, b = clear[int(rng.integers(len(clear)))]
    more, less = grades.phrases[int(rng.integers(len(grades.phrases)))]
    phrases = (more, less) if a[0] > b[0] else (less, more)
    if grades.name != "size" or rng.random() >= SUCH_AS:
        return phrases
    return tuple(f"{phrase} such as {_with_article(word)}" for phrase, (_, word) in zip(phrases, (a, b)))


def _with_article(word: str) -> str:
    return f"{'an' if word[0] in 'aeiou' else 'a'} {word}" if word != "scissors" else word


def attributes_of(data: Dataset) -> tuple[Attribute, ...]:
    """Each graded attribute of images with captions, once for each pair of phrases, trained and unseen.

    An image's value is the mean over its captions of which at least half have a graded word.
    """
    attributes = []
    for grades in table():
        value = np.array([_of_image(grades, captions) for captions in data.captions])
        if np.nanmax(value, initial=-np.inf) - np.nanmin(value, initial=np.inf) <= grades.gap:
            continue  # no two of these images differ
        for kind, pairs in (("trained", grades.phrases), ("unseen", grades.unseen)):
            for n, (more, less) in enumerate(pairs):
                task = f"nouns_{grades.name}_{kind}"
                attributes.append(Attribute(f"{task}_{n}", value, more, less, more, less, grades.gap, task))
    return tuple(attributes)


def _of_image(grades: Grades, captions: Sequence[str]) -> float:
    values = [each[0] for each in map(grades.of, captions) if each]
    return float(np.mean(values)) if values and 2 * len(values) >= len(captions) else np.nan
