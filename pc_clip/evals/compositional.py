"""Does an image prefer its caption to one with a small, wrong change? SugarCrepe, ARO, and files of that kind.

Captions are all positives, so text-only biases alone can score above chance (hence the baselines that need no image,
evals/blind_baselines.py). Intervals draw photographs again.

Figures are named by where the statements come from: sugarcrepe (Hsieh et al. 2023; its seven files), aro_relation and
aro_attribution (Yuksekgonul et al. 2023), and compositional for any other file.
"""

from __future__ import annotations

import re

import numpy as np

from pc_clip.core.config.evaluate import EvaluateConfig
from pc_clip.core.errors import UserError
from pc_clip.data.dataset import Dataset, Statement
from pc_clip.evals import EvalContext, Result, blind_baselines
from pc_clip.evals.blind_baselines import right
from pc_clip.metrics import intervals

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


def applies(data: Dataset, config: EvaluateConfig) -> str | None:
    if config.statements or (data.statements and all(s.true for s in data.statements)):
        return None
    return (
        "captions, each with one that is wrong: --statements PATH (SugarCrepe's or ARO's files, or your own with "
        "image, caption and negative_caption), and a data set that holds their images (coco)"
    )


def evaluate(context: EvalContext) -> Result:
    """The share of captions that are preferred, by family and kind, and the baselines without an image.

    Raises UserError where some statements are false, and where none of the images is there.
    """
    seed = context.config.seed
    statements = blind_baselines.statements_of(context.data, context.config)
    if false := sum(not s.true for s in statements):
        raise UserError(
            f"{false} of {len(statements)} statements are false of their images; --mode relations is for true and "
            "false ones, and --mode compositional for captions that all are true"
        )
    asked = blind_baselines.ask(context, statements)
    result = Result({}, len(asked.statements), {"absent": asked.absent, "definitions": DEFINITIONS})
    families = np.array([_family(s) for s in asked.statements])
    kinds = np.array([s.kind for s in asked.statements])
    for family in sorted(set(families)):
        here = families == family
        answers = {family: right(asked.looking[here]), f"{family}_blind_grey": right(asked.grey[here]),
                   f"{family}_blind_mean": right(asked.mean[here])}  # fmt: skip
        by_text = blind_baselines.tell_texts_apart(asked.gap[here], asked.photograph[here], seed)
        if by_text is not None:
            answers[f"{family}_text_only"] = right(by_text)
        _add(result, family, answers, kinds[here], asked.photograph[here], seed)
    return result


def _family(statement: Statement) -> str:
    if statement.kind in SUGAR_CREPE:
        return "sugarcrepe"
    return statement.category if statement.category in ARO_FEWEST else "compositional"


def _add(
    result: Result, family: str, answers: dict[str, np.ndarray], kinds: np.ndarray, photograph: np.ndarray, seed: int
) -> None:
    """Put one family's figures into the result."""
    by_kind = {str(kind): kinds == kind for kind in np.unique(kinds) if kind}
    columns = dict(answers)
    if family == "sugarcrepe":
        columns["sugarcrepe_blind"] = answers["sugarcrepe_blind_mean"]
    if len(by_kind) <= MANY:
        words = np.array([_word(kind) for kind in kinds])  # "left of" and "left-of" are one
        for word in map(_word, by_kind):  # a kind does not take the name of a baseline
            columns.setdefault(f"{family}_{word}", np.where(words == word, answers[family], np.nan))
    values = np.stack(list(columns.values()), axis=1)
    redrawn = intervals.redrawn_means(values, photograph, seed)
    result.metrics |= dict(zip(columns, np.nanmean(values, axis=0).tolist()))
    result.intervals |= dict(zip(columns, map(intervals.between, redrawn.T)))
    fewest = ARO_FEWEST.get(family, len(kinds) + 1)
    large = [np.where(here, answers[family], np.nan) for here in by_kind.values() if here.sum() >= fewest]
    if large:  # ARO's own figure: each kind counts alike, if it has enough captions
        columns_of_kinds = np.stack(large, axis=1)
        macro = np.nanmean(intervals.redrawn_means(columns_of_kinds, photograph, seed), axis=1)
        result.metrics[f"{family}_macro"] = float(np.nanmean(columns_of_kinds, axis=0).mean())
        result.intervals[f"{family}_macro"] = intervals.between(macro)
    result.items[family] = blind_baselines.by_photograph(answers[family], photograph)
    margins = blind_baselines.against(family, answers, photograph, seed)
    result.details[family] = {
        "beats_blind": blind_baselines.beats(margins, f"{family} {100 * result.metrics[family]:.1f}"),
        "above": {name: margin._asdict() for name, margin in margins.items()},
        "statements": len(kinds),
        "photographs": len(np.unique(photograph)),
        "tied": float((answers[family] == 0.5).mean()),
        "kinds": {
            kind: {"n": int(here.sum())} | {name: float(right[here].mean()) for name, right in answers.items()}
            for kind, here in by_kind.items()
        },
    } | ({} if f"{family}_text_only" in answers else {"left_out": blind_baselines.TOO_FEW})


def _word(kind: str) -> str:
    return re.sub(r"\W+", "_", kind.lower())
