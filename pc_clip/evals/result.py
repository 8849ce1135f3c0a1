"""What an evaluation gives: figures with intervals, and curves and pictures for the report."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

from PIL import Image


class Curve(NamedTuple):
    """Figures over a setting: series name -> [(x, y), ...]. `marked` is the x that was chosen, if one was."""

    title: str
    x: str
    y: str
    series: dict[str, list[tuple[float, float]]]
    marked: float | None = None


class Picture(NamedTuple):
    """A picture, and its description in words."""

    image: Image.Image
    alt: str


@dataclass
class Result:
    """The outcome of an evaluation.

    metrics: fractions by name; n: the number of items they are over; intervals: metric -> its 95 % interval; details:
    explanations; curves, and pictures by file name; items: metric -> one number an item, in the data set's order,
    whose mean is the metric but for rounding, to compare two checkpoints item by item. It is a share, or a score like
    CIDEr; where items have unequally many queries, the share times this item's count over the mean count.
    """

    metrics: dict[str, float]
    n: int
    details: dict[str, Any] = field(default_factory=dict)
    pictures: dict[str, Picture] = field(default_factory=dict)
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict)
    curves: list[Curve] = field(default_factory=list)
    items: dict[str, list[float]] = field(default_factory=dict)
