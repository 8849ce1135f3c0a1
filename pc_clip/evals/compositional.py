"""Does an image prefer its caption to one with a small, wrong change? SugarCrepe, ARO, VALSE, and files of that kind.

Captions are all positives, so text-only biases alone can score above chance (hence the baselines that need no image,
evals/blind_baselines.py). Intervals draw photographs again.

Figures are named by where the statements come from: sugarcrepe (Hsieh et al. 2023; its seven files), aro_relation and
aro_attribution (Yuksekgonul et al. 2023), valse (Parcalabescu et al. 2022; a kind for each of its eleven files), and
compositional for any other file.
"""

from __future__ import annotations

import re

import numpy as np

from pc_clip.core.config.evaluate import EvaluateConfig
from pc_clip.core.errors import UserError
from pc_clip.data.dataset import Dataset, Statement
from pc_clip.data.groups import form_of
from pc_clip.evals import EvalContext, Result, blind_baselines
from pc_clip.evals.blind_baselines import right
from pc_clip.metrics import intervals

SUGAR_CREPE = {"add_att", "add_obj", "replace_att", "replace_obj", "replace_rel", "swap_att", "swap_obj"}
ARO_FEWEST = {"aro_relation": 1, "aro_attribution": 25}  # statements of a kind that counts in ARO's own macro mean
MANY = 12  # kinds; beyond it they are in the details alone


def applies(data: Dataset, config: EvaluateConfig) -> str | None:
    own = data.statements and all(s.true for s in data.statements)
    if form_of(config.statements) is None if config.statements else own:
        return None
    return (
        "captions, each with one that is wrong: --statements PATH (SugarCrepe's, ARO's or VALSE's files, or your own "
        "with image, caption and negative_caption), and a data set that holds their images (coco)"
    )


def evaluate(context: EvalContext) -> Result:
    """The share of captions that are preferred, by family and kind, and the baselines without an image.

    FAMILY, FAMILY_KIND: the image is closer to its caption than to the changed one; a tie counts half. _blind_grey,
    _blind_mean: with a grey picture, or the mean embedding of the images, in place of every image. _text_only:
    logistic regression on the caption's embedding less the changed one's, learnt from other photographs' captions.
    aro_*_macro: the mean over relations, or over pairs of attributes that have 25 captions. Every relation counts;
    ARO's tables leave out those that read alike both ways.
    Raises UserError where some statements are false, and where none of the images is there.
    """
    if false := sum(not s.true for s in context.statements):
        raise UserError(
            f"{false} of {len(context.statements)} statements are false of their images; --mode relations is for true "
            "and false ones, and --mode compositional for captions that all are true"
        )
    asked, seed = blind_baselines.ask(context), context.config.seed
    result = Result({}, len(asked.statements), {"absent": asked.absent})
    families = np.array([_family(s) for s in asked.statements])
    kinds = np.array([s.kind for s in asked.statements])
    for family in np.unique(families).tolist():
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
    return statement.category if statement.category in (*ARO_FEWEST, "valse") else "compositional"


def _add(
    result: Result, family: str, answers: dict[str, np.ndarray], kinds: np.ndarray, photograph: np.ndarray, seed: int
) -> None:
    """Put one family's figures into the result."""
    by_kind = {str(kind): kinds == kind for kind in np.unique(kinds) if kind}
    columns = dict(answers)
    if family == "sugarcrepe":
        columns["sugarcrepe_blind"] = answers["sugarcrepe_blind_mean"]  # the name that earlier tables have
    if len(by_kind) <= MANY:
        words = np.array([_word(kind) for kind in kinds])  # "left of" and "left-of" are one
        for word in map(_word, by_kind):  # a kind does not take the name of a baseline
            columns.setdefault(f"{family}_{word}", np.where(words == word, answers[family], np.nan))
    metrics, known = intervals.of_columns(columns, photograph, seed)
    result.metrics |= metrics
    result.intervals |= known
    if family in ARO_FEWEST:  # ARO's own figure: each kind counts alike, if it has enough captions
        enough = [here for here in by_kind.values() if here.sum() >= ARO_FEWEST[family]]
        if enough:
            of_kinds = np.where(np.stack(enough, axis=1), answers[family][:, None], np.nan)
            macro = np.nanmean(intervals.redrawn_means(of_kinds, photograph, seed), axis=1)
            result.metrics[f"{family}_macro"] = float(np.nanmean(of_kinds, axis=0).mean())
            result.intervals[f"{family}_macro"] = intervals.between(macro)
    result.items[family] = blind_baselines.by_photograph(answers[family], photograph)
    result.details[family] = blind_baselines.against(family, answers, photograph, seed) | {
        "statements": len(kinds),
        "photographs": len(np.unique(photograph)),
        "tied": float((answers[family] == 0.5).mean()),
        "kinds": {
            kind: {"n": int(here.sum())} | {name: float(values[here].mean()) for name, values in answers.items()}
            for kind, here in by_kind.items()
        },
    }


def _word(kind: str) -> str:
    return re.sub(r"\W+", "_", kind.lower())
