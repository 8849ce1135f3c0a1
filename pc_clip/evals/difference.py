"""Does the embedding of a difference sentence point along the difference of the two images?

PC-CLIP's difference classification (arXiv 2409.09721): is cos(text, z_i - z_j) > 0 for a sentence that is
true of (i, j)? That figure flatters, so its companions are always beside it: two_way (the true sentence
against its opposite), reversed (the same fact told of the second image first), unseen (a wording no writer
of ours uses, in either order) and caption_subtraction (two plain phrases and the untrained model, no
training at all). The wordings of all but the last two are also those of the rules writer.

Pairs are drawn `draws` times; figures are means over the draws, their standard error is in the details, and
the interval counts that an image stands in many pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pc_clip.core.config.evaluate import EvaluateConfig
from pc_clip.core.errors import UserError, check_at_least
from pc_clip.core.random import seed_of, stream
from pc_clip.data import attributes, differences
from pc_clip.data.dataset import Attribute, Dataset, Question
from pc_clip.data.differences import UNSEEN, Difference, contrast, swap_roles
from pc_clip.evals import Result, Subject
from pc_clip.evals.zeroshot import class_embeddings, templates_of
from pc_clip.metrics import intervals as _intervals
from pc_clip.models.clip import Clip

CANDIDATES = 100  # of which one pair is a sentence's own, for difference_r1

NEEDS = "a data set with graded attributes (example, awa2, cifar100, flowers102), or --difference.sentences FILE"


def applies(data: Dataset, config: EvaluateConfig) -> bool:
    return bool(data.attributes) or bool(attributes.tasks_of(data.name)) or bool(config.difference.sentences)


def evaluate(subject: Subject) -> Result:
    """With --difference.sentences that file's, about images or about classes; else the attributes' own."""
    check_at_least("difference.n_pairs", subject.config.difference.n_pairs, 1)
    check_at_least("difference.draws", subject.config.difference.draws, 1)
    if not subject.config.difference.sentences:
        return _of_attributes(subject)
    found = differences.read(subject.config.difference.sentences)
    asked = next((q for q in subject.data.questions if found[0].first in q.classes), None)
    images = found[0].first in set(subject.data.ids)
    return _of_classes(subject, found, asked) if asked and not images else _of_images(subject, found)


# -- graded attributes ---------------------------------------------------------------------------------


class Claims(NamedTuple):
    """True sentences about pairs. pairs: [P, 2] rows; texts of length P; up: [P], whether the first has more."""

    pairs: np.ndarray
    up: np.ndarray
    text: list[str]
    opposite: list[str]
    reversed: list[str]
    unseen: list[str]


def draw_claims(attribute: Attribute, n: int, seed: int) -> Claims:
    """Pairs that clearly differ in one attribute, in random order, each with sentences about it.

    Raises UserError when no two images differ in it.
    """
    rng = stream(seed, "claims")
    pairs = draw_pairs(attribute, n, rng)
    up = attribute.value[pairs[:, 0]] > attribute.value[pairs[:, 1]]
    wording = 2 * rng.integers(2, size=len(pairs))  # even wordings tell of the first image first, odd ones do not
    told = {(u, w): _told(attribute, u, w) for u in (True, False) for w in (0, 2)}
    each = [told[of_pair] for of_pair in zip(up.tolist(), wording.tolist())]
    return Claims(pairs, up, *([texts[kind] for texts in each] for kind in range(4)))


def _told(attribute: Attribute, up: bool, wording: int) -> tuple[str, str, str, str]:
    """One true sentence, its opposite, the same told of the second image first, and in a wording of nobody's."""
    a, b = (attribute.more, attribute.less) if up else (attribute.less, attribute.more)
    opposite, reverse = contrast(b, a, wording), contrast(a, b, wording + 1)
    return contrast(a, b, wording), opposite, reverse, UNSEEN[wording // 2].format(a=a, b=b)


def draw_pairs(attribute: Attribute, n: int, rng: np.random.Generator, tries: int = 200) -> np.ndarray:
    """n pairs of images that clearly differ in an attribute, with replacement, in random order.  -> [n, 2]

    Fewer when hardly any pair differs. Raises UserError when none does.
    """
    rows = np.flatnonzero(~np.isnan(attribute.value))
    value = attribute.value[rows]
    if len(rows) < 2 or value.max() - value.min() <= attribute.gap:
        raise UserError(f"no two of the images differ in {attribute.name}; it is known of {len(rows)} images")
    found, total = [], 0
    for _ in range(tries):
        drawn = rng.choice(rows, size=(8 * n, 2))
        clear = drawn[np.abs(attribute.value[drawn[:, 0]] - attribute.value[drawn[:, 1]]) > attribute.gap]
        found.append(clear)
        total += len(clear)
        if total >= n:
            break
    return np.concatenate(found)[:n]


def _of_attributes(subject: Subject) -> Result:
    if not subject.attributes:
        raise UserError(f"{subject.data.label} has no graded attributes for mode difference; it needs {NEEDS}")
    questions = ask(subject)
    found = {of.attribute.name: _answer_all(subject, of) for of in questions}
    answers = list(found.values())
    names = answers[0].names
    details: dict = {
        name: dict(zip(names, of.figures().tolist()))
        | {"standard_error": dict(zip(names, standard_errors(of.by_draw()))), "pairs": of.pairs_a_draw()}
        for name, of in found.items()
    }
    groups = by_task(questions, answers)
    by_draw = {group: np.mean([of.by_draw() for of in members], axis=0) for group, members in groups.items()}
    metrics, everything = overall(groups), np.mean(list(by_draw.values()), axis=0)  # [draws, K]
    intervals = dict(zip(names, interval_of(list(groups.values()))))
    details["standard_error"] = dict(zip(names, standard_errors(everything)))
    for group, members in groups.items():
        named = [f"{name}_{group}" for name in names]
        metrics |= dict(zip(named, by_draw[group].mean(0).tolist()))
        intervals |= dict(zip(named, interval_of([members])))
        details["standard_error"] |= dict(zip(named, standard_errors(by_draw[group])))
    return Result(metrics, sum(len(of.pairs) for of in answers), details, intervals=intervals)


class Asked(NamedTuple):
    """All draws of claims about one attribute. draw: [P], which of them a pair is of."""

    attribute: Attribute
    claims: Claims
    draw: np.ndarray


def ask(subject: Subject) -> list[Asked]:
    """The claims about each attribute, which depend on settings and data alone and not on the model."""
    n, draws = subject.config.difference.n_pairs, range(subject.config.difference.draws)
    found = []
    for k, attribute in enumerate(subject.attributes):
        drawn = [draw_claims(attribute, n, seed_of(subject.config.seed, "draw", k, d)) for d in draws]
        claims = Claims(
            np.concatenate([c.pairs for c in drawn]),
            np.concatenate([c.up for c in drawn]),
            *([text for c in drawn for text in getattr(c, kind)] for kind in Claims._fields[2:]),
        )
        found.append(Asked(attribute, claims, np.repeat(draws, [len(c.pairs) for c in drawn])))
    return found


class Answers(NamedTuple):
    """Which figures were right for which pair. right: [P, K], pairs: [P, 2], draw: [P], names of length K."""

    names: list[str]
    right: np.ndarray
    pairs: np.ndarray
    draw: np.ndarray

    @classmethod
    def of(cls, right: dict[str, Tensor], pairs: np.ndarray, draw: np.ndarray) -> Answers:
        return cls(list(right), torch.stack(list(right.values()), dim=1).double().numpy(), pairs, draw)

    def by_draw(self) -> np.ndarray:
        """[draws, K], each figure over the pairs it is defined on."""
        parts = [self.right[self.draw == d] for d in np.unique(self.draw)]
        return np.array([[_mean_of_known(column) for column in part.T] for part in parts])

    def figures(self) -> np.ndarray:
        return self.by_draw().mean(0)

    def pairs_a_draw(self) -> int:
        return int(np.bincount(self.draw).max())


def answer(clip: Clip, z: Tensor, asked: Asked) -> Answers:
    """The two figures that models are chosen by, difference and two_way. z: [N, D] unit image embeddings."""
    gaps = pair_differences(z, asked.claims.pairs)
    return Answers.of(_first_told_first(clip, gaps, asked.claims), asked.claims.pairs, asked.draw)


def _answer_all(subject: Subject, asked: Asked) -> Answers:
    """Those two and their companions."""
    claims, attribute = asked.claims, asked.attribute
    gaps = pair_differences(subject.z, claims.pairs)  # [P, D]
    right = _first_told_first(subject.clip, gaps, claims)
    right["reversed"] = cosines(subject.clip, claims.reversed, gaps) > 0
    right["unseen"] = cosines(subject.clip, claims.unseen, gaps) > 0
    if subject.base is not None:
        high, low = subject.base.embed_texts([attribute.high, attribute.low])
        along = pair_differences(subject.base_z, claims.pairs) @ (high - low)
        right["caption_subtraction"] = (along > 0) == torch.from_numpy(claims.up)
    return Answers.of(right, claims.pairs, asked.draw)


def _first_told_first(clip: Clip, gaps: Tensor, claims: Claims) -> dict[str, Tensor]:
    told = cosines(clip, claims.text, gaps)
    return {"difference": told > 0, "two_way": told > cosines(clip, claims.opposite, gaps)}


def by_task(asked: Sequence[Asked], answers: Sequence[Answers]) -> dict[str, list[Answers]]:
    """The attributes of one task together; one without a task is alone."""
    groups: dict[str, list[Answers]] = {}
    for of, found in zip(asked, answers):
        groups.setdefault(of.attribute.task or of.attribute.name, []).append(found)
    return groups


def overall(groups: dict[str, list[Answers]]) -> dict[str, float]:
    """Each task counts alike, and within it each attribute."""
    by_draw = [np.mean([of.by_draw() for of in members], axis=0) for members in groups.values()]
    return dict(zip(next(iter(groups.values()))[0].names, np.mean(by_draw, axis=0).mean(0).tolist()))


def standard_errors(by_draw: np.ndarray) -> list[float | None]:
    """Of the means over the draws, as far as drawing other pairs goes. [draws, K] -> K, None for a single draw."""
    known = [column[~np.isnan(column)] for column in by_draw.T]
    return [float(c.std(ddof=1) / np.sqrt(len(c))) if len(c) > 1 else None for c in known]


def _mean_of_known(values: np.ndarray) -> float:
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else float("nan")


def interval_of(groups: Sequence[Sequence[Answers]]) -> list[tuple[float, float]]:
    """Of each figure's mean, in which each group counts alike, and within it each attribute."""
    answers = [(a, 1 / len(group) / len(a.pairs)) for group in groups for a in group]
    weight = np.concatenate([np.full(len(a.pairs), share) for a, share in answers])
    right, pairs = np.concatenate([a.right for a, _ in answers]), np.concatenate([a.pairs for a, _ in answers])
    return _intervals.of_pairs(right, pairs, weight)


# -- sentences of a file, about images -----------------------------------------------------------------


def _of_images(subject: Subject, found: list[Difference]) -> Result:
    """sign, two_way, mirrored and R@1 among 100 pairs, for held-out sentences about these images.

    mirrored: the sentence with first and second exchanged, on the pair in the other order. two_way and
    mirrored are over the sentences that name both images.
    """
    pairs = differences.rows(found, subject.data.ids, subject.config.difference.sentences)
    texts = [d.text for d in found]
    z = None
    if subject.data.captions and subject.base is not None:  # in this order: loading the untrained model takes time
        z = subject.base.embed_texts([captions[0] for captions in subject.data.captions])
        z = pair_differences(z, pairs)
    answers = _of_sentences(subject, texts, pairs, np.zeros(len(pairs), dtype=int), z)
    metrics, intervals = _summary(answers)
    metrics["difference_r1"] = recall_at_1(subject.clip.embed_texts(texts), pair_differences(subject.z, pairs))
    return Result(metrics, len(found), {"sentences": subject.config.difference.sentences}, intervals=intervals)


# -- sentences of a file, about classes ----------------------------------------------------------------


def _of_classes(subject: Subject, found: list[Difference], question: Question) -> Result:
    """The same for sentences on how one class differs from another: each draw shows two images of the two classes.

    caption_subtraction is that of the two classes' ordinary prompts.
    """
    classes = differences.rows(found, question.classes, subject.config.difference.sentences)  # [S, 2]
    of_class = [question.rows[question.target == k] for k in range(len(question.classes))]
    absent = sorted({question.classes[k] for k in np.unique(classes) if not len(of_class[k])})
    if absent:
        raise UserError(
            f"{subject.data.label} shows no {absent[0]}, which {subject.config.difference.sentences} speaks of"
        )
    rng = stream(subject.config.seed, "images of classes")
    sentence = np.tile(np.arange(len(found)), subject.config.difference.draws)
    pairs = np.array([[rng.choice(of_class[k]) for k in classes[n]] for n in sentence])
    draw = np.repeat(np.arange(subject.config.difference.draws), len(found))
    named = None
    if subject.base is not None:
        named = pair_differences(
            class_embeddings(subject.base, question, templates_of(question, subject.config)), classes
        )[sentence]
    answers = _of_sentences(subject, [found[n].text for n in sentence], pairs, draw, named)
    metrics, intervals = _summary(answers)
    error = dict(zip(answers.names, standard_errors(answers.by_draw())))
    details = {
        "sentences": subject.config.difference.sentences,
        "classes": len(np.unique(classes)),
        "standard_error": error,
    }
    return Result(metrics, len(pairs), details, intervals=intervals)


def _of_sentences(
    subject: Subject, texts: list[str], pairs: np.ndarray, draw: np.ndarray, named: Tensor | None
) -> Answers:
    """named: [P, D], the directions of two captions in the untrained model, for caption_subtraction."""
    gaps = pair_differences(subject.z, pairs)
    cosine = cosines(subject.clip, texts, gaps)
    right = {"sign": (cosine > 0).double()}
    swapped = {n: swap for n, text in enumerate(texts) if (swap := swap_roles(text))}
    if swapped:
        rows = torch.tensor(list(swapped))
        against = torch.full_like(cosine, torch.nan)
        against[rows] = cosines(subject.clip, list(swapped.values()), gaps[rows])
        known = ~against.isnan()
        right["two_way"] = torch.where(known, cosine > against, torch.nan)
        right["mirrored"] = torch.where(known, against < 0, torch.nan)
    if named is not None:
        right["caption_subtraction"] = ((pair_differences(subject.base_z, pairs) * named).sum(-1) > 0).double()
    return Answers.of(right, pairs, draw)


def _summary(answers: Answers) -> tuple[dict[str, float], dict[str, tuple[float, float]]]:
    """Means and intervals of each figure over the pairs it is defined on."""
    metrics, intervals = {}, {}
    for name, right in zip(answers.names, answers.right.T):
        known = ~np.isnan(right)
        metrics[name] = float(right[known].mean())
        intervals[name] = _intervals.of_pairs(right[known, None], answers.pairs[known])[0]
    return metrics, intervals


def recall_at_1(text: Tensor, gaps: Tensor, candidates: int = CANDIDATES) -> float:
    """How often a sentence's own pair is the nearest of `candidates` pairs. text, gaps: [P, D] unit vectors.

    Over disjoint blocks; a rest smaller than a block is left out unless it is all there is. A tie for the
    first place among k counts 1/k.
    """
    block = min(candidates, len(text))
    hits = []
    for start in range(0, len(text) - block + 1, block):
        cosine = text[start : start + block] @ gaps[start : start + block].T  # [sentence, pair]
        best = cosine == cosine.max(1, keepdim=True).values
        hits.append(best.diagonal().double() / best.sum(1))
    return float(torch.cat(hits).mean())


def cosines(clip: Clip, texts: Sequence[str], gaps: Tensor) -> Tensor:
    """Of each pair's sentence with the difference of its images. gaps: [P, D] unit differences.  -> [P]"""
    return (clip.embed_texts(texts) * gaps).sum(-1)


def pair_differences(z: Tensor, pairs: np.ndarray) -> Tensor:
    """Unit differences of rows of z: [N, D], [P, 2] -> [P, D]. Zero where two rows are equal."""
    return F.normalize(z[torch.from_numpy(pairs[:, 0])] - z[torch.from_numpy(pairs[:, 1])], dim=-1)
