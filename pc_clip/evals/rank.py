"""Put images in order by an attribute given in words, and measure how right the order is.

The score of an image is its cosine with the attribute's embedding, or with the difference of the embeddings of
two opposite phrases. With `--images FOLDER --rank.attribute "..."` any folder is ranked; without annotations the
result is the order and a contact sheet.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from scipy.stats import spearmanr
from torch import Tensor

from pc_clip.core.config.evaluate import EvaluateConfig
from pc_clip.core.random import stream
from pc_clip.data import attributes
from pc_clip.data.dataset import Attribute, Dataset
from pc_clip.data.wordings import contrast
from pc_clip.evals import EvalContext, Picture, Result
from pc_clip.evals.answers import Answers, by_task, draw_pairs, interval_of
from pc_clip.evals.plots import contact_sheet
from pc_clip.models.clip import Clip

SHOWN = 24  # images on a contact sheet, evenly spaced along the order
SHEETS = 12  # contact sheets at most; --tasks chooses whose
SAMPLE = 20_000  # pairs an interval is computed from
LACKING = (
    "a data set with graded attributes (example, awa2, cifar100, flowers102), or --rank.attribute with --images FOLDER"
)


def applies(data: Dataset, config: EvaluateConfig) -> str | None:
    graded = attributes.known_of(data, config)
    return None if graded or config.rank.attribute else LACKING


def evaluate(context: EvalContext) -> Result:
    """Graded attributes, put in order by sentences and by the untrained baseline; or a folder, by --rank.attribute.

    rank: by a difference sentence minus its opposite; rank_one_sentence: by the sentence alone; rank_reversed: by
    the same fact with the second image first, minus its opposite; rank_by_phrase: enc(high) - enc(low);
    rank_by_subtraction: the same in the untrained model; each is the share of clearly different pairs in the right
    order. spearman: of the first. rank_worst_TASK: of a task in several wordings the worst, in either order of mention.
    """
    if context.config.rank.attribute:
        return _rank_folder(context)
    result, figures, samples = Result({}, len(context.data)), [], []
    for attribute in context.attributes:
        scores, known = _scores(context, attribute), ~np.isnan(attribute.value)
        samples.append(_sample(scores, attribute, context.config.seed))  # first: it refuses images that do not differ
        of_attribute = {name: pair_accuracy(score, attribute) for name, score in scores.items()}
        of_attribute["spearman"] = float(spearmanr(scores["rank"][known], attribute.value[known]).statistic)
        figures.append(of_attribute)
        result.details[attribute.name] = of_attribute | {"sentence": contrast(attribute.more, attribute.less, 0)}
        if len(result.pictures) < SHEETS:
            title = f"{attribute.name}: from {attribute.less} to {attribute.more}"
            result.pictures[f"{attribute.name}.png"] = _sheet(context.data, scores["rank"], title, known)
    tasks, samples_of = by_task(context.attributes, figures), by_task(context.attributes, samples)
    means = pd.DataFrame(
        {task: pd.DataFrame(members).mean(skipna=False) for task, members in tasks.items()}
    )  # a column a task
    result.metrics = means.mean(axis=1, skipna=False).to_dict()  # each task counts alike
    names = samples[0].names
    result.intervals = dict(zip(names, interval_of(list(samples_of.values()))))
    for task, members in tasks.items():
        if len(members) > 1:
            result.metrics[f"rank_worst_{task}"] = min(min(m["rank"], m["rank_reversed"]) for m in members)
    for task, members in samples_of.items():
        result.metrics |= means[task].add_suffix(f"_{task}").to_dict()
        result.intervals |= dict(zip([f"{name}_{task}" for name in names], interval_of([members])))
    return result


def _scores(context: EvalContext, attribute: Attribute) -> dict[str, np.ndarray]:
    """The images' scores by each way of ranking.  [N] each"""
    more, less, clip, z = attribute.more, attribute.less, context.clip, context.z
    first = contrast(more, less, 0)  # tells of the first image first
    scores = {
        "rank": scores_of(clip, z, first, contrast(less, more, 0)),
        "rank_one_sentence": scores_of(clip, z, first),
        "rank_reversed": scores_of(clip, z, contrast(more, less, 1), contrast(less, more, 1)),
    }
    scores["rank_by_phrase"] = scores_of(clip, z, attribute.high, attribute.low)
    if context.base is not None:
        scores["rank_by_subtraction"] = scores_of(context.base, context.base_z, attribute.high, attribute.low)
    return scores


