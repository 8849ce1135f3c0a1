"""What is said of how one image became another: pairs of images with sentences."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Change:
    """Two images and what is said of how the second differs from the first.

    before, after: ids of images of a data set. sentences: one or more, each says it all. kind: of change, as the data
    set names it ("colour", "none"); empty where it does not say.
    """

    before: str
    after: str
    sentences: tuple[str, ...]
    kind: str = ""
