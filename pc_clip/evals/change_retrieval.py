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

from pc_clip.core.config.evaluate import EvaluateConfig
from pc_clip.core.errors import UserError
from pc_clip.data import pairs as apply
from pc_clip.data.dataset import Change, Dataset
from pc_clip.data.pairs import distinct_sentences
from pc_clip.evals import Result, Subject
from pc_clip.metrics import intervals as _intervals
from pc_clip.metrics.retrieval import PAIR_KS, TIES, both_ways, chance, per_pair
from pc_clip.models.change_model import change_of

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
    if change_of(subject.clip) is None:
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
        for k in (k for k in PAIR_KS if f"p2s_r{k}" in hits):
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
