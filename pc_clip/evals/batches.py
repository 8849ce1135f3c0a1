"""Retrieval among the images of a batch: R@1 and mean reciprocal rank, as training on batches sees it.

Images are shuffled by seed and cut into disjoint batches of `--batches.size`; an incomplete batch is left out and
counted. Each image comes with one caption, which has to find it among the batch's images (t2i), and which it has to
find among the batch's captions (i2t): for the first, second, ... captions in turn, as many as every image has, and
averaged. The smaller the batch, the easier: figures of two sizes are no more alike than R@1 and R@10. Ties get the
middle of their ranks, as in evals/retrieve.py. It runs only when --mode names it.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from pc_clip.core.config.evaluate import EvaluateConfig
from pc_clip.core.errors import UserError, check_at_least
from pc_clip.core.random import stream
from pc_clip.data.dataset import Dataset
from pc_clip.evals import EvalContext, Result
from pc_clip.evals.retrieve import captioned
from pc_clip.metrics import intervals
from pc_clip.metrics.retrieval import ranks, relation

BY_NAME_ALONE = True


def applies(data: Dataset, config: EvaluateConfig) -> str | None:
    return None if data.captions else "a data set with captions (example, coco, a webdataset for retrieval)"


def evaluate(context: EvalContext) -> Result:
    """R@1 and MRR both ways, with intervals over images; the batches stay as they are.

    Raises UserError for a batch smaller than 2, and fewer images with a caption than one batch.
    """
    data, size, seed = context.data, context.config.batches.size, context.config.seed
    check_at_least("batches.size", size, 2)
    rows = captioned(data)
    if (n := len(rows)) < size:
        raise UserError(f"{data.label} has {n} images with a caption, too few for one batch; --batches.size is {size}")
    turns = min(len(data.captions[row]) for row in rows)
    order = stream(seed, "retrieval batches").permutation(n)
    batches = order[: n - n % size].reshape(-1, size)
    used = np.sort(batches.ravel())
    texts = context.clip.embed_texts([data.captions[row][turn] for turn in range(turns) for row in rows])
    by_image = per_image(context.z[torch.from_numpy(rows)], texts.reshape(turns, n, -1), batches)
    left_out = len(data) - len(used)
    details = {"batch": size, "batches": len(batches), "images": len(used), "left_out": left_out}
    result = Result({}, len(used), details | {"captions_in_turn": turns})
    for name, values in by_image.items():
        result.metrics[name] = float(values[used].mean())
        result.intervals[name] = intervals.of_mean(values[used], seed)
        result.items[name] = values[used].round(4).tolist()
    return result


def per_image(images: Tensor, texts: Tensor, batches: np.ndarray) -> dict[str, np.ndarray]:
    """Each image's R@1 and reciprocal rank both ways, the mean over turns; 0 where it is in no batch.  -> [N] each

    images: [N, D], texts: [turns, N, D], unit vectors; batches: [batches, size].
    """
    names = [f"batch_{way}_{what}" for what in ("r1", "mrr") for way in ("t2i", "i2t")]
    by_image = {name: np.zeros(len(images)) for name in names}
    own = relation(np.arange(batches.shape[1])[:, None], batches.shape[1])
    for batch in batches:
        for of_turn in texts:
            for way, queries, items in (("t2i", of_turn, images), ("i2t", images, of_turn)):
                of_way = ranks(queries[batch], items[batch], own)
                by_image[f"batch_{way}_r1"][batch] += of_way.hits(1) / len(texts)
                by_image[f"batch_{way}_mrr"][batch] += 1 / of_way.middle / len(texts)
    return by_image
