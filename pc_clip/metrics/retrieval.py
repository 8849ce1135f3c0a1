"""Ranks and R@k: of images and captions by two definitions, and of pairs of images and sentences on their change."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from scipy.sparse import csr_array
from torch import Tensor

KS = (1, 5, 10, 20, 50, 200)
PAIR_KS = (1, 5, 10)
AT_ONCE = 2**23  # cosines held at once: 32 MB, and 240 MB in all while they are compared


class Ranks(NamedTuple):
    """Ranks from 1 of the best right item, each [Q]: the first and the last that ties allow."""

    first: np.ndarray
    last: np.ndarray

    @property
    def middle(self) -> np.ndarray:
        return (self.first + self.last) / 2

    @property
    def tied(self) -> float:
        """The share of queries whose best right item ties with a wrong one."""
        return float((self.first < self.last).mean())

    def hits(self, k: int) -> np.ndarray:
        """Hits at k, between 0 and 1.  -> [Q] float64

        Without a tie, 1 when the rank is at most k. With one, the middle rank has to be; and where k cuts through the
        tie, only its share within k counts: a model that tells nothing apart is never above chance.
        """
        share = (k + 1 - self.first) / (self.last + 1 - self.first)
        return np.where(self.middle <= k, np.minimum(share, 1.0), 0.0)


def ranks(queries: Tensor, items: Tensor, right: csr_array, at_once: int = AT_ONCE) -> Ranks:
    """The rank of each query's best right item. Other right items do not count against it.

    queries: [Q, D], items: [N, D], unit vectors; right: [Q, N] bool, one or more a query. Equal items have equal
    cosines, because distinct ones alone are multiplied: a product's last digit may depend on its place in the matrix.
    At most at_once cosines are held.
    """
    distinct, place = torch.unique(items, dim=0, return_inverse=True)
    open_ranks, block = np.empty((2, len(queries)), dtype=np.int64), max(1, at_once // len(items))
    for start in range(0, len(queries), block):
        rows = slice(start, start + block)
        cosine = (queries[rows] @ distinct.T)[:, place]
        own = torch.from_numpy(right[rows].toarray())
        best = cosine.masked_fill(~own, -torch.inf).amax(1, keepdim=True)
        first = 1 + (cosine > best).sum(1)
        open_ranks[:, rows] = torch.stack([first, first + ((cosine == best) & ~own).sum(1)])
    return Ranks(*open_ranks)


def relation(belongs: Sequence[Sequence[int]], items: int) -> csr_array:
    """Which of some items belong to each of N things, from lists of their numbers.  -> [N, items] bool"""
    ends = np.cumsum([0, *map(len, belongs)])
    each = np.concatenate([np.asarray(numbers, dtype=np.int64) for numbers in belongs])
    return csr_array((np.ones(len(each), dtype=bool), each, ends), shape=(len(belongs), items))


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
    of_text, own = relation(owner[:, None], len(images)), relation(every[:, None], len(images))
    t2i, of_image = ranks(texts, images, of_text), of_text.T.tocsr()
    turns = [first + turn for turn in range(counts.min())]  # [N] a caption of each image
    by_turn = [ranks(images, texts[torch.from_numpy(turn)], own) for turn in turns]
    same = np.concatenate(turns)  # against N images a caption is searched as in t2i
    return {
        "t2i": Family(t2i, owner, len(images)),
        "i2t": Family(ranks(images, texts, of_image), every, len(texts)),
        "paired_t2i": Family(Ranks(t2i.first[same], t2i.last[same]), owner[same], len(images)),
        "paired_i2t": Family(Ranks(*map(np.concatenate, zip(*by_turn))), np.tile(every, len(turns)), len(images)),
        "centred_i2t": Family(ranks(images - images.mean(0), texts, of_image), every, len(texts)),
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
    matches = relation(belongs, len(sentences))
    hits, asked = per_pair(both_ways(pairs, sentences, matches), matches)
    return {name: float(hits[name].sum() / asked[name].sum()) for name in hits}


def both_ways(pairs: Tensor, sentences: Tensor, matches: csr_array) -> dict[str, Ranks]:
    """Ranks of each pair's best sentence, p2s [N], and of each sentence's best pair, s2p [M]. matches: [N, M] bool"""
    return {"p2s": ranks(pairs, sentences, matches), "s2p": ranks(sentences, pairs, matches.T.tocsr())}


def per_pair(by_way: dict[str, Ranks], matches: csr_array) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Each pair's hits and its number of queries, by metric: the metric is one sum over the other.  -> [N] each

    matches: [N, M] bool. A sentence is one query, shared equally by its pairs.
    """
    pairs, sentences = matches.shape
    of_sentence, hits, asked = matches.sum(axis=0), {}, {}
    for k in PAIR_KS:
        if k < sentences:
            hits[f"p2s_r{k}"], asked[f"p2s_r{k}"] = by_way["p2s"].hits(k), np.ones(pairs)
        if k < pairs:
            hits[f"s2p_r{k}"] = matches @ (by_way["s2p"].hits(k) / of_sentence)
            asked[f"s2p_r{k}"] = matches @ (1 / of_sentence)
    return hits, asked


def chance(matches: csr_array) -> dict[str, float]:
    """R@k of a random order, by metric: a query with R right answers among M misses k times. matches: [N, M] bool"""
    pairs, sentences = matches.shape
    by_chance = {}
    for k in PAIR_KS:
        for name, right, candidates in (("p2s", matches.sum(axis=1), sentences), ("s2p", matches.sum(axis=0), pairs)):
            if k < candidates:
                missed = [np.clip(candidates - right - n, 0, None) / (candidates - n) for n in range(k)]
                by_chance[f"chance_{name}_r{k}"] = float(1 - np.prod(missed, axis=0).mean())
    return by_chance
