"""Negatives that are likely none: a caption that is just as true of another image of its batch, told by its words."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from scipy.sparse import csr_array

# They say nothing of what is in the picture. Numbers and places ("two", "left") do, and so are not among them.
_FUNCTION_WORDS = (
    "a an the some any this that these those there it its his her their of in on at by to from with and or as is are "
    "was were be being been has have having who which while image picture photo photograph"
)


@lru_cache(maxsize=1 << 17)
def content_words(text: str) -> frozenset[str]:
    """The words of a text that say what is in the picture, in lower case."""
    return frozenset(re.findall(r"[a-z0-9]+", text.lower())) - {*_FUNCTION_WORDS.split()}


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
    column = {word: k for k, word in enumerate(frozenset().union(*asked))}
    common = (_matrix(asked, column) @ _matrix(known, column).T).tocoo()  # [n, n]: words of caption n known of image m
    sizes = np.array([len(words) for words in asked])
    true = (common.row != common.col) & (common.data == sizes[common.row])
    say_nothing = int((sizes == 0).sum()) * (n - 1)  # and so are true of all
    return (int(true.sum()) + say_nothing) / (n * (n - 1))


def _matrix(sets: Sequence[frozenset[str]], column: dict[str, int]) -> csr_array:
    """A row a set, a column a word; words without a column do not count."""
    cells = [(row, column[word]) for row, words in enumerate(sets) for word in words if word in column]
    rows, columns = np.array(cells, dtype=np.int64).reshape(-1, 2).T
    return csr_array((np.ones(len(cells), np.int32), (rows, columns)), shape=(len(sets), len(column)))
