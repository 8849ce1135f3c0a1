"""Does an image prefer its caption to one with a small, wrong change? SugarCrepe, ARO, and files of that kind.

All captions are true, so that what their writer's hand gives away is worth points to who never looks: a caption may
just be the more likely sentence. What needs no image stands beside every figure (evals/blind_baselines.py), and
intervals draw photographs again.

Figures are named by where the statements come from: sugarcrepe (Hsieh et al. 2023; its seven files), aro_relation and
aro_attribution (Yuksekgonul et al. 2023), and compositional for any other file.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from pc_clip.core.config.evaluate import EvaluateConfig
from pc_clip.core.errors import UserError
from pc_clip.data.dataset import Dataset, Statement
from pc_clip.evals import Result, Subject, blind_baselines
from pc_clip.evals.blind_baselines import right
from pc_clip.metrics import intervals as _intervals

VERSION = 2  # ties count half, and blind baselines have a name each
SUGAR_CREPE = {"add_att", "add_obj", "replace_att", "replace_obj", "replace_rel", "swap_att", "swap_obj"}
ARO_FEWEST = {"aro_relation": 1, "aro_attribution": 25}  # statements of a kind that counts in ARO's own macro mean
MANY = 12  # kinds; beyond it they are in the details alone

DEFINITIONS = {
    "FAMILY": "The image is closer to its caption than to the changed one; a tie counts as half right.",
    "FAMILY_KIND": "The same for one file, or one kind of a file.",
    "FAMILY_blind_grey": "The same with a constant grey picture in place of every image.",
    "FAMILY_blind_mean": "The same with the mean embedding of the images asked about in place of every image.",
    "FAMILY_text_only": "Logistic regression on the caption's embedding less the changed one's, learnt from other "
    "photographs' captions.",
    "sugarcrepe_blind": "sugarcrepe_blind_mean, under the name that earlier tables have.",
    "aro_*_macro": "The mean over relations, or over pairs of attributes that have 25 captions. Every relation counts; "
    "ARO's tables leave out those that read alike both ways.",
}

NEEDS = (
    "captions, each with one that is wrong: --statements PATH (SugarCrepe's or ARO's files, or your own with image, "
    "caption and negative_caption), and a data set that holds their images (coco)"
)


def applies(data: Dataset, config: EvaluateConfig) -> bool:
    return bool(config.statements) or (bool(data.statements) and all(s.true for s in data.statements))


def evaluate(subject: Subject) -> Result:
    """The share of captions that are preferred, by family and kind, and what it comes to without looking.

    Raises UserError where some statements are false, and where none of the images is there.
    """
    seed = subject.config.seed
    statements = _all_true(blind_baselines.statements_of(subject.data, subject.config))
    asked = blind_baselines.ask(subject, statements)
    found = Result({}, len(asked.statements), {"absent": asked.absent, "definitions": DEFINITIONS})
    families = np.array([_family(s) for s in asked.statements])
    kinds = np.array([s.kind for s in asked.statements])
    for family in sorted(set(families)):
        here = families == family
        answers = {family: right(asked.looking[here]), f"{family}_blind_grey": right(asked.grey[here]),
                   f"{family}_blind_mean": right(asked.mean[here])}  # fmt: skip
        by_text = blind_baselines.tell_texts_apart(asked.gap[here], asked.photograph[here], seed)
        if by_text is not None:
            answers[f"{family}_text_only"] = right(by_text)
        _add(found, family, answers, kinds[here], asked.photograph[here], seed)
    return found


def _all_true(statements: Sequence[Statement]) -> Sequence[Statement]:
    if false := sum(not s.true for s in statements):
        raise UserError(
            f"{false} of {len(statements)} statements are false of their images; --mode relations is for true and "
            "false ones, and --mode compositional for captions that all are true"
        )
    return statements


def _family(statement: Statement) -> str:
    if statement.kind in SUGAR_CREPE:
        return "sugarcrepe"
    return statement.category if statement.category in ARO_FEWEST else "compositional"


def _add(
    found: Result, family: str, answers: dict[str, np.ndarray], kinds: np.ndarray, photograph: np.ndarray, seed: int
) -> None:
    """Put one family's figures into the result."""
    shares = dict(answers)
    if family == "sugarcrepe":
        shares["sugarcrepe_blind"] = answers["sugarcrepe_blind_mean"]
    of = {str(kind): kinds == kind for kind in np.unique(kinds) if kind}
    if len(of) <= MANY:
        words = np.array([_word(kind) for kind in kinds])  # "left of" and "left-of" are one
        named = {f"{family}_{word}": np.where(words == word, answers[family], np.nan) for word in map(_word, of)}
        shares = shares | named | shares  # a kind does not take the name of what never looks
    values = np.stack(list(shares.values()), axis=1)
    redrawn = _intervals.redrawn_means(values, photograph, seed)
    means = dict(zip(shares, np.nanmean(values, axis=0).tolist()))
    found.metrics.update(means)
    found.intervals.update(zip(shares, map(_intervals.between, redrawn.T)))
    if family in ARO_FEWEST:
        _add_macro(found, family, answers[family], list(of.values()), photograph, seed)
    found.items[family] = blind_baselines.by_photograph(answers[family], photograph)
    above = blind_baselines.against(family, answers, photograph, seed)
    found.details[family] = {
        "beats_blind": blind_baselines.beats(above, f"{family} {100 * means[family]:.1f}"),
        "above": {name: each._asdict() for name, each in above.items()},
        "statements": len(kinds),
        "photographs": len(np.unique(photograph)),
        "tied": float((answers[family] == 0.5).mean()),
        "kinds": {kind: _told(answers, here) for kind, here in of.items()},
    } | ({} if f"{family}_text_only" in answers else {"left_out": blind_baselines.TOO_FEW})


def _add_macro(
    found: Result, family: str, right: np.ndarray, of: list[np.ndarray], photograph: np.ndarray, seed: int
) -> None:
    """ARO's own figure: each kind counts alike, if it has enough captions."""
    large = [np.where(here, right, np.nan) for here in of if here.sum() >= ARO_FEWEST[family]]
    if large:
        by_kind = np.stack(large, axis=1)
        redrawn = np.nanmean(_intervals.redrawn_means(by_kind, photograph, seed), axis=1)
        found.metrics[f"{family}_macro"] = float(np.nanmean(by_kind, axis=0).mean())
        found.intervals[f"{family}_macro"] = _intervals.between(redrawn)


def _word(kind: str) -> str:
    return re.sub(r"\W+", "_", kind.lower())


def _told(answers: dict[str, np.ndarray], here: np.ndarray) -> dict[str, Any]:
    return {"n": int(here.sum())} | {name: float(values[here].mean()) for name, values in answers.items()}
