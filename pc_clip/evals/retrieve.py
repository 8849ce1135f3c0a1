"""Retrieval between images and their captions: R@k both ways, by two definitions that have names of their own.

t2i, i2t: all captions of all images in one pool, as CLIP_benchmark and most tables count. paired_t2i, paired_i2t: each
image with one caption, N against N, as SimCLIP counts; done for the first, second, ... captions in turn, as many as
every image has, and averaged, so that nothing is drawn at random. centred_i2t tells why i2t falls where it does.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pc_clip.config import EvaluateConfig
from pc_clip.datasets import Dataset
from pc_clip.errors import UserError
from pc_clip.evals import Result, Subject
from pc_clip.evals._intervals import DRAWS

KS = (1, 5, 10, 20, 50, 200)
VERSION = 2  # ties, and what is measured at all, are not as they were
COMPARED = ("t2i_r1", "i2t_r1", "paired_t2i_r1", "paired_i2t_r1")  # kept image by image, to compare models by
AT_ONCE = 2**23  # cosines held at once: 32 MB, and 240 MB in all while they are compared

DEFINITIONS = {
    "t2i": "Every caption has to find its image among all images (CLIP_benchmark's image_retrieval_recall).",
    "i2t": "An image has to find any one of its captions among all captions of all images (CLIP_benchmark's "
    "text_retrieval_recall).",
    "paired_t2i": "Each image with one caption, N against N: a caption has to find its image (SimCLIP's); the mean "
    "over the first, second, ... captions, as many as every image has.",
    "paired_i2t": "Each image with one caption, N against N: an image has to find its caption (SimCLIP's); the mean "
    "over the first, second, ... captions, as many as every image has.",
    "centred_i2t": "As i2t, but each caption's cosine is less its mean over all the images: what is left when no "
    "caption is close to everything. It looks at all images at once, so it explains i2t and does not replace it.",
}
TIES = "A tie gets the middle of its ranks; where k cuts through it, a hit counts only by the share of it that fits."

NEEDS = "a data set with captions (example, coco, a webdataset for retrieval)"


class Search(NamedTuple):
    """candidates: [M] the items to search; right: [Q, R] places among them of what answers each query, else -1."""

    candidates: np.ndarray
    right: np.ndarray


class Ranks(NamedTuple):
    """Ranks from 1 of what answers best, each [Q]: the first and the last that equal cosines leave open."""

    first: np.ndarray
    last: np.ndarray

    @property
    def middle(self) -> np.ndarray:
        return (self.first + self.last) / 2

    def hits(self, k: int) -> np.ndarray:
        """How far each query is a hit at k, between 0 and 1.  -> [Q] float64

        Without a tie, 1 when its rank is at most k. With one, the middle rank has to be; and where k cuts through the
        tie, only the share of it within k counts: a model that tells nothing apart is never above chance.
        """
        share = (k + 1 - self.first) / (self.last + 1 - self.first)
        return np.where(self.middle <= k, np.minimum(share, 1.0), 0.0)


class Family(NamedTuple):
    """One definition's answers. image: [Q] whose query it was; candidates: among how many each was searched."""

    ranks: Ranks
    image: np.ndarray
    candidates: int


def applies(data: Dataset, config: EvaluateConfig) -> bool:
    return bool(data.captions)


def evaluate(subject: Subject) -> Result:
    """R@k of both definitions, with intervals over images; median ranks, from 1, are in the details.

    Raises UserError for fewer than two images, one without a caption, and embeddings that are not finite.
    """
    data, captions = subject.data, subject.data.captions
    each = np.array([len(of) for of in captions])
    if len(each) < 2 or not each.all():
        lacking = f"; {data.ids[int(each.argmin())]} has no caption" if not each.all() else ""
        raise UserError(f"{data.label} has {len(each)} images{lacking}; retrieval needs two, and a caption of each")
    texts = subject.clip.embed_texts([caption for of in captions for caption in of])
    for what, z in (("images", subject.z), ("captions", texts)):
        if not torch.isfinite(z).all():
            raise UserError(f"embeddings of the {what} of {data.label} are not finite; the weights may have diverged")
    found = families(subject.z, texts, each)
    hits, queries = per_image(found, len(each))
    metrics = {name: float(hits[name].sum() / queries[name].sum()) for name in hits}
    details = {f"{name}_median_rank": float(np.median(family.ranks.middle)) for name, family in found.items()}
    details |= {"images": len(each), "captions": int(each.sum()), "captions_in_turn": int(each.min())}
    details |= {"definitions": DEFINITIONS, "ties": TIES} | _said_of(found)
    items = {name: (hits[name] / queries[name].mean()).round(4).tolist() for name in metrics if name in COMPARED}
    return Result(metrics, len(each), details, intervals=_intervals(hits, queries, subject.config.seed), items=items)


