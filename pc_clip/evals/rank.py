"""Put images in order by an attribute given in words, and say how right the order is.

The score of an image is its cosine to the attribute's embedding, or to the difference of the embeddings of
two opposite phrases. With `--images FOLDER --attribute "..."` any folder is ranked; nothing is known of it,
so only the order and a contact sheet come out.
"""

from __future__ import annotations

import numpy as np
from scipy.stats import spearmanr
from torch import Tensor

from pc_clip.clip import Clip
from pc_clip.config import EvaluateConfig
from pc_clip.datasets import Attribute, Dataset
from pc_clip.differences import contrast
from pc_clip.evals import Picture, Result, Subject, mean
from pc_clip.sheets import contact_sheet

SHOWN = 24  # images on a contact sheet, evenly spaced along the order

NEEDS = "a data set with graded attributes (example), or --attribute with --images FOLDER"


def applies(data: Dataset, config: EvaluateConfig) -> bool:
    return bool(data.attributes) or bool(config.attribute)


def evaluate(subject: Subject) -> Result:
    return _in_words(subject) if subject.config.attribute else _known(subject)


def direction(clip: Clip, phrase: str, against: str | None = None) -> Tensor:
    """The embedding images are compared with: of one phrase, or of a phrase minus its opposite.  -> [D]"""
    if against is None:
        return clip.embed_texts([phrase])[0]
    a, b = clip.embed_texts([phrase, against])
    return a - b


def _known(subject: Subject) -> Result:
    """Graded attributes, ranked by the difference sentence against its mirror, and by the untrained baseline."""
    details, pictures = {}, {}
    for attribute in subject.data.attributes:
        more_first = contrast(attribute.more, attribute.less, 0)
        less_first = contrast(attribute.less, attribute.more, 0)
        score = (subject.z @ direction(subject.clip, more_first, less_first)).numpy()
        found = {"rank": pair_accuracy(score, attribute), "spearman": _spearman(score, attribute)}
        if subject.base is not None:
            baseline = (subject.base_z @ direction(subject.base, attribute.high, attribute.low)).numpy()
            found["rank_by_subtraction"] = pair_accuracy(baseline, attribute)
        details[attribute.name] = found | {"sentence": more_first, "against": less_first}
        title = f"{attribute.name}: from {attribute.less} to {attribute.more}"
        pictures[f"{attribute.name}.png"] = _sheet(subject.data, score, title, ~np.isnan(attribute.value))
    names = [name for name in next(iter(details.values())) if name not in ("sentence", "against")]
    metrics = {name: mean([d[name] for d in details.values()]) for name in names}
    by_attribute = {f"{name}_{a}": d[name] for a, d in details.items() for name in names}
    return Result(metrics | by_attribute, len(subject.data), details, pictures)


def _in_words(subject: Subject) -> Result:
    config = subject.config
    score = (subject.z @ direction(subject.clip, config.attribute, config.against)).numpy()
    order = np.argsort(-score, kind="stable")
    title = f"least to most: {config.attribute}" + (f" (against {config.against})" if config.against else "")
    ranked = [{"image": subject.data.ids[row], "score": float(score[row])} for row in order]
    details = {"attribute": config.attribute, "against": config.against, "order": ranked}
    return Result(
        {"images": float(len(order))}, len(order), details, {"ranked.png": _sheet(subject.data, score, title)}
    )


def pair_accuracy(score: np.ndarray, attribute: Attribute) -> float:
    """Of all pairs that clearly differ, the share that the scores put in the right order; ties count half."""
    known = ~np.isnan(attribute.value)
    score, value = score[known], attribute.value[known]
    right = total = 0.0
    for s, v in zip(score, value):  # a row at a time, so that memory stays linear
        above = value > v + attribute.gap
        right += (score[above] > s).sum() + 0.5 * (score[above] == s).sum()
        total += above.sum()
    return float(right / total)


def _spearman(score: np.ndarray, attribute: Attribute) -> float:
    known = ~np.isnan(attribute.value)
    return float(spearmanr(score[known], attribute.value[known]).statistic)


def _sheet(data: Dataset, score: np.ndarray, title: str, among: np.ndarray | None = None) -> Picture:
    rows = np.flatnonzero(among) if among is not None else np.arange(len(score))
    order = rows[np.argsort(score[rows], kind="stable")]
    shown = order[np.unique(np.linspace(0, len(order) - 1, min(SHOWN, len(order))).round().astype(int))]
    place = {row: n for n, row in enumerate(order, 1)}
    sheet = contact_sheet([data.load(int(row)) for row in shown], title, [f"{place[row]}" for row in shown])
    return Picture(sheet, f"{len(shown)} of {len(order)} images in the order of their score, {title}")
