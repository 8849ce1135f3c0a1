"""Is a statement true of its image? Visual spatial reasoning (VSR; Liu, Emerson and Collier, TACL 2023).

The two candidates are the statement and its contradiction, which is built from the statement alone; the model says
"true" where the image is closer to the statement. Of a false statement's image the contradiction need not hold either
("left of", "right of"), so that even a perfect scorer may have less than 1. Baselines without an image stand beside
every figure (evals/blind_baselines.py), and intervals draw photographs again, with the same draws for all of them.

75 % of the captions in VSR's random test split occur in its train split, mostly with the opposite label: a text-only
lookup that flips the train label scores 73 %. Its zero-shot split shares no caption. prefers_caption_as_written, which
needs no image to be 1.000, is here because the CLIP-PO code reports it as accuracy.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from pc_clip.core.config.evaluate import EvaluateConfig
from pc_clip.core.errors import UserError
from pc_clip.data.dataset import Dataset, Statement
from pc_clip.data.groups import form_of
from pc_clip.evals import EvalContext, Result, blind_baselines
from pc_clip.evals.blind_baselines import right
from pc_clip.metrics import intervals

ENOUGH = 30  # statements of a category that has a metric of its own
MACRO = ("macro_recall", "macro_precision", "macro_f1")


def applies(data: Dataset, config: EvaluateConfig) -> str | None:
    if (config.statements and form_of(config.statements) is None) or len({s.true for s in data.statements}) == 2:
        return None
    return (
        "statements of which some are true and some false: --statements PATH (VSR's files, or your own with image, "
        "caption and label), or a data set that has them (example_relations)"
    )


def evaluate(context: EvalContext) -> Result:
    """Accuracy, macro recall, precision and F1, and the baselines without an image, with intervals.

    accuracy: the image is closer to the statement than to its contradiction if and only if the statement is true;
    blind, blind_mean: the same with a grey picture, or the mean embedding of the images, in place of every image.
    A tie counts half, in recall, precision and F1 as half of each answer.
    Raises UserError where all statements are true, or all false, and where none of their images is there.
    """
    seed = context.config.seed
    _check_both_labels(context.statements)
    asked = blind_baselines.ask(context)
    _check_both_labels(asked.statements, f" whose images are in {context.data.label}")
    true, photograph = np.array([s.true for s in asked.statements]), asked.photograph
    margins = {"accuracy": asked.looking, "blind": asked.grey, "blind_mean": asked.mean}
    answers = blind_baselines.judge(margins, asked.texts, true, photograph, seed)
    shares = answers | {
        "prefers_caption_as_written": right(asked.looking),
        "blind_prefers_caption_as_written": right(asked.grey),
    }
    categories = np.array([s.category.lower().replace(" ", "_") for s in asked.statements])
    for name in np.unique(categories):
        if name and (categories == name).sum() >= ENOUGH:
            shares[f"accuracy_{name}"] = np.where(categories == name, answers["accuracy"], np.nan)
    metrics, known = intervals.of_columns(shares, photograph, seed)
    answer = right(asked.looking)  # 1 for "true", 0 for "false"
    # How far each statement is a true positive, false negative, false positive, true negative: a 1, or two halves.
    confusion = np.stack([true * answer, true * (1 - answer), ~true * answer, ~true * (1 - answer)], axis=1)
    metrics |= dict(zip(MACRO, macro(confusion.sum(0)[None])[:, 0].tolist()))
    known |= dict(zip(MACRO, map(intervals.between, macro(intervals.redrawn_sums(confusion, photograph, seed)))))
    result = Result(metrics, len(true), intervals=known)
    result.details = blind_baselines.against("accuracy", answers, photograph, seed) | {
        "statements": len(asked.statements),
        "photographs": len(np.unique(photograph)),
        "absent": asked.absent,
        "true": float(true.mean()),
        "tied": float((asked.looking == 0).mean()),
        "categories": _by_name([s.category for s in asked.statements], answers, true, photograph, seed),
        "relations": _by_name([s.kind for s in asked.statements], answers, true, photograph, seed),
    }
    result.items = {"accuracy": blind_baselines.by_photograph(answers["accuracy"], photograph)}
    return result


def _check_both_labels(statements: Sequence[Statement], which: str = "") -> None:
    labels = {s.true for s in statements}
    if len(labels) == 1:
        label = "true; --mode compositional is for such" if labels == {True} else "false"
        raise UserError(
            f"all {len(statements)} statements{which} are {label}. --mode relations wants true and false ones"
        )


def macro(confusion: np.ndarray) -> np.ndarray:
    """Macro recall, precision and F1 of many tables at once; 0 where nothing is counted.  [draws, 4] -> [3, draws]"""
    tp, fn, fp, tn = confusion.T

    def share(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
        return np.divide(part, whole, out=np.zeros_like(part), where=whole > 0)

    recall = (share(tp, tp + fn) + share(tn, tn + fp)) / 2
    precision = (share(tp, tp + fp) + share(tn, tn + fn)) / 2
    f1 = (share(2 * tp, 2 * tp + fp + fn) + share(2 * tn, 2 * tn + fp + fn)) / 2
    return np.stack([recall, precision, f1])


def _by_name(
    names: Sequence[str], answers: dict[str, np.ndarray], true: np.ndarray, photograph: np.ndarray, seed: int
) -> dict[str, Any]:
    """By name: number of statements, fraction true, and fraction of correct answers.

    interval: of accuracy; majority: of the name's own statements.
    """
    figures: dict[str, Any] = {}
    for name in filter(None, np.unique(names)):
        here = np.array(names) == name
        alone = np.where(here, answers["accuracy"], np.nan)
        _, known = intervals.of_columns({"accuracy": alone}, photograph, seed)
        share = float(true[here].mean())
        figures[str(name)] = {
            "n": int(here.sum()),
            "true": share,
            **{answer: float(values[here].mean()) for answer, values in answers.items()},
            "majority": max(share, 1 - share),
            "interval": list(known["accuracy"]),
        }
    return figures
