"""Does the embedding of a difference sentence point along the difference of the two images?

PC-CLIP's difference classification (arXiv 2409.09721): is cos(text, z_i - z_j) > 0 for a sentence that is
true of (i, j)? That figure flatters, so its companions are reported with it: two_way (the true sentence
against its opposite), reversed (the same fact told of the second image first) and caption_subtraction (two plain
phrases and the untrained model, without training). The sentences are in the plain wordings; mode wordings asks in
many others.

Pairs are drawn `draws` times; figures are means over the draws, their standard error is in the details, and
the interval accounts for images that stand in many pairs.
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
from pc_clip.data.differences import Difference
from pc_clip.data.wordings import contrast, swap_roles
from pc_clip.evals import EvalContext, Result
from pc_clip.evals.zeroshot import class_embeddings, templates_of
from pc_clip.metrics import intervals
from pc_clip.models.clip import Clip

VERSION = 2  # unseen went to mode wordings
CANDIDATES = 100  # of which one pair is a sentence's own, for difference_r1
LACKING = "a data set with graded attributes (example, awa2, cifar100, flowers102), or --difference.sentences FILE"


def applies(data: Dataset, config: EvaluateConfig) -> str | None:
    graded = data.attributes or attributes.tasks_of(data.name)
    return None if graded or config.difference.sentences else LACKING


def evaluate(context: EvalContext) -> Result:
    """With --difference.sentences that file's, about images or about classes; else the attributes' own."""
    check_at_least("difference.n_pairs", context.config.difference.n_pairs, 1)
    check_at_least("difference.draws", context.config.difference.draws, 1)
    if not context.config.difference.sentences:
        return _about_attributes(context)
    sentences = differences.read(context.config.difference.sentences)
    question = next((q for q in context.data.questions if sentences[0].first in q.classes), None)
    if question and sentences[0].first not in set(context.data.ids):
        return _about_classes(context, sentences, question)
    return _about_images(context, sentences)


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
        """[draws, K], each figure over the pairs it is defined on; NaN where there is none."""
        parts = [self.right[self.draw == d] for d in np.unique(self.draw)]
        known = [[column[~np.isnan(column)] for column in part.T] for part in parts]
        return np.array([[values.mean() if len(values) else np.nan for values in columns] for columns in known])


# -- graded attributes ---------------------------------------------------------------------------------


class Claims(NamedTuple):
    """True sentences about P pairs that clearly differ in an attribute, of all draws.

    draw: [P], the draw of a pair; pairs: [P, 2] rows; up: [P], whether the first has more; texts of length P.
    """

    attribute: Attribute
    draw: np.ndarray
    pairs: np.ndarray
    up: np.ndarray
    text: list[str]
    opposite: list[str]
    reversed: list[str]


def draw_claims(attribute: Attribute, n: int, seeds: Sequence[int]) -> Claims:
    """n pairs a seed, in random order, each with sentences about it. Raises UserError when no two images differ."""
    streams = [stream(seed, "claims") for seed in seeds]
    drawn = [draw_pairs(attribute, n, rng) for rng in streams]
    pairs, draw = np.concatenate(drawn), np.repeat(np.arange(len(drawn)), [len(each) for each in drawn])
    up = attribute.value[pairs[:, 0]] > attribute.value[pairs[:, 1]]
    # Even wordings tell of the first image first, odd ones do not.
    wording = 2 * np.concatenate([rng.integers(2, size=len(each)) for rng, each in zip(streams, drawn)])
    known = {(u, w): _wordings(attribute, u, w) for u in (True, False) for w in (0, 2)}
    texts = [known[each] for each in zip(up.tolist(), wording.tolist())]
    return Claims(attribute, draw, pairs, up, *map(list, zip(*texts)))


def _wordings(attribute: Attribute, up: bool, wording: int) -> tuple[str, str, str]:
    """A true sentence, its opposite, and the order-swapped form."""
    a, b = (attribute.more, attribute.less) if up else (attribute.less, attribute.more)
    return contrast(a, b, wording), contrast(b, a, wording), contrast(a, b, wording + 1)


def draw_pairs(attribute: Attribute, n: int, rng: np.random.Generator, tries: int = 200) -> np.ndarray:
    """n pairs of images that clearly differ in an attribute, with replacement, in random order.  -> [n, 2]

    Fewer when hardly any pair differs. Raises UserError when none does.
    """
    rows = np.flatnonzero(~np.isnan(attribute.value))
    value = attribute.value[rows]
    if len(rows) < 2 or value.max() - value.min() <= attribute.gap:
        raise UserError(f"no two of the images differ in {attribute.name}; it is known of {len(rows)} images")
    pairs = np.empty((0, 2), dtype=rows.dtype)
    for _ in range(tries):
        drawn = rng.choice(rows, size=(8 * n, 2))
        clear = np.abs(attribute.value[drawn[:, 0]] - attribute.value[drawn[:, 1]]) > attribute.gap
        pairs = np.concatenate([pairs, drawn[clear]])
        if len(pairs) >= n:
            break
    return pairs[:n]


def _about_attributes(context: EvalContext) -> Result:
    if not context.attributes:
        raise UserError(f"{context.data.label} has no graded attributes for mode difference; it needs {LACKING}")
    claims = ask(context)
    answers = [_answer_all(context, each) for each in claims]
    names, groups = answers[0].names, by_task(claims, answers)
    result = Result(overall(groups), sum(len(each.pairs) for each in answers))
    for each, answered in zip(claims, answers):
        by_draw = answered.by_draw()
        result.details[each.attribute.name] = {
            **dict(zip(names, by_draw.mean(0).tolist())),
            "standard_error": dict(zip(names, standard_errors(by_draw))),
            "pairs": int(np.bincount(answered.draw).max()),
        }
    by_draw = {task: np.mean([each.by_draw() for each in members], axis=0) for task, members in groups.items()}
    result.intervals = dict(zip(names, interval_of(list(groups.values()))))
    errors = dict(zip(names, standard_errors(np.mean(list(by_draw.values()), axis=0))))
    for task, members in groups.items():
        of_task = [f"{name}_{task}" for name in names]
        result.metrics |= dict(zip(of_task, by_draw[task].mean(0).tolist()))
        result.intervals |= dict(zip(of_task, interval_of([members])))
        errors |= dict(zip(of_task, standard_errors(by_draw[task])))
    result.details["standard_error"] = errors
    return result


def ask(context: EvalContext) -> list[Claims]:
    """The claims about each attribute, which depend on settings and data alone and not on the model."""
    options, seed = context.config.difference, context.config.seed
    seeds = [[seed_of(seed, "draw", k, d) for d in range(options.draws)] for k in range(len(context.attributes))]
    return [draw_claims(each, options.n_pairs, of_draws) for each, of_draws in zip(context.attributes, seeds)]


def answer(clip: Clip, z: Tensor, claims: Claims) -> Answers:
    """The two figures that models are chosen by, difference and two_way. z: [N, D] unit image embeddings."""
    gaps = pair_differences(z, claims.pairs)
    return Answers.of(_difference_and_two_way(clip, gaps, claims), claims.pairs, claims.draw)


def _answer_all(context: EvalContext, claims: Claims) -> Answers:
    """Those two and their companions."""
    gaps = pair_differences(context.z, claims.pairs)  # [P, D]
    right = _difference_and_two_way(context.clip, gaps, claims)
    right["reversed"] = cosines(context.clip, claims.reversed, gaps) > 0
    if context.base is not None:
        high, low = context.base.embed_texts([claims.attribute.high, claims.attribute.low])
        along = pair_differences(context.base_z, claims.pairs) @ (high - low)
        right["caption_subtraction"] = (along > 0) == torch.from_numpy(claims.up)
    return Answers.of(right, claims.pairs, claims.draw)


def _difference_and_two_way(clip: Clip, gaps: Tensor, claims: Claims) -> dict[str, Tensor]:
    cosine = cosines(clip, claims.text, gaps)
    return {"difference": cosine > 0, "two_way": cosine > cosines(clip, claims.opposite, gaps)}


def by_task(claims: Sequence[Claims], answers: Sequence[Answers]) -> dict[str, list[Answers]]:
    """The answers grouped by task; an attribute without a task is a group of its own."""
    groups: dict[str, list[Answers]] = {}
    for each, answered in zip(claims, answers):
        groups.setdefault(each.attribute.task or each.attribute.name, []).append(answered)
    return groups


def overall(groups: dict[str, list[Answers]]) -> dict[str, float]:
    """Means in which each task counts alike, and within it each attribute."""
    by_draw = [np.mean([each.by_draw() for each in members], axis=0) for members in groups.values()]
    return dict(zip(next(iter(groups.values()))[0].names, np.mean(by_draw, axis=0).mean(0).tolist()))


def standard_errors(by_draw: np.ndarray) -> list[float | None]:
    """Of the means over the draws, as far as drawing other pairs goes. [draws, K] -> K, None for a single draw."""
    known = [column[~np.isnan(column)] for column in by_draw.T]
    return [float(c.std(ddof=1) / np.sqrt(len(c))) if len(c) > 1 else None for c in known]


def interval_of(groups: Sequence[Sequence[Answers]]) -> list[tuple[float, float]]:
    """Of each figure's mean, in which each group counts alike, and within it each attribute."""
    answers = [(each, 1 / len(group) / len(each.pairs)) for group in groups for each in group]
    weight = np.concatenate([np.full(len(each.pairs), share) for each, share in answers])
    right, pairs = (np.concatenate([getattr(each, name) for each, _ in answers]) for name in ("right", "pairs"))
    return intervals.of_pairs(right, pairs, weight)


