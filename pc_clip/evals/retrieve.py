"""Retrieval between images and their captions: R@k both ways, by two named definitions.

t2i, i2t: all captions of all images in one pool, as CLIP_benchmark and most tables count: every caption has to find its
image, an image any one of its captions. paired_t2i, paired_i2t: each image with one caption, N against N, as SimCLIP
counts; done for the first, second, ... captions in turn, as many as every image has, and averaged, so that nothing is
drawn at random. centred_i2t explains a low i2t: each caption's cosine is less its mean over all the images, so that no
caption is close to everything; it looks at all images at once and does not replace i2t.
"""

from __future__ import annotations

import logging

import numpy as np
import torch

from pc_clip.core.config.evaluate import EvaluateConfig
from pc_clip.core.errors import UserError
from pc_clip.data.dataset import Dataset
from pc_clip.evals import EvalContext, Result
from pc_clip.metrics import intervals
from pc_clip.metrics.retrieval import KS, families, per_image

log = logging.getLogger(__name__)

COMPARED = ("t2i_r1", "i2t_r1", "paired_t2i_r1", "paired_i2t_r1")  # kept image by image, to compare models by


def applies(data: Dataset, config: EvaluateConfig) -> str | None:
    return None if data.captions else "a data set with captions (example, coco, a webdataset for retrieval)"


def captioned(data: Dataset) -> np.ndarray:
    """The rows of the images that have a caption, [N]; a warning counts the others."""
    rows = np.flatnonzero([len(texts) > 0 for texts in data.captions])
    if len(rows) < len(data):
        log.warning("%d of %d images are left out: they have no caption", len(data) - len(rows), len(data))
    return rows


def evaluate(context: EvalContext) -> Result:
    """R@k of both definitions, with intervals over images; median ranks, from 1, are in the details.

    A tie gets the middle of its ranks (metrics/retrieval.py). Intervals draw images again, each with all its captions,
    which are not independent. The pool stays as it is.
    Images without a caption are left out and counted. Raises UserError where fewer than two have one.
    """
    rows = captioned(context.data)
    captions = [context.data.captions[row] for row in rows]
    counts = np.array([len(texts) for texts in captions])
    if len(rows) < 2:
        raise UserError(f"{context.data.label} has {len(rows)} images with a caption; retrieval needs two")
    texts = context.clip.embed_texts([caption for texts in captions for caption in texts])
    by_name = families(context.z[torch.from_numpy(rows)], texts, counts)
    hits, queries = per_image(by_name, len(counts))
    details = {f"{name}_median_rank": float(np.median(family.ranks.middle)) for name, family in by_name.items()}
    details |= {"images": len(counts), "captions": int(counts.sum()), "captions_in_turn": int(counts.min())}
    details["without_caption"] = len(context.data) - len(rows)
    details["tied"] = {name: family.ranks.tied for name, family in by_name.items()}
    details["left_out"] = {
        f"{name}_r{k}": f"k is not smaller than the number of candidates, {family.candidates}"
        for name, family in by_name.items()
        for k in KS
        if k >= family.candidates
    }
    metrics = {name: float(hits[name].sum() / queries[name].sum()) for name in hits}
    items = {name: (hits[name] / queries[name].mean()).round(4).tolist() for name in metrics if name in COMPARED}
    known = intervals.of_ratios(hits, queries, context.config.seed)
    return Result(metrics, len(counts), details, intervals=known, items=items)
