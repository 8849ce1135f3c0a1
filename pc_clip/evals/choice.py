"""Which of several captions of an image holds? What'sUp (Kamath et al. 2023), NegBench's multiple choice."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor

from pc_clip.core.config.evaluate import EvaluateConfig
from pc_clip.data.dataset import Dataset, subset
from pc_clip.data.groups import Choice, form_of, with_images
from pc_clip.evals import EvalContext, Result
from pc_clip.evals.blind_baselines import by_photograph, grey_image
from pc_clip.metrics import intervals


def applies(data: Dataset, config: EvaluateConfig) -> str | None:
    if config.statements and form_of(config.statements) is Choice:
        return None
    return "rows with image, captions, answer as --statements, and a data set with their images (folder)"


def evaluate(context: EvalContext) -> Result:
    """The share of rows whose right caption is nearest to the image, in all and of each kind.

    choice: with intervals over images. choice_set: the share of sets of rows, where rows name one (`group`), that are
    right in every row. choice_blind_grey, choice_blind_mean: a grey picture, or the mean embedding of the images, in
    place of every image. A tie counts as wrong. The details have the chance of a guess.
    Raises UserError where none of the images is there.
    """
    asked, places = with_images(context.statements, ("image",), context.data)
    rows, image = np.unique(places[:, 0], return_inverse=True)
    z = context.on(subset(context.data, rows)).z
    texts = list(dict.fromkeys(text for row in asked for text in row.captions))
    place, z_text = {text: n for n, text in enumerate(texts)}, context.clip.embed_texts(texts)

    def right(of_image: Tensor) -> np.ndarray:
        """[M, D] embeddings -> [M] whether the right caption is the nearest."""
        correct = np.zeros(len(asked))
        for n, row in enumerate(asked):
            cosines = z_text[[place[text] for text in row.captions]] @ of_image[n]
            others = torch.cat([cosines[: row.answer], cosines[row.answer + 1 :]])
            correct[n] = cosines[row.answer] > others.max()
        return correct

    grey, mean = grey_image(context.clip), F.normalize(z.mean(0), dim=0)
    shares = {"choice": right(z[image])}
    shares |= {f"choice_blind_{k}": right(v.expand(len(asked), -1)) for k, v in (("grey", grey), ("mean", mean))}
    kinds = np.array([row.kind for row in asked])
    if len(set(kinds)) > 1:
        shares |= {f"choice_{kind}": np.where(kinds == kind, shares["choice"], np.nan) for kind in np.unique(kinds)}
    metrics, known = intervals.of_columns(shares, image, context.config.seed)
    rows_of, there = Counter(row.group for row in context.statements), Counter(row.group for row in asked)
    whole = [group for group in there if group and there[group] == rows_of[group]]
    groups = pd.Series(shares["choice"]).groupby([row.group for row in asked]).min()[whole]
    if len(groups):
        metrics["choice_set"] = float(groups.mean())
    chance = float(np.mean([1 / len(row.captions) for row in asked]))
    details = {
        "rows": len(asked),
        "absent": len(context.statements) - len(asked),
        "sets": len(groups),
        "sets_left_out": len(there.keys() - {""}) - len(whole),  # of which a row is absent
        "chance": chance,
    }
    items = {"choice": by_photograph(shares["choice"], image)}
    return Result(metrics, len(asked), details, intervals=known, items=items)
