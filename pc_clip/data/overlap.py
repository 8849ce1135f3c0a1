"""Negatives that are likely none: a caption that is just as true of another image of its batch, told by its words."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from scipy.sparse import csr_array

_WORD = re.compile(r"[a-z0-9]+")
# They say nothing of what is in the picture. Numbers and places ("two", "left") do, and so are not among them.
_FUNCTION_WORDS = frozenset(
    re.findall(
        r"\w+",
        "a an the some any this that these those there it its his her their of in on at by to from with and or as is "
        "are was were be being been has have having who which while image picture photo photograph",
    )
)


@lru_cache(maxsize=1 << 17)
def content_words(text: str) -> frozenset[str]:
    """The words of a text that say what is in the picture, in lower case."""
    return frozenset(_WORD.findall(text.lower())) - _FUNCTION_WORDS


def likely_false(said: Sequence[str], told: Sequence[Sequence[str]]) -> float:
    """The share of a batch's negatives that are likely false, between 0 and 1; 0 where there is one example.

    said[n]: the caption that stands for image n; told[n]: all captions of image n. The negative (caption n, image m)
    is likely false when every content word of the caption is in some caption of the image. Word order and synonyms
    are not seen, so that it errs both ways; it is for comparing batches.
    """
    n = len(said)
    if n < 2:
        return 0.0
    asked = [content_words(text) for text in said]
    known = [frozenset().union(*map(content_words, texts)) for texts in told]
    column = {
        word: k for k, word in enumerate(frozenset().union(*asked))
    }  # words that no caption asks for do not count
    found = (_matrix(asked, column) @ _matrix(known, column).T).tocoo()  # [n, n]: words of each caption that are known
    sizes = np.array([len(words) for words in asked])
    true = (found.row != found.col) & (found.data == sizes[found.row])
    say_nothing = int((sizes == 0).sum()) * (n - 1)  # and so are true of all
    return (int(true.sum()) + say_nothing) / (n * (n - 1))


def _matrix(sets: Sequence[frozenset[str]], column: dict[str, int]) -> csr_array:
    """A row a set, a column a word."""
    kept = [[column[word] for word in each if word in column] for each in sets]
    ends = np.cumsum([0, *map(len, kept)])
    words = np.fromiter((k for each in kept for k in each), np.int64, ends[-1])
    return csr_array((np.ones(len(words), np.int32), words, ends), shape=(len(sets), len(column)))
