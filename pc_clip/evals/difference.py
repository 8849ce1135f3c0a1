"""Does the embedding of a difference sentence point along the difference of the two images?

PC-CLIP's difference classification (arXiv 2409.09721): is cos(text, z_i - z_j) > 0 for a sentence that is
true of (i, j)? That figure flatters, so its companions are reported with it: two_way (the true sentence
against its opposite), reversed (the same fact with the second image mentioned first) and caption_subtraction (two plain
phrases and the untrained model, without training). The sentences are in the plain wordings; mode wordings asks in
many others.

Pairs are drawn `draws` times; figures are means over the draws, their standard error is in the details, and
the interval accounts for images that stand in many pairs.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pc_clip.core.config.evaluate import EvaluateConfig
from pc_clip.core.errors import UserError, check_at_least
from pc_clip.core.random import seed_of, stream
from pc_clip.data import attributes, differences
from pc_clip.data.dataset import Attribute, Dataset, Question
from pc_clip.data.wordings import contrast, swap_roles
from pc_clip.evals import EvalContext, Result
from pc_clip.evals.answers import Answers, by_task, draw_pairs, interval_of, pair_differences, recall_at_1, warn_of_rest
from pc_clip.evals.prompting import class_embeddings, templates_of
from pc_clip.metrics import intervals
from pc_clip.models.clip import Clip

log = logging.getLogger(__name__)

VERSION = 2  # what was called unseen went to mode wordings
LACKING = "a data set with graded attributes (example, awa2, cifar100, flowers102), or --difference.sentences FILE"


def applies(data: Dataset, config: EvaluateConfig) -> str | None:
    graded = attributes.known_of(data, config)
    return None if graded or config.difference.sentences else LACKING


def evaluate(context: EvalContext) -> Result:
    """Evaluate the sentences of --difference.sentences, or those of the data set's attributes."""
    check_at_least("difference.n_pairs", context.config.difference.n_pairs, 1)
    check_at_least("difference.draws", context.config.difference.draws, 1)
    return _about_sentences(context) if context.config.difference.sentences else about_attributes(context)


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


def about_attributes(context: EvalContext, companions: bool = True) -> Result:
    """The figures of the graded attributes, over all, by task and by attribute.

    Which pairs are asked about depends on settings and data alone and not on the model.
    """
    options, seed = context.config.difference, context.config.seed
    answers = []
    for k, attribute in enumerate(context.attributes):
        seeds = [seed_of(seed, "draw", k, draw) for draw in range(options.draws)]
        answers.append(answer(context, draw_claims(attribute, options.n_pairs, seeds), companions))
    result = Result({}, sum(len(each.pairs) for each in answers), {"standard_error": {}})
    groups = by_task(context.attributes, answers)
    _add(result, list(groups.values()))
    for task, members in groups.items():
        _add(result, [members], f"_{task}")
    for attribute, answered in zip(context.attributes, answers):
        by_draw = answered.by_draw()
        result.details[attribute.name] = {
            **dict(zip(answered.names, by_draw.mean(0).tolist())),
            "standard_error": dict(zip(answered.names, intervals.standard_errors(by_draw))),
            "pairs": int(np.bincount(answered.draw).max()),
        }
    return result


def answer(context: EvalContext, claims: Claims, companions: bool) -> Answers:
    """Which claims are answered rightly: difference and two_way, which models are chosen by, and their companions."""
    clip, gaps = context.clip, pair_differences(context.z, claims.pairs)  # [P, D]
    cosine = cosines(clip, claims.text, gaps)
    right = {"difference": cosine > 0, "two_way": cosine > cosines(clip, claims.opposite, gaps)}
    if companions:
        right["reversed"] = cosines(clip, claims.reversed, gaps) > 0
    if companions and context.base is not None:
        high, low = context.base.embed_texts([claims.attribute.high, claims.attribute.low])
        along = pair_differences(context.base_z, claims.pairs) @ (high - low)
        right["caption_subtraction"] = (along > 0) == torch.from_numpy(claims.up)
    return Answers.of(right, claims.pairs, claims.draw)


def _add(result: Result, groups: Sequence[Sequence[Answers]], suffix: str = "") -> None:
    """Put means into the result, with intervals and standard errors over draws.

    Each group counts alike, and within it each attribute.
    """
    names = [f"{name}{suffix}" for name in groups[0][0].names]
    by_draw = np.mean([np.mean([each.by_draw() for each in group], axis=0) for group in groups], axis=0)  # [draws, K]
    result.metrics |= dict(zip(names, by_draw.mean(0).tolist()))
    result.intervals |= dict(zip(names, interval_of(groups)))
    result.details["standard_error"] |= dict(zip(names, intervals.standard_errors(by_draw)))


