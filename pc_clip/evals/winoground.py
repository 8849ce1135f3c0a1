"""Which of two captions belongs to which of two images? Winoground (Thrush et al. 2022) and files of its form.

Both captions mostly have the same words in another order, so that only who does what to whom tells the images apart.
"""

from __future__ import annotations

import logging

import numpy as np

from pc_clip.core.config.evaluate import EvaluateConfig
from pc_clip.core.errors import UserError
from pc_clip.data.dataset import Dataset, subset
from pc_clip.data.groups import Quartet, form_of
from pc_clip.data.views import ImageIds
from pc_clip.evals import EvalContext, Result
from pc_clip.metrics import intervals

log = logging.getLogger(__name__)
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
    rows, ids = context.statements, ImageIds(context.data.ids, context.data.label)
    places = [(ids.find(row.image_0), ids.find(row.image_1)) for row in rows]
    there = [n for n, pair in enumerate(places) if None not in pair]
    if not there:
        raise UserError(f"of none of the {len(rows)} rows are both images in {context.data.label}")
    if absent := len(rows) - len(there):
        log.info("  %d of %d rows are left out: an image of theirs is absent", absent, len(rows))
    used, place = np.unique([places[n] for n in there], return_inverse=True)
    images = context.on(subset(context.data, used)).z[place.reshape(-1, 2)]  # [M, 2, D]
    asked = [rows[n] for n in there]
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
    details = {"rows": len(asked), "absent": absent, "chance": CHANCE}
    items = {name: score.tolist() for name, score in scores.items()}
    return Result(metrics, len(asked), details, intervals=known, items=items)
