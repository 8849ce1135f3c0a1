"""Ranks and R@k: of images and captions by two definitions, and of pairs of images and sentences on their change."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

KS = (1, 5, 10, 20, 50, 200)
PAIR_KS = (1, 5, 10)
AT_ONCE = 2**23  # cosines held at once: 32 MB, and 240 MB in all while they are compared
TIES = "A tie gets the middle of its ranks; where k cuts through it, a hit counts only by the share of it that fits."


class Search(NamedTuple):
    """candidates: [M] items to search; right: [Q, R] places among them of each query's answers, padded with -1."""

    candidates: np.ndarray
    right: np.ndarray


class Ranks(NamedTuple):
    """Ranks from 1 of the best right item, each [Q]: the first and the last that ties allow."""

    first: np.ndarray
    last: np.ndarray

    @property
    def middle(self) -> np.ndarray:
        return (self.first + self.last) / 2

    def hits(self, k: int) -> np.ndarray:
        """Hits at k, between 0 and 1.  -> [Q] float64

        Without a tie, 1 when the rank is at most k. With one, the middle rank has to be; and where k cuts through the
        tie, only its share within k counts: a model that tells nothing apart is never above chance.
        """
        share = (k + 1 - self.first) / (self.last + 1 - self.first)
        return np.where(self.middle <= k, np.minimum(share, 1.0), 0.0)


