"""Does the embedding of a difference sentence point along the difference of the two images?

PC-CLIP's difference classification (arXiv 2409.09721): is cos(text, z_i - z_j) > 0 for a sentence that is
true of (i, j)? That figure flatters, so its companions are always beside it: two_way (the true sentence
against its opposite), reversed (the same fact told of the second image first), unseen (a wording no writer
of ours uses, in either order) and caption_subtraction (two plain phrases and the untrained model, no
training at all). The wordings of all but the last two are also those of the rules writer.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pc_clip import differences
from pc_clip.config import EvaluateConfig
from pc_clip.datasets import Attribute, Dataset
from pc_clip.differences import UNSEEN, contrast, swap_roles
from pc_clip.evals import Result, Subject, mean

CANDIDATES = 100  # of which one pair is a sentence's own, for difference_r1

NEEDS = "a data set with graded attributes (example), or --differences FILE"


def applies(data: Dataset, config: EvaluateConfig) -> bool:
    return bool(data.attributes) or bool(config.differences)


def evaluate(subject: Subject) -> Result:
    """With --differences the sentences of that file, else the data set's own graded attributes."""
    return _of_file(subject) if subject.config.differences else _of_attributes(subject)


# -- graded attributes ---------------------------------------------------------------------------------


class Claims(NamedTuple):
    """True sentences about pairs. pairs: [P, 2] rows; texts of length P; up: [P], whether the first has more."""

    pairs: np.ndarray
    up: np.ndarray
    text: list[str]
    opposite: list[str]
    reversed: list[str]
    unseen: list[str]


def draw_claims(attribute: Attribute, n: int, seed: int) -> Claims:
    """Pairs that clearly differ in one attribute, in random order, each with sentences about it."""
    rng = np.random.default_rng(seed)
    rows = np.flatnonzero(~np.isnan(attribute.value))
    pairs = rng.choice(rows, size=(8 * n, 2))
    gap = attribute.value[pairs[:, 0]] - attribute.value[pairs[:, 1]]
    clear = np.abs(gap) > attribute.gap
    pairs, up = pairs[clear][:n], gap[clear][:n] > 0
    wording = 2 * rng.integers(2, size=len(pairs))  # even wordings tell of the first image first, odd ones do not
    said = [(attribute.more, attribute.less) if u else (attribute.less, attribute.more) for u in up]
    return Claims(
        pairs,
        up,
        [contrast(a, b, w) for (a, b), w in zip(said, wording)],
        [contrast(b, a, w) for (a, b), w in zip(said, wording)],
        [contrast(a, b, w + 1) for (a, b), w in zip(said, wording)],
        [UNSEEN[int(w) // 2].format(a=a, b=b) for (a, b), w in zip(said, wording)],
    )


def _of_attributes(subject: Subject) -> Result:
    details, total = {}, 0
    for k, attribute in enumerate(subject.data.attributes):
        claims = draw_claims(attribute, subject.config.n_pairs, seed=subject.config.seed + 1000 * k)
        gaps = pair_differences(subject.z, claims.pairs)  # [P, D]
        texts = {
            name: subject.clip.embed_texts(getattr(claims, name)) for name in ("text", "opposite", "reversed", "unseen")
        }
        cosine = {name: (z * gaps).sum(-1) for name, z in texts.items()}
        found = {
            "difference": share(cosine["text"] > 0),
            "two_way": share(cosine["text"] > cosine["opposite"]),
            "reversed": share(cosine["reversed"] > 0),
            "unseen": share(cosine["unseen"] > 0),
        }
        if subject.base is not None:
            high, low = subject.base.embed_texts([attribute.high, attribute.low])
            along = pair_differences(subject.base_z, claims.pairs) @ (high - low)
            found["caption_subtraction"] = share((along > 0) == torch.from_numpy(claims.up))
        details[attribute.name] = found | {"pairs": len(claims.pairs)}
        total += len(claims.pairs)
    names = [name for name in next(iter(details.values())) if name != "pairs"]
    metrics = {name: mean([d[name] for d in details.values()]) for name in names}
    by_attribute = {f"{name}_{a}": d[name] for a, d in details.items() for name in names}
    return Result(metrics | by_attribute, total, details)


# -- sentences of a file -------------------------------------------------------------------------------


def _of_file(subject: Subject) -> Result:
    """sign, two_way, mirrored and R@1 among 100 pairs, for held-out sentences of their own.

    mirrored: the sentence with first and second exchanged, on the pair in the other order. two_way and
    mirrored are over the sentences that name both images.
    """
    found = differences.read(subject.config.differences)
    pairs = differences.rows(found, subject.data.ids, subject.config.differences)
    gaps = pair_differences(subject.z, pairs)
    text = subject.clip.embed_texts([d.text for d in found])
    cosine = (text * gaps).sum(-1)
    metrics = {"sign": share(cosine > 0), "difference_r1": recall_at_1(text, gaps)}
    swapped = [(n, swap) for n, d in enumerate(found) if (swap := swap_roles(d.text))]
    if swapped:
        rows = torch.tensor([n for n, _ in swapped])
        against = (subject.clip.embed_texts([swap for _, swap in swapped]) * gaps[rows]).sum(-1)
        metrics["two_way"] = share(cosine[rows] > against)
        metrics["mirrored"] = share(against < 0)
    if subject.base is not None and subject.data.captions:
        z = subject.base.embed_texts([captions[0] for captions in subject.data.captions])
        along = pair_differences(subject.base_z, pairs) * pair_differences(z, pairs)
        metrics["caption_subtraction"] = share(along.sum(-1) > 0)
    return Result(metrics, len(found), {"sentences": subject.config.differences})


def recall_at_1(text: Tensor, gaps: Tensor, candidates: int = CANDIDATES) -> float:
    """How often a sentence's own pair is the nearest of `candidates` pairs. text, gaps: [P, D] unit vectors.

    Over disjoint blocks; a rest smaller than a block is left out unless it is all there is. A tie for the
    first place among k counts 1/k.
    """
    block = min(candidates, len(text))
    hits = []
    for start in range(0, len(text) - block + 1, block):
        cosine = text[start : start + block] @ gaps[start : start + block].T  # [sentence, pair]
        best = cosine == cosine.max(1, keepdim=True).values
        hits.append(best.diagonal().double() / best.sum(1))
    return float(torch.cat(hits).mean())


def pair_differences(z: Tensor, pairs: np.ndarray) -> Tensor:
    """Unit differences of rows of z: [N, D], [P, 2] -> [P, D]. Zero where two rows are equal."""
    return F.normalize(z[torch.from_numpy(pairs[:, 0])] - z[torch.from_numpy(pairs[:, 1])], dim=-1)


def share(correct: Tensor) -> float:
    return float(correct.double().mean())
