"""Retrieval between images and their captions: R@k both ways, over the whole data set."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from pc_clip.config import EvaluateConfig
from pc_clip.datasets import Dataset
from pc_clip.evals import Result, Subject, mean

KS = (1, 5, 10)

NEEDS = "a data set with captions (example, coco)"


def applies(data: Dataset, config: EvaluateConfig) -> bool:
    return bool(data.captions)


def evaluate(subject: Subject) -> Result:
    """t2i: a caption finds its image. i2t: an image finds any one of its captions (as CLIP_benchmark counts)."""
    captions = subject.data.captions
    owner = np.repeat(np.arange(len(captions)), [len(each) for each in captions])
    text = subject.clip.embed_texts([caption for each in captions for caption in each])
    t2i = ranks(text, subject.z, [np.array([image]) for image in owner])
    i2t = ranks(subject.z, text, np.split(np.arange(len(owner)), np.cumsum([len(each) for each in captions])[:-1]))
    metrics = {f"{name}_r{k}": mean((rank < k).tolist()) for name, rank in (("t2i", t2i), ("i2t", i2t)) for k in KS}
    medians = {"t2i_median_rank": float(np.median(t2i) + 1), "i2t_median_rank": float(np.median(i2t) + 1)}
    return Result(metrics, len(captions), medians | {"images": len(captions), "captions": len(owner)})


def ranks(queries: Tensor, items: Tensor, right: list[np.ndarray], block: int = 1024) -> np.ndarray:
    """Rank of each query's best right item among all, from 0; one tied with m others gets the middle of their ranks.

    queries: [Q, D], items: [N, D]; right[q]: the rows of items that answer query q, which never outrank
    one another.  -> [Q] float64
    """
    found = np.empty(len(queries))
    for start in range(0, len(queries), block):
        cosine = queries[start : start + block] @ items.T
        for n, row in enumerate(cosine):
            own = torch.from_numpy(right[start + n])
            best = row[own].max()
            wrong = torch.ones(len(items), dtype=torch.bool)
            wrong[own] = False
            found[start + n] = int((row[wrong] > best).sum()) + 0.5 * int((row[wrong] == best).sum())
    return found
