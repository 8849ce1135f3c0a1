"""Difference sentences in held-out families of wordings and held-out naming schemes.

The same fact about the same pairs of images, in each family of wordings and each scheme of names for the two images
(data/wordings.yaml). Families and schemes that are held out are in no training sentence of ours; the figures that
count are theirs, and the worst stands beside the mean:

    two_way_FAMILY, r1_FAMILY    a family, in names of schemes that are not held out
    two_way_SCHEME, r1_SCHEME    a held-out scheme, mean over all families
    unseen, unseen_worst         two_way of the held-out families: mean, and the worst of them
    unseen_names                 two_way of the held-out schemes: mean over families, of the worst scheme
    unseen_names_worst           the worst family of any of them
    unseen_r1                    mean over all held-out wordings that tell of both images; one-sided ones do not
    consistency                  the share of pairs that are judged alike in every template of the held-out families
    consistency_names            the same in every family under held-out names

two_way: the true sentence is nearer to the difference of the two images than its opposite (chance 50). r1: its own
pair is the nearest of 100 (chance 1). subtraction and caption_subtraction_r1: the untrained model without any
training, by the two phrases subtracted. The phrases are a data set's graded attributes, or else captions; r1 is for
captions alone, since many pairs share an attribute.
"""

from __future__ import annotations

import itertools
import logging
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pc_clip.core.config.evaluate import EvaluateConfig
from pc_clip.core.errors import UserError, check_at_least
from pc_clip.core.random import stream
from pc_clip.data import attributes
from pc_clip.data.dataset import Dataset
from pc_clip.data.differences import choose_pairs
from pc_clip.data.wordings import FAMILIES, HELD_OUT_FAMILIES, HELD_OUT_SCHEMES, SCHEMES, Wording, Wordings, as_phrase
from pc_clip.evals import EvalContext, Result
from pc_clip.evals.answers import draw_pairs, pair_differences, recall_at_1, warn_of_rest
from pc_clip.metrics import intervals

log = logging.getLogger(__name__)

VERSION = 2  # held-out families template by template
ONE_SIDED = "one_sided"  # the family that says of one image alone what it shows


def applies(data: Dataset, config: EvaluateConfig) -> str | None:
    known = data.attributes or attributes.tasks_of(data.name) or data.captions
    return None if known else "a data set with captions or graded attributes"


class Facts(NamedTuple):
    """P pairs of images, [P, 2] rows, and phrases for what each image of a pair shows.

    plain: the same of one image without the other, for caption subtraction.
    """

    pairs: np.ndarray
    first: list[str]
    second: list[str]
    plain: tuple[list[str], list[str]]


def evaluate(context: EvalContext) -> Result:
    options = context.config.wordings
    check_at_least("wordings.n_pairs", options.n_pairs, 1)
    families = options.families or HELD_OUT_FAMILIES
    schemes = options.schemes or HELD_OUT_SCHEMES
    usual = options.trained_schemes or [name for name in SCHEMES if name not in schemes]
    Wordings(families, [*schemes, *usual])  # raises for an unknown name
    by_captions = not context.attributes
    facts = _of_captions(context) if by_captions else _of_attributes(context)
    gaps = pair_differences(context.z, facts.pairs)  # [P, D]
    if by_captions:
        warn_of_rest(len(gaps))

    two_way: dict[tuple[str, str], Tensor] = {}  # (family, scheme) -> [W, P]; the scheme is "" for the usual ones
    r1: dict[tuple[str, str], float] = {}
    for scheme, family in itertools.product(("", *schemes), FAMILIES):
        rng = stream(context.config.seed, f"wordings {family} {scheme}")
        wordings = Wordings([family], [scheme] if scheme else usual)
        # Of a held-out family each template is asked of each pair, of others one that is drawn.
        templates = FAMILIES[family] if family in families and not scheme else (None,)
        answers = [_ask(context, facts, gaps, [wordings.draw(rng, t) for _ in facts.first]) for t in templates]
        two_way[family, scheme] = torch.stack([right for right, _ in answers])
        r1[family, scheme] = float(np.mean([recall for _, recall in answers]))

    groups = {family: [(family, "")] for family in FAMILIES}
    groups |= {scheme: [(family, scheme) for family in FAMILIES] for scheme in schemes}
    unseen = [cell for cell in two_way if cell[1] or cell[0] in families]
    right = {f"two_way_{name}": _share_right(two_way, cells) for name, cells in groups.items()}
    right["unseen"] = _share_right(two_way, [(family, "") for family in families])
    right["consistency"] = _judged_alike(two_way, [(family, "") for family in families])
    right["consistency_names"] = _judged_alike(two_way, [cell for cell in unseen if cell[1]])
    metrics = {name: float(share.mean()) for name, share in right.items()}
    metrics["unseen_worst"] = min(metrics[f"two_way_{family}"] for family in families)
    metrics["unseen_names"] = min(metrics[f"two_way_{scheme}"] for scheme in schemes)
    metrics["unseen_names_worst"] = min(float(two_way[cell].double().mean()) for cell in unseen if cell[1])
    if by_captions:
        metrics |= {f"r1_{name}": float(np.mean([r1[cell] for cell in cells])) for name, cells in groups.items()}
        metrics["unseen_r1"] = float(np.mean([r1[cell] for cell in unseen if cell[0] != ONE_SIDED]))
    if context.base is not None:
        first, second = (context.base.embed_texts(phrases) for phrases in facts.plain)
        of_base, subtracted = pair_differences(context.base_z, facts.pairs), F.normalize(first - second, dim=-1)
        right["subtraction"] = ((subtracted * of_base).sum(-1) > 0).double()
        metrics["subtraction"] = float(right["subtraction"].mean())
        if by_captions:
            metrics["caption_subtraction_r1"] = recall_at_1(subtracted, of_base)
    bounds = intervals.of_pairs(torch.stack(list(right.values()), dim=1).numpy(), facts.pairs)
    cells = {
        f"{family}, {scheme or 'usual names'}": float(v.double().mean()) for (family, scheme), v in two_way.items()
    }
    details = {"held_out_families": list(families), "held_out_schemes": list(schemes), "two_way": cells}
    details["wordings_judged_alike"] = sum(len(FAMILIES[family]) for family in families)
    return Result(metrics, len(facts.pairs), details, intervals=dict(zip(right, bounds)))