def ranks(
    queries: Tensor,
    items: Tensor,
    searches: Sequence[Search],
    at_once: int = AT_ONCE,
    less: Tensor | None = None,
) -> list[Ranks]:
    """The rank of each query's best right item, in each search. Other right items do not count against it.

    queries: [Q, D], items: [N, D], unit vectors. Equal items have equal cosines, because distinct ones alone are
    multiplied: a product's last digit may depend on its place in the matrix. At most at_once cosines are held.
    less: [D], subtracted from each query.
    """
    distinct, place = _distinct(items)
    queries = queries if less is None else queries - less
    columns = [place[torch.from_numpy(search.candidates)] for search in searches]
    right = [torch.from_numpy(search.right) for search in searches]
    open_ranks = np.empty((len(searches), 2, len(queries)), dtype=np.int64)
    block = max(1, at_once // len(items))
    for start in range(0, len(queries), block):
        rows = slice(start, start + block)
        cosine = queries[rows] @ distinct.T
        for n in range(len(searches)):
            open_ranks[n, :, rows] = _open_ranks(cosine[:, columns[n]], right[n][rows])
    return [Ranks(first, last) for first, last in open_ranks]


def _open_ranks(cosine: Tensor, right: Tensor) -> Tensor:
    """The first and last rank that ties leave to the best right item. [B, M], [B, R] -> [2, B]"""
    own = cosine.gather(1, right.clamp(min=0)).masked_fill(right < 0, -torch.inf)
    best = own.amax(1, keepdim=True)
    first = 1 + (cosine > best).sum(1, dtype=torch.int32)
    level = (cosine == best).sum(1, dtype=torch.int32) - (own == best).sum(1, dtype=torch.int32)
    return torch.stack([first, first + level])


def _distinct(z: Tensor) -> tuple[Tensor, Tensor]:
    """The distinct rows of [N, D], and the place of each row among them, [N]."""
    rows = np.ascontiguousarray((z + 0.0).numpy())  # + 0.0: zero has two signs
    whole = rows.view(np.dtype((np.void, rows.shape[1] * rows.itemsize))).ravel()
    _, first, place = np.unique(whole, return_index=True, return_inverse=True)
    return z[torch.from_numpy(first)], torch.from_numpy(place.reshape(-1))


# -- images and captions ------------------------------------------------------------------------------------


class Family(NamedTuple):
    """One definition's ranks. image: [Q] the image of each query; candidates: the number of items searched."""

    ranks: Ranks
    image: np.ndarray
    candidates: int


def families(images: Tensor, texts: Tensor, counts: np.ndarray) -> dict[str, Family]:
    """The ranks of all definitions. images: [N, D], texts: [sum(counts), D], counts: [N] captions an image."""
    first = np.cumsum(counts) - counts  # [N] each image's first caption
    every, owner = np.arange(len(counts)), np.repeat(np.arange(len(counts)), counts)
    places = np.arange(counts.max())
    pool = Search(np.arange(len(texts)), np.where(places < counts[:, None], first[:, None] + places, -1))
    turns = [Search(first + turn, every[:, None]) for turn in range(counts.min())]
    (t2i,) = ranks(texts, images, [Search(every, owner[:, None])])
    i2t, *by_turn = ranks(images, texts, [pool, *turns])
    (centred,) = ranks(images, texts, [pool], less=images.mean(0))
    same = np.concatenate([turn.candidates for turn in turns])  # against N images a caption is searched as in t2i
    return {
        "t2i": Family(t2i, owner, len(images)),
        "i2t": Family(i2t, every, len(texts)),
        "paired_t2i": Family(Ranks(t2i.first[same], t2i.last[same]), owner[same], len(images)),
        "paired_i2t": Family(Ranks(*map(np.concatenate, zip(*by_turn))), np.tile(every, len(turns)), len(images)),
        "centred_i2t": Family(centred, every, len(texts)),
    }


def per_image(by_name: dict[str, Family], images: int) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Each image's summed hits and its number of queries, by metric.  -> [images] each

    A k that is not smaller than the number of candidates is left out.
    """
    hits, queries = {}, {}
    for k in KS:
        for name, family in by_name.items():
            if k < family.candidates:
                hits[f"{name}_r{k}"] = np.bincount(family.image, family.ranks.hits(k), images)
                queries[f"{name}_r{k}"] = np.bincount(family.image, minlength=images)
    return hits, queries


# -- pairs of images and sentences ---------------------------------------------------------------------------


def recalls(pairs: Tensor, sentences: Tensor, belongs: Sequence[Sequence[int]]) -> dict[str, float]:
    """p2s_rK and s2p_rK, for those K that are smaller than the number of candidates.

    pairs: [N, D], sentences: [M, D], distinct ones, both unit vectors on the CPU; belongs: for each pair, its
    sentences.
    """
    hits, asked = per_pair(both_ways(pairs, sentences, belongs), belongs, {"p2s": len(sentences), "s2p": len(pairs)})
    return {name: float(hits[name].sum() / asked[name].sum()) for name in hits}


def both_ways(pairs: Tensor, sentences: Tensor, belongs: Sequence[Sequence[int]]) -> dict[str, Ranks]:
    """Ranks of each pair's best sentence, p2s [N], and of each sentence's best pair, s2p [M]."""
    return {
        "p2s": _ranks(pairs, sentences, belongs),
        "s2p": _ranks(sentences, pairs, _turned(belongs, len(sentences))),
    }


def per_pair(
    by_way: dict[str, Ranks], belongs: Sequence[Sequence[int]], candidates: dict[str, int]
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Each pair's hits and its number of queries, by metric: the metric is one sum over the other.  -> [N] each

    A sentence is one query, shared equally by its pairs.
    """
    owner = np.repeat(np.arange(len(belongs)), [len(each) for each in belongs])
    sentence = np.concatenate([np.asarray(each, dtype=np.int64) for each in belongs])
    part = 1 / np.bincount(sentence)[sentence]
    hits, asked = {}, {}
    for k in PAIR_KS:
        if k < candidates["p2s"]:
            hits[f"p2s_r{k}"], asked[f"p2s_r{k}"] = by_way["p2s"].hits(k), np.ones(len(belongs))
        if k < candidates["s2p"]:
            hits[f"s2p_r{k}"] = np.bincount(owner, part * by_way["s2p"].hits(k)[sentence], len(belongs))
            asked[f"s2p_r{k}"] = np.bincount(owner, part, len(belongs))
    return hits, asked


def chance(belongs: Sequence[Sequence[int]], sentences: int) -> dict[str, float]:
    """R@k of a random order, by metric: a query with R right answers among M misses k times in a row."""
    each = {
        "p2s": (np.array([len(each) for each in belongs]), sentences),
        "s2p": (np.array([len(each) for each in _turned(belongs, sentences)]), len(belongs)),
    }
    by_chance = {}
    for k in PAIR_KS:
        for name, (right, candidates) in each.items():
            if k < candidates:
                missed = [np.clip(candidates - right - n, 0, None) / (candidates - n) for n in range(k)]
                by_chance[f"chance_{name}_r{k}"] = float(1 - np.prod(missed, axis=0).mean())
    return by_chance


def _ranks(queries: Tensor, items: Tensor, answers: Sequence[Sequence[int]]) -> Ranks:
    """Queries with about as many answers go together: one that half of all items answer would make all rows as long."""
    each = np.array([len(each) for each in answers])
    size = np.ceil(np.log2(each)).astype(int)
    first, last = np.empty(len(each), dtype=np.int64), np.empty(len(each), dtype=np.int64)
    for group in np.unique(size):
        rows = np.flatnonzero(size == group)
        right = np.full((len(rows), each[rows].max()), -1)
        for line, row in zip(right, rows):
            line[: each[row]] = answers[row]
        (of_group,) = ranks(queries[torch.from_numpy(rows)], items, [Search(np.arange(len(items)), right)])
        first[rows], last[rows] = of_group
    return Ranks(first, last)


def _turned(belongs: Sequence[Sequence[int]], sentences: int) -> list[list[int]]:
    """For each sentence, the pairs it is said of."""
    owners: list[list[int]] = [[] for _ in range(sentences)]
    for pair, sentences_of_pair in enumerate(belongs):
        for sentence in sentences_of_pair:
            owners[sentence].append(pair)
    return owners