def scores_of(clip: Clip, z: Tensor, phrase: str, against: str | None = None) -> np.ndarray:
    """Cosines of images with a phrase, or their products with a phrase minus its opposite. z: [N, D] unit.  -> [N]"""
    direction, *opposite = clip.embed_texts([phrase] if against is None else [phrase, against])
    return (z @ (direction - opposite[0] if opposite else direction)).numpy()


def _sample(scores: dict[str, np.ndarray], attribute: Attribute, seed: int) -> Answers:
    """Clear pairs, and how right each score puts them: 1, 0, or a half for a tie."""
    pairs = draw_pairs(attribute, SAMPLE, stream(seed, "pairs"))
    up = np.sign(attribute.value[pairs[:, 0]] - attribute.value[pairs[:, 1]])
    right = [0.5 + 0.5 * up * np.sign(score[pairs[:, 0]] - score[pairs[:, 1]]) for score in scores.values()]
    return Answers(list(scores), np.stack(right, axis=1), pairs, np.zeros(len(pairs)))


def pair_accuracy(score: np.ndarray, attribute: Attribute) -> float:
    """Fraction of clearly different pairs that the scores order correctly; ties count half."""
    known = ~np.isnan(attribute.value)
    score, value = score[known], attribute.value[known]
    right = total = 0.0
    for v in np.unique(value):  # a value at a time: linear memory, and two steps where classes are graded 0 or 1
        above, here = np.sort(score[value > v + attribute.gap]), score[value == v]
        lower, upper = np.searchsorted(above, here, "left"), np.searchsorted(above, here, "right")
        right += (len(above) - upper).sum() + 0.5 * (upper - lower).sum()
        total += len(above) * len(here)
    return float(right / total)


def order_of(ids: Sequence[str], score: np.ndarray) -> pd.DataFrame:
    """Images in the order of their scores, the highest first: rank (from 1), image, score."""
    order = np.argsort(-score, kind="stable")
    ranks = np.arange(1, len(order) + 1)
    return pd.DataFrame({"rank": ranks, "image": [ids[row] for row in order], "score": score[order].astype(float)})


def _rank_folder(context: EvalContext) -> Result:
    options, n = context.config.rank, len(context.data)
    score = scores_of(context.clip, context.z, options.attribute, options.against)
    title = f"least to most: {options.attribute}" + (f" (against {options.against})" if options.against else "")
    order = order_of(context.data.ids, score).to_dict("records")
    details = {"attribute": options.attribute, "against": options.against, "order": order}
    sheet = _sheet(context.data, score, title, np.ones(n, dtype=bool))
    return Result({"images": float(n)}, n, details, {"ranked.png": sheet})


def _sheet(data: Dataset, score: np.ndarray, title: str, known: np.ndarray) -> Picture:
    """Images evenly spaced along the order of those that are `known`, [N] bool."""
    rows = np.flatnonzero(known)
    order = rows[np.argsort(score[rows], kind="stable")]
    places = np.unique(np.linspace(0, len(order) - 1, min(SHOWN, len(order))).round().astype(int))
    sheet = contact_sheet([data.load(int(order[n])) for n in places], title, [str(n + 1) for n in places])
    return Picture(sheet, f"{len(places)} of {len(order)} images in the order of their score, {title}")