# -- sentences of a file -------------------------------------------------------------------------------


def _about_sentences(context: EvalContext) -> Result:
    """sign, two_way, mirrored and caption_subtraction of sentences about images, or about classes; of images R@1, too.

    mirrored: the sentence with first and second exchanged, on the pair in the other order. two_way and mirrored are
    over the sentences that name both images. caption_subtraction is by the difference of the images' first captions.
    Of sentences on how a class differs from another each draw shows two images of the two classes; then
    caption_subtraction is by the classes' ordinary prompts.
    """
    data, options = context.data, context.config.difference
    sentences = differences.read(options.sentences)
    question = next((q for q in data.questions if sentences[0].first in q.classes), None)
    question = None if sentences[0].first in set(data.ids) else question
    named = differences.rows(sentences, question.classes if question else data.ids, options.sentences, data.left_out)
    there = (named >= 0).all(1)
    if not there.any():
        raise UserError(f"of none of the {len(there)} sentences in {options.sentences} are both pictures there")
    named, sentences = named[there], [each for each, kept in zip(sentences, there) if kept]  # [S, 2]
    draws = options.draws if question else 1
    sentence = np.tile(np.arange(len(sentences)), draws)  # [P], which one is asked of a pair
    pairs = _draw_images(context, question, named[sentence]) if question else named
    texts, gaps = [sentences[n].text for n in sentence], pair_differences(context.z, pairs)
    cosine = cosines(context.clip, texts, gaps)
    right = {"sign": cosine > 0}
    swapped = [swap_roles(text) for text in texts]
    known = torch.tensor([swap is not None for swap in swapped])
    if known.any():
        of_swapped = cosines(context.clip, [swap or text for swap, text in zip(swapped, texts)], gaps)
        right["two_way"] = torch.where(known, cosine > of_swapped, torch.nan)
        right["mirrored"] = torch.where(known, of_swapped < 0, torch.nan)
    if (question or data.captions) and context.base is not None:  # in this order: loading the model takes time
        of_named = (
            class_embeddings(context.base, question, templates_of(question, context.config))
            if question
            else context.base.embed_texts([of_image[0] if of_image else "" for of_image in data.captions])
        )
        along = (pair_differences(context.base_z, pairs) * pair_differences(of_named, named)[sentence]).sum(-1)
        if question:
            has_caption = torch.ones(len(pairs), dtype=torch.bool)
        else:
            has_caption = torch.tensor([bool(data.captions[a] and data.captions[b]) for a, b in pairs])
        right["caption_subtraction"] = torch.where(has_caption, along > 0, torch.nan)
    left_out = int((~there).sum())
    if left_out:
        log.warning("  %d sentences are left out, because a picture of theirs is absent", left_out)
    result = Result({}, len(pairs), {"sentences": options.sentences, "left_out": left_out, "standard_error": {}})
    _add(result, [[Answers.of(right, pairs, np.repeat(np.arange(draws), len(sentences)))]])
    if question:
        result.details["classes"] = len(np.unique(named))
    else:
        warn_of_rest(len(texts))
        result.metrics["difference_r1"] = recall_at_1(context.clip.embed_texts(texts), gaps, pairs)
    return result


def _draw_images(context: EvalContext, question: Question, classes: np.ndarray) -> np.ndarray:
    """An image of each class. [P, 2] -> [P, 2] rows. Raises UserError for a class without images."""
    members = [question.rows[question.target == k] for k in range(len(question.classes))]
    if absent := sorted({question.classes[k] for k in np.unique(classes) if not len(members[k])}):
        file = context.config.difference.sentences
        raise UserError(f"{context.data.label} shows no {absent[0]}, which {file} speaks of")
    rng = stream(context.config.seed, "images of classes")
    return np.array([[rng.choice(members[k]) for k in pair] for pair in classes])


def cosines(clip: Clip, texts: Sequence[str], gaps: Tensor) -> Tensor:
    """Cosines of each pair's sentence with its image difference. gaps: [P, D] unit differences.  -> [P]"""
    return (clip.embed_texts(texts) * gaps).sum(-1)
