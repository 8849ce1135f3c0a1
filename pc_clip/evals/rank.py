"""Put images in order by an attribute given in words, and say how right the order is.

The score of an image is its cosine to the attribute's embedding, or to the difference of the embeddings of
two opposite phrases. With `--images FOLDER --rank.attribute "..."` any folder is ranked; nothing is known of it,
so only the order and a contact sheet come out.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from scipy.stats import spearmanr
from torch import Tensor

from pc_clip.core.config.evaluate import EvaluateConfig
from pc_clip.core.errors import UserError
from pc_clip.core.random import stream
from pc_clip.data import attributes
from pc_clip.data.dataset import Attribute, Dataset
from pc_clip.data.differences import contrast
from pc_clip.evals import Picture, Result, Subject, mean
from pc_clip.evals.difference import draw_pairs
from pc_clip.evals.plots import contact_sheet
from pc_clip.metrics import intervals as _intervals
from pc_clip.models.clip import Clip

SHOWN = 24  # images on a contact sheet, evenly spaced along the order
SHEETS = 12  # contact sheets at most; --tasks chooses whose
SAMPLE = 20_000  # pairs an interval is computed from

NEEDS = (
    "a data set with graded attributes (example, awa2, cifar100, flowers102), or --rank.attribute with --images FOLDER"
)


def applies(data: Dataset, config: EvaluateConfig) -> bool:
    return bool(data.attributes) or bool(attributes.tasks_of(data.name)) or bool(config.rank.attribute)


def evaluate(subject: Subject) -> Result:
    return _in_words(subject) if subject.config.rank.attribute else _known(subject)


def direction(clip: Clip, phrase: str, against: str | None = None) -> Tensor:
    """The embedding images are compared with: of one phrase, or of a phrase minus its opposite.  -> [D]"""
    if against is None:
        return clip.embed_texts([phrase])[0]
    a, b = clip.embed_texts([phrase, against])
    return a - b


def _known(subject: Subject) -> Result:
    """Graded attributes, put in order by sentences and by the untrained baseline.

    rank: by a difference sentence minus its opposite; rank_one_sentence: by the sentence alone; rank_reversed: by
    the same fact told of the second image first, minus its opposite; rank_by_subtraction: enc(high) - enc(low) in
    the untrained model; each is the share of clearly different pairs in the right order. spearman: of the first.
    """
    if not subject.attributes:
        raise UserError(f"{subject.data.label} has no graded attributes for mode rank; it needs {NEEDS}")
    details, pictures, groups, samples = {}, {}, {}, {}
    for attribute in subject.attributes:
        scores = _scores(subject, attribute)
        found = {name: pair_accuracy(score, attribute) for name, score in scores.items()}
        samples[attribute.name] = _sample(list(scores.values()), attribute, subject.config.seed)
        details[attribute.name] = {
            **found,
            "spearman": _spearman(scores["rank"], attribute),
            "sentence": contrast(attribute.more, attribute.less, 0),
        }
        groups.setdefault(attribute.task or attribute.name, []).append(attribute.name)
        if len(pictures) < SHEETS:
            title = f"{attribute.name}: from {attribute.less} to {attribute.more}"
            pictures[f"{attribute.name}.png"] = _sheet(subject.data, scores["rank"], title, ~np.isnan(attribute.value))
    names = [name for name in next(iter(details.values())) if name != "sentence"]
    by_group = {g: {n: mean([details[a][n] for a in members]) for n in names} for g, members in groups.items()}
    metrics = {name: mean([found[name] for found in by_group.values()]) for name in names}  # each task counts alike
    metrics |= {f"{name}_{group}": value for group, found in by_group.items() for name, value in found.items()}
    ranked = [name for name in names if name != "spearman"]
    of_groups = {group: [samples[a] for a in members] for group, members in groups.items()}
    intervals = dict(zip(ranked, _interval(list(of_groups.values()))))
    for group, members in of_groups.items():
        intervals |= dict(zip([f"{name}_{group}" for name in ranked], _interval([members])))
    return Result(metrics, len(subject.data), details, pictures, intervals)


def _scores(subject: Subject, attribute: Attribute) -> dict[str, np.ndarray]:
    """What each way of ranking scores the images.  [N] each"""

    def of(phrase: str, against: str | None) -> np.ndarray:
        return scores_of(subject.clip, subject.z, phrase, against)

    (told, opposite), (told_last, opposite_last) = (
        (contrast(attribute.more, attribute.less, w), contrast(attribute.less, attribute.more, w)) for w in (0, 1)
    )
    found = {
        "rank": of(told, opposite),
        "rank_one_sentence": of(told, None),
        "rank_reversed": of(told_last, opposite_last),
    }
    if subject.base is not None:
        baseline = direction(subject.base, attribute.high, attribute.low)
        found["rank_by_subtraction"] = (subject.base_z @ baseline).numpy()
    return found


def _sample(scores: list[np.ndarray], attribute: Attribute, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """A sample of clear pairs [P, 2], and how right each of K scores puts them: 1, 0, or a half for a tie.  [P, K]"""
    pairs = draw_pairs(attribute, SAMPLE, stream(seed, "pairs"))
    up = np.sign(attribute.value[pairs[:, 0]] - attribute.value[pairs[:, 1]])
    right = [0.5 + 0.5 * up * np.sign(score[pairs[:, 0]] - score[pairs[:, 1]]) for score in scores]
    return np.stack(right, axis=1), pairs


def _interval(groups: list[list[tuple[np.ndarray, np.ndarray]]]) -> list[tuple[float, float]]:
    """Of the means over groups of samples: each group counts alike, and within it each attribute."""
    samples = [(right, pairs, 1 / len(group) / len(pairs)) for group in groups for right, pairs in group]
    weight = np.concatenate([np.full(len(pairs), share) for _, pairs, share in samples])
    right, pairs = (np.concatenate([sample[k] for sample in samples]) for k in (0, 1))
    return _intervals.of_pairs(right, pairs, weight)


def scores_of(clip: Clip, z: Tensor, phrase: str, against: str | None = None) -> np.ndarray:
    """Cosines of images with a phrase, or their products with a phrase minus its opposite. z: [N, D] unit.  -> [N]"""
    return (z @ direction(clip, phrase, against)).numpy()


def order_of(ids: Sequence[str], score: np.ndarray) -> pd.DataFrame:
    """Images in the order of their scores, the highest first: rank (from 1), image, score."""
    order = np.argsort(-score, kind="stable")
    ranks = np.arange(1, len(order) + 1)
    return pd.DataFrame({"rank": ranks, "image": [ids[row] for row in order], "score": score[order].astype(float)})


def _in_words(subject: Subject) -> Result:
    options = subject.config.rank
    score = scores_of(subject.clip, subject.z, options.attribute, options.against)
    title = f"least to most: {options.attribute}" + (f" (against {options.against})" if options.against else "")
    ranked = order_of(subject.data.ids, score)[["image", "score"]].to_dict("records")
    details = {"attribute": options.attribute, "against": options.against, "order": ranked}
    return Result(
        {"images": float(len(score))}, len(score), details, {"ranked.png": _sheet(subject.data, score, title)}
    )


def pair_accuracy(score: np.ndarray, attribute: Attribute) -> float:
    """Of all pairs that clearly differ, the share that the scores put in the right order; ties count half."""
    known = ~np.isnan(attribute.value)
    score, value = score[known], attribute.value[known]
    right = total = 0.0
    for v in np.unique(value):  # a value at a time: linear memory, and two steps where classes are graded 0 or 1
        above, here = np.sort(score[value > v + attribute.gap]), score[value == v]
        lower, upper = np.searchsorted(above, here, "left"), np.searchsorted(above, here, "right")
        right += (len(above) - upper).sum() + 0.5 * (upper - lower).sum()
        total += len(above) * len(here)
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
