"""Pairs of images, what is right of each, and the means: shared by the evaluations that ask about differences."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pc_clip.core.errors import UserError
from pc_clip.data.dataset import Attribute
from pc_clip.metrics import intervals

log = logging.getLogger(__name__)

CANDIDATES = 100  # of which one pair is a sentence's own, for difference_r1


class Answers(NamedTuple):
    """Which figures were right for which pair. right: [P, K], pairs: [P, 2], draw: [P], names of length K."""

    names: list[str]
    right: np.ndarray
    pairs: np.ndarray
    draw: np.ndarray

    @classmethod
    def of(cls, right: dict[str, Tensor], pairs: np.ndarray, draw: np.ndarray) -> Answers:
        return cls(list(right), torch.stack([each.double() for each in right.values()], dim=1).numpy(), pairs, draw)

    def by_draw(self) -> np.ndarray:
        """[draws, K], each figure over the pairs it is defined on."""
        return np.stack([np.nanmean(self.right[self.draw == d], axis=0) for d in np.unique(self.draw)])


def draw_pairs(attribute: Attribute, n: int, rng: np.random.Generator, tries: int = 200) -> np.ndarray:
    """n pairs of images that clearly differ in an attribute, with replacement, in random order.  -> [n, 2]

    Fewer when hardly any pair differs. Raises UserError when none does.
    """
    rows = np.flatnonzero(~np.isnan(attribute.value))
    value = attribute.value[rows]
    if len(rows) < 2 or value.max() - value.min() <= attribute.gap:
        raise UserError(f"no two of the images differ in {attribute.name}; it is known of {len(rows)} images")
    pairs = np.empty((0, 2), dtype=rows.dtype)
    for _ in range(tries):
        drawn = rng.choice(rows, size=(8 * n, 2))
        clear = np.abs(attribute.value[drawn[:, 0]] - attribute.value[drawn[:, 1]]) > attribute.gap
        pairs = np.concatenate([pairs, drawn[clear]])
        if len(pairs) >= n:
            break
    return pairs[:n]


def by_task(attributes: Sequence[Attribute], values: Sequence[Any]) -> dict[str, list[Any]]:
    """Group values by the attributes' tasks; an attribute without a task is its own group."""
    groups: dict[str, list[Any]] = {}
    for attribute, value in zip(attributes, values):
        groups.setdefault(attribute.task or attribute.name, []).append(value)
    return groups


def interval_of(groups: Sequence[Sequence[Answers]]) -> list[tuple[float, float]]:
    """Intervals of the figures' means; groups count equally, and attributes within a group."""
    answers = [(each, 1 / len(group) / len(each.pairs)) for group in groups for each in group]
    weight = np.concatenate([np.full(len(each.pairs), share) for each, share in answers])
    right, pairs = (np.concatenate([getattr(each, name) for each, _ in answers]) for name in ("right", "pairs"))
    return intervals.of_pairs(right, pairs, weight)


def recall_at_1(text: Tensor, gaps: Tensor, pairs: np.ndarray | None = None, candidates: int = CANDIDATES) -> float:
    """How often a sentence's own pair is the nearest of `candidates` pairs. text, gaps: [P, D] unit vectors.

    pairs: [P, 2], where several sentences are about one pair, which then is right wherever it stands.
    Over disjoint blocks; a rest smaller than a block is left out unless it is all there is (`warn_of_rest`).
    A tie for the first place among k counts 1/k.
    """
    number = np.arange(len(text)) if pairs is None else np.unique(pairs, axis=0, return_inverse=True)[1].reshape(-1)
    block = min(candidates, len(text))
    hits = []
    for start in range(0, len(text) - block + 1, block):
        cosine = text[start : start + block] @ gaps[start : start + block].T  # [sentence, pair]
        best, of_block = cosine == cosine.max(1, keepdim=True).values, torch.from_numpy(number[start : start + block])
        own = of_block[:, None] == of_block
        hits.append((best & own).sum(1).double() / best.sum(1))
    return float(torch.cat(hits).mean())


def warn_of_rest(n: int) -> None:
    """Log what recall_at_1 cannot do with n pairs: ask among as many as its name says, or use all of them."""
    if n < CANDIDATES:
        log.warning("  R@1 is among %d pairs, not %d, and compares with no figure among %d", n, CANDIDATES, CANDIDATES)
    elif rest := n % CANDIDATES:
        log.info("  R@1 is over blocks of %d pairs; the last %d of %d are left out of it", CANDIDATES, rest, n)


def pair_differences(z: Tensor, pairs: np.ndarray) -> Tensor:
    """Unit differences of rows of z: [N, D], [P, 2] -> [P, D]. Zero where two rows are equal."""
    return F.normalize(z[torch.from_numpy(pairs[:, 0])] - z[torch.from_numpy(pairs[:, 1])], dim=-1)
