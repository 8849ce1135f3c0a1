"""Which of two captions belongs to which of two images? Winoground (Thrush et al. 2022) and files of its form.

Both captions mostly have the same words in another order, so that only who does what to whom tells the images apart.
"""

from __future__ import annotations

import numpy as np

from pc_clip.core.config.evaluate import EvaluateConfig
from pc_clip.data.dataset import Dataset, subset
from pc_clip.data.groups import Quartet, form_of, with_images
from pc_clip.evals import EvalContext, Result
from pc_clip.metrics import intervals

CHANCE = {"text": 1 / 4, "image": 1 / 4, "group": 1 / 6}
ENOUGH = 10  # rows of a tag that has figures of its own


def applies(data: Dataset, config: EvaluateConfig) -> str | None:
    if config.statements and form_of(config.statements) is Quartet:
        return None
    return "rows with image_0, image_1, caption_0, caption_1 as --statements, and a data set with their images (folder)"


def evaluate(context: EvalContext) -> Result:
    """Three scores, in all and of each tag, with intervals over rows; chance is in the details.

    text: each image is nearer to its own caption than to the other one. image: each caption is nearer to its own image
    than to the other one. group: both. A tie counts as wrong; a scorer that does not look at the images has 0 of text.
    Raises UserError where of no row both images are there.
    """
    asked, rows = with_images(context.statements, ("image_0", "image_1"), context.data)
    used, place = np.unique(rows, return_inverse=True)
    images = context.on(subset(context.data, used)).z[place.reshape(-1, 2)]  # [M, 2, D]
    texts = context.clip.embed_texts([text for row in asked for text in (row.caption_0, row.caption_1)])
    cosines = (images.double() @ texts.reshape(images.shape).double().mT).numpy()  # [M, image, caption]
    own = cosines[:, [0, 1], [0, 1]]
    text = (own > cosines[:, [0, 1], [1, 0]]).all(1)
    image = (own > cosines[:, [1, 0], [0, 1]]).all(1)
    scores = {"text": text.astype(float), "image": image.astype(float), "group": (text & image).astype(float)}
    shares, kinds = dict(scores), np.array([row.kind for row in asked])
    for kind in (kind for kind in np.unique(kinds) if (kinds == kind).sum() >= ENOUGH):
        word = "_".join(kind.lower().split())
        shares |= {f"{name}_{word}": np.where(kinds == kind, score, np.nan) for name, score in scores.items()}
    metrics, known = intervals.of_columns(shares, np.arange(len(asked)), context.config.seed)
    details = {"rows": len(asked), "absent": len(context.statements) - len(asked), "chance": CHANCE}
    items = {name: score.tolist() for name, score in scores.items()}
    return Result(metrics, len(asked), details, intervals=known, items=items)