def families(images: Tensor, texts: Tensor, each: np.ndarray) -> dict[str, Family]:
    """The ranks of all definitions. images: [N, D], texts: [sum(each), D], each: [N] captions an image."""
    first = np.cumsum(each) - each  # [N] each image's first caption
    every, owner = np.arange(len(each)), np.repeat(np.arange(len(each)), each)
    places = np.arange(each.max())
    pool = Search(np.arange(len(texts)), np.where(places < each[:, None], first[:, None] + places, -1))
    turns = [Search(first + turn, every[:, None]) for turn in range(each.min())]
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


def ranks(
    queries: Tensor,
    items: Tensor,
    searches: Sequence[Search],
    at_once: int = AT_ONCE,
    less: Tensor | None = None,
) -> list[Ranks]:
    """The rank of each query's best right item, in each search. What is right never outranks other right items.

    queries: [Q, D], items: [N, D], unit vectors. Equal items have equal cosines, because distinct ones alone are
    multiplied: a product's last digit may depend on its place in the matrix. At most at_once cosines are held.
    less: [D], taken from each query, so that an item's score is less its cosine with it.
    """
    distinct, place = _distinct(items)
    queries = queries if less is None else queries - less
    columns = [place[torch.from_numpy(search.candidates)] for search in searches]
    right = [torch.from_numpy(search.right) for search in searches]
    found = np.empty((len(searches), 2, len(queries)), dtype=np.int64)
    block = max(1, at_once // len(items))
    for start in range(0, len(queries), block):
        rows = slice(start, start + block)
        cosine = queries[rows] @ distinct.T
        for n in range(len(searches)):
            found[n, :, rows] = _open_ranks(cosine[:, columns[n]], right[n][rows])
    return [Ranks(first, last) for first, last in found]


def per_image(found: dict[str, Family], images: int) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Hits of each image's queries, summed, and how many these are, by metric.  -> [images] each

    A k that is not smaller than the number of candidates says nothing and is left out.
    """
    hits, queries = {}, {}
    for k in KS:
        for name, family in found.items():
            if k < family.candidates:
                hits[f"{name}_r{k}"] = np.bincount(family.image, family.ranks.hits(k), images)
                queries[f"{name}_r{k}"] = np.bincount(family.image, minlength=images)
    return hits, queries


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
    _, kept, place = np.unique(whole, return_index=True, return_inverse=True)
    return z[torch.from_numpy(kept)], torch.from_numpy(place.reshape(-1))


def _intervals(
    hits: dict[str, np.ndarray], queries: dict[str, np.ndarray], seed: int
) -> dict[str, tuple[float, float]]:
    """Bootstrap 95 % intervals: images are drawn again, each with all its captions, which are not independent.

    A figure is a ratio of two sums over the drawn images, hits by queries. What they are searched in stays as it is.
    """
    hit, asked = np.stack(list(hits.values()), axis=1), np.stack(list(queries.values()), axis=1)  # [N, K]
    rng, share = np.random.default_rng(seed), np.full(len(hit), 1 / len(hit))
    drawn = (rng.multinomial(len(hit), share).astype(np.float64) for _ in range(DRAWS))
    low, high = np.quantile([(times @ hit) / (times @ asked) for times in drawn], [0.025, 0.975], axis=0)
    return {name: (float(a), float(b)) for name, a, b in zip(hits, low, high)}


def _said_of(found: dict[str, Family]) -> dict[str, dict[str, float | str]]:
    """The share of queries tied with a wrong answer; the figures that were left out, with the reason."""
    tied = {name: float((family.ranks.first < family.ranks.last).mean()) for name, family in found.items()}
    left_out = {
        f"{name}_r{k}": f"k is not smaller than the number of candidates, {family.candidates}"
        for name, family in found.items()
        for k in KS
        if k >= family.candidates
    }
    return {"tied": tied, "left_out": left_out}
