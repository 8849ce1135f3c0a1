"""Image retrieval with a relative caption: CIRR (Liu et al. 2021), FashionIQ (Wu et al. 2021).

The query is unit(z(reference) + alpha * enc(caption)), the arithmetic that difference sentences are trained for. All
images of the data set but the reference are candidates. Alpha is chosen on one half of the reference images and
reported on the other, either way round.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pc_clip.core.config.evaluate import EvaluateConfig
from pc_clip.core.errors import UserError
from pc_clip.core.random import stream
from pc_clip.data.dataset import Dataset
from pc_clip.data.groups import Relative, form_of, with_images
from pc_clip.data.views import ImageIds
from pc_clip.evals import EvalContext, Result
from pc_clip.metrics import intervals

KS = (1, 5, 10, 50)
SUBSET_KS = (1, 2, 3)  # of CIRR's six images


def applies(data: Dataset, config: EvaluateConfig) -> str | None:
    if config.statements and form_of(config.statements) is Relative:
        return None
    return "CIRR's or FashionIQ's captions as --statements, and a data set with their images (folder)"


def evaluate(context: EvalContext) -> Result:
    """R@k of the sum, of the caption alone (caption_r) and of the reference alone (reference_r), with intervals.

    A k not below the number of candidates is left out. A target gets the middle of tied ranks. subset_rK:
    among CIRR's five other images of the reference's set, where all of them are there; alpha as for the whole.
    Raises UserError where of no query both images are there, and for fewer than two reference images.
    """
    queries, rows = with_images(context.statements, ("reference", "target"), context.data)
    reference, target = rows.T
    texts = context.clip.embed_texts([query.caption for query in queries])
    first_half = _halves(reference, context.config.seed)
    alphas = sorted({0.0, *context.config.relative.alphas})
    ranks = {alpha: _ranks(context.z, context.z[reference] + alpha * texts, reference, target) for alpha in alphas}
    chosen = {}
    rank = np.empty(len(queries))
    for half in (False, True):
        chosen[half] = max(alphas, key=lambda alpha: (np.mean(_recall(ranks[alpha][first_half != half])), -alpha))
        rank[first_half == half] = ranks[chosen[half]][first_half == half]
    ways = {"": rank, "caption_": _ranks(context.z, texts, reference, target), "reference_": ranks[0.0]}
    known_ks = [k for k in KS if k < len(context.data) - 1]
    shares = {f"{way}r{k}": (of_way <= k).astype(float) for way, of_way in ways.items() for k in known_ks}
    alpha = np.where(first_half, chosen[True], chosen[False])
    subset = _subset_recall(context, queries, texts, torch.from_numpy(alpha), reference, target)
    shares |= subset
    metrics, known = intervals.of_columns(shares, np.unique(reference, return_inverse=True)[1], context.config.seed)
    details = {
        "queries": len(queries),
        "absent": len(context.statements) - len(queries),
        "candidates": len(context.data) - 1,
    }
    details["alpha"] = {"chosen on the second half": chosen[True], "chosen on the first half": chosen[False]}
    if subset:
        details["subset_queries"] = int(np.isfinite(subset["subset_r1"]).sum())  # whose set is complete
    details["median_rank"] = float(np.median(rank))
    return Result(metrics, len(queries), details, intervals=known)


def _subset_recall(
    context: EvalContext,
    queries: list[Relative],
    texts: Tensor,
    alpha: Tensor,
    reference: np.ndarray,
    target: np.ndarray,
) -> dict[str, np.ndarray]:
    """Hits among the images of CIRR's sets, of the sum and of the caption alone; NaN without a complete set."""
    ids = ImageIds(context.data.ids, context.data.label)
    rows = [[ids.find(name) for name in query.members] for query in queries]
    complete = np.array([bool(each) and None not in each for each in rows])
    if not complete.any():
        return {}
    among = torch.zeros(len(queries), len(context.data), dtype=torch.bool)
    for n in np.flatnonzero(complete):
        among[n, rows[n]] = True
    sums = context.z[reference] + alpha[:, None].to(texts) * texts
    ways = {
        "": _ranks(context.z, sums, reference, target, among),
        "caption_": _ranks(context.z, texts, reference, target, among),
    }
    return {f"{way}subset_r{k}": np.where(complete, rank <= k, np.nan) for way, rank in ways.items() for k in SUBSET_KS}


def _halves(reference: np.ndarray, seed: int) -> np.ndarray:
    """Which queries are of the first half of the reference images, drawn by seed.  [M] -> [M] bool"""
    images, place = np.unique(reference, return_inverse=True)
    if len(images) < 2:
        raise UserError("alpha is chosen on other reference images than it is reported on, and there is only one")
    return (stream(seed, "relative halves").permutation(len(images)) < len(images) // 2)[place]


def _recall(ranks: np.ndarray) -> list[float]:
    return [float((ranks <= k).mean()) for k in KS]


def _ranks(
    z: Tensor, queries: Tensor, reference: np.ndarray, target: np.ndarray, among: Tensor | None = None
) -> np.ndarray:
    """The rank of each target among all images but the query's reference, from 1.  -> [M] float64

    among: [M, N] bool, the candidates of each query; all images when not given.
    """
    queries, ranks = F.normalize(queries, dim=-1), []
    for rows in torch.arange(len(queries)).split(1024):
        cosines = queries[rows] @ z.T  # [B, N]
        own = cosines.gather(1, torch.from_numpy(target)[rows, None])
        if among is not None:
            cosines.masked_fill_(~among[rows], -torch.inf)
        cosines.scatter_(1, torch.from_numpy(reference)[rows, None], -torch.inf)
        ranks.append(1 + (cosines > own).sum(1) + ((cosines == own).sum(1) - 1).clamp(min=0) / 2)
    return torch.cat(ranks).double().numpy()