# -- sentences of a file -------------------------------------------------------------------------------


def _about_images(context: EvalContext, sentences: list[Difference]) -> Result:
    """sign, two_way, mirrored and R@1 among 100 pairs, for held-out sentences about these images.

    mirrored: the sentence with first and second exchanged, on the pair in the other order. two_way and
    mirrored are over the sentences that name both images.
    """
    file, captions = context.config.difference.sentences, context.data.captions
    pairs = differences.rows(sentences, context.data.ids, file)
    texts = [sentence.text for sentence in sentences]
    of_captions = None
    if captions and context.base is not None:  # in this order: loading the untrained model takes time
        of_captions = pair_differences(context.base.embed_texts([texts[0] for texts in captions]), pairs)
    answers = _answer_sentences(context, texts, pairs, np.zeros(len(pairs), dtype=int), of_captions)
    result = _means(answers, {"sentences": file})
    result.metrics["difference_r1"] = recall_at_1(context.clip.embed_texts(texts), pair_differences(context.z, pairs))
    return result


def _about_classes(context: EvalContext, sentences: list[Difference], question: Question) -> Result:
    """The same for sentences on how one class differs from another: each draw shows two images of the two classes.

    caption_subtraction is that of the two classes' ordinary prompts.
    """
    file, draws = context.config.difference.sentences, context.config.difference.draws
    classes = differences.rows(sentences, question.classes, file)  # [S, 2]
    members = [question.rows[question.target == k] for k in range(len(question.classes))]
    if absent := sorted({question.classes[k] for k in np.unique(classes) if not len(members[k])}):
        raise UserError(f"{context.data.label} shows no {absent[0]}, which {file} speaks of")
    rng = stream(context.config.seed, "images of classes")
    sentence = np.tile(np.arange(len(sentences)), draws)
    pairs = np.array([[rng.choice(members[k]) for k in classes[n]] for n in sentence])
    of_prompts = None
    if context.base is not None:
        prompts = class_embeddings(context.base, question, templates_of(question, context.config))
        of_prompts = pair_differences(prompts, classes)[sentence]
    texts = [sentences[n].text for n in sentence]
    answers = _answer_sentences(context, texts, pairs, np.repeat(np.arange(draws), len(sentences)), of_prompts)
    errors = dict(zip(answers.names, standard_errors(answers.by_draw())))
    return _means(answers, {"sentences": file, "classes": len(np.unique(classes)), "standard_error": errors})