def _ask(context: EvalContext, facts: Facts, gaps: Tensor, drawn: list[Wording]) -> tuple[Tensor, float]:
    """Each pair in one wording: whether the true sentence is nearer than its opposite, [P] bool, and R@1."""
    true = context.clip.embed_texts([w.say(a, b) for w, a, b in zip(drawn, facts.first, facts.second)])
    opposite = context.clip.embed_texts([w.say(b, a) for w, a, b in zip(drawn, facts.first, facts.second)])
    return ((true - opposite) * gaps).sum(-1) > 0, recall_at_1(true, gaps)


def _judged_alike(two_way: dict[tuple[str, str], Tensor], cells: list[tuple[str, str]]) -> Tensor:
    """Whether each pair is judged right in all wordings of some cells, or wrong in all.  -> [P] float64"""
    judged = torch.cat([two_way[cell] for cell in cells])
    return (judged.all(0) | ~judged.any(0)).double()


def _share_right(two_way: dict[tuple[str, str], Tensor], cells: list[tuple[str, str]]) -> Tensor:
    """Fraction of wordings in which each pair is judged correctly.  -> [P] float64"""
    return torch.stack([two_way[cell].double().mean(0) for cell in cells]).mean(0)


def _of_captions(context: EvalContext) -> Facts:
    """Distinct pairs of images in random order, with a caption of each."""
    captions, seed = context.data.captions, context.config.seed
    rows = [row for row, texts in enumerate(captions) if texts]
    if len(rows) < 2:
        raise UserError(f"{context.data.label} has captions of {len(rows)} images; a difference needs two")
    n = min(context.config.wordings.n_pairs, len(rows) * (len(rows) - 1) // 2)
    pairs, rng = np.array(choose_pairs(rows, n, seed, both_orders=False)), stream(seed, "wordings captions")
    phrases = [[as_phrase(captions[row][int(rng.integers(len(captions[row])))]) for row in pair] for pair in pairs]
    differ = [first != second for first, second in phrases]
    if not all(differ):
        log.info("  %d of %d pairs are left out: their captions say the same", differ.count(False), len(differ))
    if not any(differ):
        raise UserError(f"no two captions of {context.data.label} say different things")
    first, second = map(list, zip(*itertools.compress(phrases, differ)))
    return Facts(pairs[differ], first, second, (first, second))


def _of_attributes(context: EvalContext) -> Facts:
    """Pairs that clearly differ in an attribute, each attribute as often."""
    pairs, phrases = [], []
    each = -(-context.config.wordings.n_pairs // len(context.attributes))
    for number, attribute in enumerate(context.attributes):
        of_attribute = draw_pairs(attribute, each, stream(context.config.seed, "wordings pairs", number))
        up = attribute.value[of_attribute[:, 0]] > attribute.value[of_attribute[:, 1]]
        pairs.append(of_attribute)
        more, less = (attribute.more, attribute.high), (attribute.less, attribute.low)
        phrases += [(*more, *less) if of_first else (*less, *more) for of_first in up]
    first, plain_first, second, plain_second = map(list, zip(*phrases))
    return Facts(np.concatenate(pairs), first, second, (plain_first, plain_second))
