"""Retrieval between images and their captions: R@k both ways, by two definitions that have names of their own.

t2i, i2t: all captions of all images in one pool, as CLIP_benchmark and most tables count. paired_t2i, paired_i2t: each
image with one caption, N against N, as SimCLIP counts; done for the first, second, ... captions in turn, as many as
every image has, and averaged, so that nothing is drawn at random. centred_i2t tells why i2t falls where it does.
"""

from __future__ import annotations

import numpy as np
import torch

from pc_clip.core.config.evaluate import EvaluateConfig
from pc_clip.core.errors import UserError
from pc_clip.core.random import stream
from pc_clip.data.dataset import Dataset
from pc_clip.evals import Result, Subject
from pc_clip.metrics.intervals import DRAWS
from pc_clip.metrics.retrieval import KS, TIES, Family, families, per_image

VERSION = 2  # ties, and what is measured at all, are not as they were
COMPARED = ("t2i_r1", "i2t_r1", "paired_t2i_r1", "paired_i2t_r1")  # kept image by image, to compare models by

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

NEEDS = "a data set with captions (example, coco, a webdataset for retrieval)"


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


def _intervals(
    hits: dict[str, np.ndarray], queries: dict[str, np.ndarray], seed: int
) -> dict[str, tuple[float, float]]:
    """Bootstrap 95 % intervals: images are drawn again, each with all its captions, which are not independent.

    A figure is a ratio of two sums over the drawn images, hits by queries. What they are searched in stays as it is.
    """
    hit, asked = np.stack(list(hits.values()), axis=1), np.stack(list(queries.values()), axis=1)  # [N, K]
    rng, share = stream(seed, "bootstrap"), np.full(len(hit), 1 / len(hit))
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