def _answer_sentences(
    context: EvalContext, texts: list[str], pairs: np.ndarray, draw: np.ndarray, of_captions: Tensor | None
) -> Answers:
    """of_captions: [P, D], differences of two captions in the untrained model, for caption_subtraction."""
    gaps = pair_differences(context.z, pairs)
    cosine = cosines(context.clip, texts, gaps)
    right = {"sign": (cosine > 0).double()}
    swapped = {n: swap for n, text in enumerate(texts) if (swap := swap_roles(text))}
    if swapped:
        rows = torch.tensor(list(swapped))
        of_swapped = torch.full_like(cosine, torch.nan)
        of_swapped[rows] = cosines(context.clip, list(swapped.values()), gaps[rows])
        known = ~of_swapped.isnan()
        right["two_way"] = torch.where(known, cosine > of_swapped, torch.nan)
        right["mirrored"] = torch.where(known, of_swapped < 0, torch.nan)
    if of_captions is not None:
        along = (pair_differences(context.base_z, pairs) * of_captions).sum(-1)
        right["caption_subtraction"] = (along > 0).double()
    return Answers.of(right, pairs, draw)


def _means(answers: Answers, details: dict) -> Result:
    """Each figure's mean and interval over the pairs it is defined on."""
    result = Result({}, len(answers.pairs), details)
    for name, right in zip(answers.names, answers.right.T):
        known = ~np.isnan(right)
        result.metrics[name] = float(right[known].mean())
        result.intervals[name] = intervals.of_pairs(right[known, None], answers.pairs[known])[0]
    return result


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
