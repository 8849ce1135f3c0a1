"""Which classes are taken for which: the pretrained model's table, a finetuned one's, and what changed."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from pc_clip.report.page.gather import Found
from pc_clip.report.page.summary import Block, Summary

LARGEST_MAP = 30  # classes; a larger table is given as the pairs that changed most
LISTED = 10
SMALLEST = 0.005  # half a point; less is not shown as a change


@dataclass(frozen=True)
class Change:
    """The share of the images of class `true` that are taken for `guessed`, before and after. Fractions."""

    true: str
    guessed: str
    before: float
    after: float


@dataclass(frozen=True)
class Comparison:
    """before and after: [true, guessed] shares of each true class, NaN rows for classes without images.

    after is None when there is nothing but the pretrained model. seeds: results summed, before and after.
    """

    question: str
    classes: list[str]
    before: np.ndarray
    after: np.ndarray | None
    seeds: tuple[int, int]

    @property
    def drawn(self) -> bool:
        return len(self.classes) <= LARGEST_MAP

    def changes(self, most: int = LISTED) -> list[Change]:
        """Pairs of a true and a guessed class, right answers among them, by how much their share changed."""
        if self.after is None:
            return []
        size = np.nan_to_num(np.abs(self.after - self.before))
        order = np.argsort(-size, axis=None, kind="stable")[:most]
        places = [divmod(int(k), len(self.classes)) for k in order]
        return [
            Change(self.classes[a], self.classes[b], float(self.before[a, b]), float(self.after[a, b]))
            for a, b in places
            if size[a, b] >= SMALLEST
        ]


def comparisons(summary: Summary, block: Block) -> dict[str, list[Comparison]]:
    """Variant -> a comparison a question. With the baseline alone, its own tables under its name."""
    found: dict[str, list[Comparison]] = {}
    tuned = [name for name in block.results if not summary.variant(name).baseline]
    for name in tuned or list(block.results):
        before = summary.before(block, name)
        compared = [_compare(block, question, before, name) for question in _questions(block.results[name][0])]
        found[name] = [comparison for comparison in compared if comparison is not None]
    return {name: compared for name, compared in found.items() if compared}


def _compare(block: Block, question: str, before: str | None, name: str) -> Comparison | None:
    second = _table(block.results[name], question)
    if second is None:
        return None
    if before is None:
        return Comparison(question, second[0], second[1], None, (second[2], 0))
    first = _table(block.results[before], question)
    if first is None or first[0] != second[0]:
        return None
    return Comparison(question, second[0], first[1], second[1], (first[2], second[2]))


def _questions(result: Found) -> dict[str, dict[str, Any]]:
    details = result.content.get("details")
    return {q: d for q, d in details.items() if isinstance(d, dict)} if isinstance(details, dict) else {}


def _table(results: list[Found], question: str) -> tuple[list[str], np.ndarray, int] | None:
    """Classes, shares [true, guessed] summed over the seeds, and how many there are; None without a table."""
    total, classes = None, None
    for result in results:
        detail = _questions(result).get(question, {})
        names, counts = detail.get("classes"), detail.get("confusion")
        if not isinstance(names, list) or not isinstance(counts, list) or (classes not in (None, names)):
            return None
        try:
            table = np.asarray(counts, dtype=np.float64)
        except (TypeError, ValueError):
            return None
        if table.shape != (len(names),) * 2 or not len(names) or not np.isfinite(table).all() or (table < 0).any():
            return None
        total, classes = table if total is None else total + table, names
    rows = total.sum(1, keepdims=True)
    shares = np.divide(total, rows, out=np.full_like(total, math.nan), where=rows > 0)
    return [str(name) for name in classes], shares, len(results)
