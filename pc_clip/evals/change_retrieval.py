"""Does a pair of images find what is said of its change? R@k of CLIP4IDC's first stage, both ways.

p2s: a pair has to find any one of its sentences among all distinct sentences. s2p: a sentence has to find any one of
the pairs it is said of. A text that is said of several pairs ("nothing changed") is one sentence that is right for all
of them, and is asked about once. Where a data set lists the same two images more than once, all that is said of them is
right each time: they look alike, so that none is a wrong answer to another's sentence. Beside R@k stands what chance
gives, and what the untrained model gets by subtraction: the embedding of the image after, less that of the image
before.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pc_clip.change import apply
from pc_clip.changes import Change
from pc_clip.config import EvaluateConfig
from pc_clip.datasets import Dataset
from pc_clip.errors import UserError
from pc_clip.evals import Result, Subject, _intervals
from pc_clip.evals.retrieve import TIES, Ranks, Search, ranks

KS = (1, 5, 10)
COMPARED = ("p2s_r1", "s2p_r1")  # kept pair by pair, to compare models by

DEFINITIONS = {
    "p2s": "A pair has to find any one of its sentences among all distinct sentences of the split.",
    "s2p": "A distinct sentence has to find any one of the pairs it is said of, among all pairs.",
    "chance": "The same by an order drawn at random.",
    "subtraction": "As p2s and s2p, by the untrained model: the image after less the image before, and its text tower.",
}

NEEDS = "a data set with changes (example_changes, clevr_change, spot_the_diff, image_editing_request, changes)"


def applies(data: Dataset, config: EvaluateConfig) -> bool:
    return bool(data.changes)


def lacks(subject: Subject) -> str | None:
    """Why these weights cannot read pairs; None when they can."""
    if subject.clip.change is None:
        return f"{subject.clip.describe()} has no pair encoder; finetune.py --method change trains one"
    return None


def evaluate(subject: Subject) -> Result:
    """R@k of all pairs and of each kind of change, chance, and subtraction; intervals draw pairs again.

    Raises UserError for fewer than two pairs, a model without a pair encoder, and embeddings that are not finite.
    """
    if why := lacks(subject):
        raise UserError(why)
    data, config = subject.data, subject.config
    if len(data.changes) < 2:
        raise UserError(f"{data.label} has one pair; retrieval needs two")
    texts, belongs = distinct_sentences(data.changes)
    pairs = apply.embed_pairs(subject.clip, data, batch_size=config.batch_size, workers=config.workers)
    ways = {"": (pairs, subject.clip.embed_texts(texts))}
    if subject.base is not None:
        ways["subtraction_"] = (_subtracted(subject), subject.base.embed_texts(texts))
    hits, asked, tied = {}, {}, {}
    for name, (z, sentences) in ways.items():
        _check_finite(data, pairs=z, sentences=sentences)
        found = both_ways(z, sentences, belongs)
        tied |= {f"{name}{way}": float((of.first < of.last).mean()) for way, of in found.items()}
        of_pairs, queries = per_pair(found, belongs, {"p2s": len(texts), "s2p": len(pairs)})
        hits |= {f"{name}{metric}": values for metric, values in of_pairs.items()}
        asked |= {f"{name}{metric}": values for metric, values in queries.items()}
    hits, asked = _with_kinds(hits, asked, rows_by_kind(data.changes))
    metrics = {name: float(hits[name].sum() / asked[name].sum()) for name in hits} | chance(belongs, len(texts))
    details = {"pairs": len(pairs), "sentences": len(texts), "definitions": DEFINITIONS, "ties": TIES, "tied": tied}
    items = {name: (hits[name] / asked[name].mean()).round(4).tolist() for name in COMPARED if name in hits}
    return Result(metrics, len(pairs), details, intervals=_redrawn(hits, asked, config.seed), items=items)


def distinct_sentences(changes: Sequence[Change]) -> tuple[list[str], list[list[int]]]:
    """The M distinct sentences of N changes, and for each change which of them are said of its two images."""
    place: dict[str, int] = {}
    said: dict[tuple[str, str], set[int]] = {}
    for change in changes:
        of_pair = said.setdefault((change.before, change.after), set())
        of_pair |= {place.setdefault(text, len(place)) for text in change.sentences}
    return list(place), [sorted(said[change.before, change.after]) for change in changes]


def recalls(pairs: Tensor, sentences: Tensor, belongs: Sequence[Sequence[int]]) -> dict[str, float]:
    """p2s_rK and s2p_rK, for those K that are smaller than what is searched.

    pairs: [N, D], sentences: [M, D], distinct ones, both unit vectors on the CPU; belongs: for each pair, which
    sentences are said of it.
    """
    found = both_ways(pairs, sentences, belongs)
    hits, asked = per_pair(found, belongs, {"p2s": len(sentences), "s2p": len(pairs)})
    return {name: float(hits[name].sum() / asked[name].sum()) for name in hits}


def both_ways(pairs: Tensor, sentences: Tensor, belongs: Sequence[Sequence[int]]) -> dict[str, Ranks]:
    """The rank of what answers best: of each pair's sentences, p2s [N], and of each sentence's pairs, s2p [M]."""
    return {
        "p2s": _ranks(pairs, sentences, belongs),
        "s2p": _ranks(sentences, pairs, _turned(belongs, len(sentences))),
    }


def per_pair(
    found: dict[str, Ranks], belongs: Sequence[Sequence[int]], candidates: dict[str, int]
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Each pair's hits and how many queries they are of, by metric: the metric is one sum over the other.  -> [N] each

    A sentence is one query, of which each of its pairs has an equal part.
    """
    owner = np.repeat(np.arange(len(belongs)), [len(of) for of in belongs])
    sentence = np.concatenate([np.asarray(of, dtype=np.int64) for of in belongs])
    part = 1 / np.bincount(sentence)[sentence]
    hits, asked = {}, {}
    for k in KS:
        if k < candidates["p2s"]:
            hits[f"p2s_r{k}"], asked[f"p2s_r{k}"] = found["p2s"].hits(k), np.ones(len(belongs))
        if k < candidates["s2p"]:
            hits[f"s2p_r{k}"] = np.bincount(owner, part * found["s2p"].hits(k)[sentence], len(belongs))
            asked[f"s2p_r{k}"] = np.bincount(owner, part, len(belongs))
    return hits, asked


