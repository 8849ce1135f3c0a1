"""What is said of an image, true or false, and what contradicts it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Statement:
    """A text about an image and another that contradicts it; `true` says which of the two holds.

    image: an id of a data set, as the file writes it. kind: what it is reported under: a relation ("left of"), or
    the file it came from. category: a group of kinds. box: left, top, right, bottom in pixels, where it is about a part
    of the image. instead: of ranking data, another image, which the text fits less; text and contradiction are then
    the same.
    """

    image: str
    text: str
    contradiction: str
    true: bool = True
    kind: str = ""
    category: str = ""
    box: tuple[int, int, int, int] | None = None
    instead: str = ""

    @property
    def preferred(self) -> str:
        return self.text if self.true else self.contradiction

    @property
    def rejected(self) -> str:
        return self.contradiction if self.true else self.text
