"""Does a pair of images find the sentences on its change? R@k of CLIP4IDC's first stage, both ways.

p2s: a pair has to find any one of its sentences among all distinct sentences. s2p: a sentence has to find any one of
its pairs. A text that is said of several pairs ("nothing changed") is one sentence that is right for all
of them, and is asked about once. Where a data set lists the same two images more than once, all their sentences are
right each time. Baselines: chance, and subtraction, the untrained model's embedding of the image after, less that of
the image before.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F

from pc_clip.core.config.evaluate import EvaluateConfig
from pc_clip.core.errors import UserError
from pc_clip.data import pairs
from pc_clip.data.dataset import Change, Dataset
from pc_clip.evals import EvalContext, Result
from pc_clip.metrics import intervals
from pc_clip.metrics.retrieval import PAIR_KS, both_ways, chance, per_pair, relation
from pc_clip.models.change_model import ChangeModel, change_of

COMPARED = ("p2s_r1", "s2p_r1")  # kept pair by pair, to compare models by
LACKING = "a data set with changes (example_changes, clevr_change, spot_the_diff, image_editing_request, changes)"


def applies(data: Dataset, config: EvaluateConfig) -> str | None:
    return None if data.changes else LACKING


def change_model(context: EvalContext) -> ChangeModel:
    """Raises UserError for weights that cannot read pairs."""
    change = change_of(context.clip)
    if change is None:
        raise UserError(f"{context.clip.describe()} has no pair encoder; finetune.py --method change trains one")
    return change


def evaluate(context: EvalContext) -> Result:
    """R@k of all pairs and of each kind of change, chance, and subtraction; intervals draw pairs again.

    Raises UserError for fewer than two pairs, and a model without a pair encoder.
    """
    change_model(context)
    data, config = context.data, context.config
    if len(data.changes) < 2:
        raise UserError(f"{data.label} has one pair; retrieval needs two")
    texts, belongs = pairs.distinct_sentences(data.changes)
    matches = relation(belongs, len(texts))
    z = pairs.embed_pairs(context.clip, data, batch_size=config.batch_size, workers=config.workers)
    ways = {"": (z, context.clip.embed_texts(texts))}
    if context.base is not None:
        before, after = torch.from_numpy(pairs.pair_rows(data)).T
        subtracted = F.normalize(context.base_z[after] - context.base_z[before], dim=-1)
        ways["subtraction_"] = (subtracted, context.base.embed_texts(texts))
    hits, queries, tied = {}, {}, {}
    for prefix, (of_pairs, of_texts) in ways.items():
        ranks = both_ways(of_pairs, of_texts, matches)
        tied |= {f"{prefix}{way}": each.tied for way, each in ranks.items()}
        for known, values in zip((hits, queries), per_pair(ranks, matches)):
            known |= {f"{prefix}{metric}": each for metric, each in values.items()}
    for kind, here in rows_by_kind(data.changes).items():  # p2s alone: a sentence may be of several kinds
        for k in (k for k in PAIR_KS if f"p2s_r{k}" in hits and not here.all()):
            hits[f"p2s_{kind}_r{k}"], queries[f"p2s_{kind}_r{k}"] = hits[f"p2s_r{k}"] * here, here.astype(float)
    metrics = {name: float(hits[name].sum() / queries[name].sum()) for name in hits} | chance(matches)
    details = {"pairs": len(z), "sentences": len(texts), "tied": tied}
    items = {name: (hits[name] / queries[name].mean()).round(4).tolist() for name in COMPARED if name in hits}
    known = intervals.of_ratios(hits, queries, config.seed)
    return Result(metrics, len(z), details, intervals=known, items=items)


def rows_by_kind(changes: Sequence[Change]) -> dict[str, np.ndarray]:
    """Which of N changes are of each kind, by the kind's name in metrics; without a name in none.  -> [N] bool"""
    kinds = np.array(["_".join(change.kind.lower().split()) for change in changes])
    return {str(kind): kinds == kind for kind in np.unique(kinds) if kind}
