"""Are both paraphrases of a caption ranked above its negative? SugarCrepe++ (Dumpala et al. 2024).

Each image has two captions that say the same and a third that is wrong and mostly in the words of the first. A model
that goes by words prefers the wrong one to the paraphrase.
"""

from __future__ import annotations

import numpy as np
import torch.nn.functional as F
from torch import Tensor

from pc_clip.core.config.evaluate import EvaluateConfig
from pc_clip.data.dataset import Dataset, subset
from pc_clip.data.groups import Triplet, form_of, with_images
from pc_clip.evals import EvalContext, Result
from pc_clip.evals.blind_baselines import by_photograph, grey_image
from pc_clip.metrics import intervals

CHANCE = 1 / 3  # three texts in any order; both right ones come before the wrong one, or are nearest to each other


def applies(data: Dataset, config: EvaluateConfig) -> str | None:
    if config.statements and form_of(config.statements) is Triplet:
        return None
    return (
        "SugarCrepe++'s files as --statements (caption, caption2, negative_caption), and a data set with their images"
    )


def evaluate(context: EvalContext) -> Result:
    """The share of triplets that are right, in all and of each file, with intervals over photographs.

    i2t: the image is nearer to both captions than to the wrong one. text: the two captions are nearer to each other
    than either is to the wrong one; no image is looked at. i2t_blind_grey, i2t_blind_mean: a grey picture, or the mean
    embedding of the images, in place of every image. A tie counts as wrong. Chance is a third.
    Raises UserError where none of the images is there.
    """
    asked, places = with_images(context.statements, ("image",), context.data)
    rows, photograph = np.unique(places[:, 0], return_inverse=True)
    z = context.on(subset(context.data, rows)).z
    texts = context.clip.embed_texts([text for triplet in asked for text in triplet[1:4]])
    texts = texts.reshape(len(asked), 3, -1)  # caption, paraphrase, wrong
    of_texts = texts @ texts.mT  # [M, 3, 3]
    shares = {
        "i2t": _both_nearer(z[photograph], texts),
        "text": (of_texts[:, 0, 1] > of_texts[:, :2, 2].amax(1)).double().numpy(),
        "i2t_blind_grey": _both_nearer(grey_image(context.clip)[None], texts),
        "i2t_blind_mean": _both_nearer(F.normalize(z.mean(0), dim=0)[None], texts),
    }
    kinds = np.array([triplet.kind for triplet in asked])
    for kind in np.unique(kinds):
        shares |= {f"{name}_{kind}": np.where(kinds == kind, shares[name], np.nan) for name in ("i2t", "text")}
    metrics, known = intervals.of_columns(shares, photograph, context.config.seed)
    details = {
        "triplets": len(asked),
        "photographs": len(rows),
        "absent": len(context.statements) - len(asked),
        "chance": CHANCE,
    }
    items = {"i2t": by_photograph(shares["i2t"], photograph)}
    return Result(metrics, len(asked), details, intervals=known, items=items)


def _both_nearer(image: Tensor, texts: Tensor) -> np.ndarray:
    """Whether an image is nearer to both captions than to the wrong one. [M or 1, D], [M, 3, D] -> [M] float64"""
    cosines = (texts * image[:, None]).sum(-1)
    return (cosines[:, :2].amin(1) > cosines[:, 2]).double().numpy()
