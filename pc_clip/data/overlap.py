"""Estimate the false-negative rate of a batch from content-word overlap."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from functools import lru_cache

# They say nothing of what is in the picture. Numbers and places ("two", "left") do, and so are not among them.
_FUNCTION_WORDS = (
    "a an the some any this that these those there it its his her their of in on at by to from with and or as is are "
    "was were be being been has have having who which while image picture photo photograph"
)


@lru_cache(maxsize=1 << 17)
def content_words(text: str) -> frozenset[str]:
    """The words of a text that say what is in the picture, in lower case."""
    return frozenset(re.findall(r"[a-z0-9]+", text.lower())) - {*_FUNCTION_WORDS.split()}


def false_negative_rate(captions: Sequence[str], captions_of: Sequence[Sequence[str]]) -> float:
    """The share of a batch's negatives that are likely false, between 0 and 1; 0 where there is one example.

    captions[n]: the caption drawn for image n; captions_of[n]: all captions of image n. The negative (caption n, image
    m) is likely false when every content word of the caption is in some caption of the image. Word order and synonyms
    are ignored, so it errs both ways; it is for comparing batches.
    """
    n = len(captions)
    if n < 2:
        return 0.0
    images_with: dict[str, set[int]] = defaultdict(set)
    for image, texts in enumerate(captions_of):
        for word in frozenset().union(*map(content_words, texts)):
            images_with[word].add(image)
    false, everywhere = 0, set(range(n))
    for image, text in enumerate(captions):
        with_word = sorted((images_with[word] for word in content_words(text)), key=len)  # none: true of all images
        false += len(set.intersection(*with_word or [everywhere]) - {image})
    return false / (n * (n - 1))