def chance(belongs: Sequence[Sequence[int]], sentences: int) -> dict[str, float]:
    """What an order drawn at random gets, by metric: a query with R right answers among M misses k times in a row."""
    each = {
        "p2s": (np.array([len(of) for of in belongs]), sentences),
        "s2p": (np.array([len(of) for of in _turned(belongs, sentences)]), len(belongs)),
    }
    found = {}
    for k in KS:
        for name, (right, candidates) in each.items():
            if k < candidates:
                missed = [np.clip(candidates - right - n, 0, None) / (candidates - n) for n in range(k)]
                found[f"chance_{name}_r{k}"] = float(1 - np.prod(missed, axis=0).mean())
    return found


def _ranks(queries: Tensor, items: Tensor, answers: Sequence[Sequence[int]]) -> Ranks:
    """Queries with about as many answers go together: one that half of all items answer would make all rows as long."""
    each = np.array([len(of) for of in answers])
    size = np.ceil(np.log2(each)).astype(int)
    first, last = np.empty(len(each), dtype=np.int64), np.empty(len(each), dtype=np.int64)
    for group in np.unique(size):
        rows = np.flatnonzero(size == group)
        right = np.full((len(rows), each[rows].max()), -1)
        for line, row in zip(right, rows):
            line[: each[row]] = answers[row]
        (found,) = ranks(queries[torch.from_numpy(rows)], items, [Search(np.arange(len(items)), right)])
        first[rows], last[rows] = found
    return Ranks(first, last)


def _turned(belongs: Sequence[Sequence[int]], sentences: int) -> list[list[int]]:
    """For each sentence, the pairs it is said of."""
    owners: list[list[int]] = [[] for _ in range(sentences)]
    for pair, of in enumerate(belongs):
        for sentence in of:
            owners[sentence].append(pair)
    return owners


def _subtracted(subject: Subject) -> Tensor:
    """The untrained model's embedding of the image after less that of the image before.  -> [N, D] unit"""
    before, after = torch.from_numpy(apply.pair_rows(subject.data)).T
    return F.normalize(subject.base_z[after] - subject.base_z[before], dim=-1)


def rows_by_kind(changes: Sequence[Change]) -> dict[str, np.ndarray]:
    """Which of N changes are of each kind, by the kind's name in metrics; one that has none is in none.  -> [N] bool"""
    kinds = np.array(["_".join(change.kind.lower().split()) for change in changes])
    return {str(kind): kinds == kind for kind in np.unique(kinds) if kind}


def _with_kinds(
    hits: dict[str, np.ndarray], asked: dict[str, np.ndarray], kinds: dict[str, np.ndarray]
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """p2s of each kind of change beside the rest. A sentence may be of several kinds, so s2p has none."""
    for kind, of in kinds.items():
        if of.all():  # nothing beside it
            continue
        for k in (k for k in KS if f"p2s_r{k}" in hits):
            name = f"p2s_{kind}_r{k}"
            hits[name], asked[name] = hits[f"p2s_r{k}"] * of, asked[f"p2s_r{k}"] * of
    return hits, asked


def _redrawn(hits: dict[str, np.ndarray], asked: dict[str, np.ndarray], seed: int) -> dict[str, tuple[float, float]]:
    columns = np.column_stack([*hits.values(), *asked.values()])
    sums = _intervals.redrawn_sums(columns, np.arange(len(columns)), seed)
    hit, of = np.split(sums, 2, axis=1)
    shares = np.divide(hit, of, out=np.full_like(hit, np.nan), where=of > 0)
    return {name: _intervals.between(draws) for name, draws in zip(hits, shares.T)}


def _check_finite(data: Dataset, **embeddings: Tensor) -> None:
    for what, z in embeddings.items():
        if not torch.isfinite(z).all():
            raise UserError(f"embeddings of the {what} of {data.label} are not finite; the weights may have diverged")
