"""Is a statement true of its image? Visual spatial reasoning (VSR; Liu, Emerson and Collier, TACL 2023) as it is meant.

The two candidates are the statement and its contradiction, which is built from the statement alone; the model says
"true" where the image is closer to the statement. Of a false statement's image the contradiction need not hold either
("left of", "right of"), so that who sees everything may have less than 1. What needs no image stands beside every
figure (evals/blind_baselines.py), and intervals draw photographs again, with the same draws for the model and the
others.

None of these has read another file. Of VSR's random split three test captions in four are in the train file too, there
mostly with the other label: who remembers that file and says the opposite is right in 73 % without looking, and who
learnt its texts by heart is wrong as often. The zero-shot split shares no caption.

prefers_caption_as_written is how often the statement wins as it is written, whatever its label: a scorer that never
looks may get 1.000 by it. It is no accuracy; it is here because the CLIP-PO code reports it as one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from sklearn.metrics import precision_recall_fscore_support

from pc_clip.core.config.evaluate import EvaluateConfig
from pc_clip.core.errors import UserError
from pc_clip.data.dataset import Dataset, Statement
from pc_clip.evals import Result, Subject, blind_baselines
from pc_clip.evals.blind_baselines import Asked, right
from pc_clip.metrics import intervals as _intervals

ENOUGH = 30  # statements of a category that has a metric of its own
MACRO = ("macro_recall", "macro_precision", "macro_f1")

DEFINITIONS = {
    "accuracy": "The image is closer to the statement than to its contradiction if and only if the statement is true.",
    "majority": "Always the commoner label.",
    "blind": "As accuracy, with a constant grey picture in place of every image.",
    "blind_mean": "As accuracy, with the mean embedding of the images asked about in place of every image.",
    "text_only": "Logistic regression on the statement's text embedding, learnt from other photographs' statements.",
    "prefers_caption_as_written": "The statement wins, whatever its label. No accuracy: it need not look.",
    "blind_prefers_caption_as_written": "The same with a constant grey picture.",
    "ties": "A tie counts as half right, and as half of each answer in recall, precision and F1.",
}

NEEDS = (
    "statements of which some are true and some false: --statements PATH (VSR's files, or your own with image, caption "
    "and label), or a data set that has them (example_relations)"
)


def applies(data: Dataset, config: EvaluateConfig) -> bool:
    return bool(config.statements) or len({s.true for s in data.statements}) == 2


def evaluate(subject: Subject) -> Result:
    """Accuracy, macro recall, precision and F1, and what they come to without looking, with intervals.

    Raises UserError where all statements are true, or all false, and where none of their images is there.
    """
    seed = subject.config.seed
    asked = blind_baselines.ask(subject, _both_labels(blind_baselines.statements_of(subject.data, subject.config)))
    _both_labels(asked.statements, f" whose images are in {subject.data.label}")
    answers = _answers(asked, seed)
    shares = answers | _as_written(asked) | _of_categories(asked, answers["accuracy"])
    metrics, intervals = _figures(shares, asked, seed)
    found = blind_baselines.against("accuracy", answers, asked.photograph, seed)
    about = {
        "beats_blind": blind_baselines.beats(found, f"accuracy {100 * metrics['accuracy']:.1f}"),
        "above": {name: each._asdict() for name, each in found.items()},
        "statements": len(asked.statements),
        "photographs": len(np.unique(asked.photograph)),
        "absent": asked.absent,
        "true": float(asked.true.mean()),
        "tied": float((asked.looking == 0).mean()),
        "categories": _apart([s.category for s in asked.statements], answers, asked, seed),
        "relations": _apart([s.kind for s in asked.statements], answers, asked, seed),
        "definitions": DEFINITIONS,
    }
    if "text_only" not in answers:
        about["left_out"] = blind_baselines.TOO_FEW
    items = {"accuracy": blind_baselines.by_photograph(answers["accuracy"], asked.photograph)}
    return Result(metrics, len(asked.statements), about, intervals=intervals, items=items)


def _both_labels(statements: Sequence[Statement], which: str = "") -> Sequence[Statement]:
    labels = {s.true for s in statements}
    if len(labels) == 1:
        said = "true; --mode compositional is for such" if labels == {True} else "false"
        raise UserError(
            f"all {len(statements)} statements{which} are {said}. --mode relations wants true and false ones"
        )
    return statements


def _answers(asked: Asked, seed: int) -> dict[str, np.ndarray]:
    """How right each statement is judged by the model and by what never looks. name -> [M]; all are comparable."""
    true = asked.true
    found = {
        "accuracy": right(asked.looking, true),
        "majority": right(np.full(len(true), 1.0 if true.mean() >= 0.5 else -1.0), true),
        "blind": right(asked.grey, true),
        "blind_mean": right(asked.mean, true),
    }
    by_text = blind_baselines.tell_labels(asked.texts, true, asked.photograph, seed)
    return found if by_text is None else found | {"text_only": right(by_text, true)}


def _as_written(asked: Asked) -> dict[str, np.ndarray]:
    return {
        "prefers_caption_as_written": right(asked.looking),
        "blind_prefers_caption_as_written": right(asked.grey),
    }


def _of_categories(asked: Asked, accuracy: np.ndarray) -> dict[str, np.ndarray]:
    """accuracy_CATEGORY -> [M], NaN for the statements of other categories."""
    of = np.array([s.category.lower().replace(" ", "_") for s in asked.statements])
    large = [name for name in np.unique(of) if name and (of == name).sum() >= ENOUGH]
    return {f"accuracy_{name}": np.where(of == name, accuracy, np.nan) for name in large}


def _figures(
    shares: dict[str, np.ndarray], asked: Asked, seed: int
) -> tuple[dict[str, float], dict[str, tuple[float, float]]]:
    """The metrics, accuracy first and the macro means after it, and their intervals."""
    values = np.stack(list(shares.values()), axis=1)  # [M, K]
    means = dict(zip(shares, np.nanmean(values, axis=0))) | dict(zip(MACRO, _macro_by_sklearn(asked)))
    confusions = _intervals.redrawn_sums(_confusion(asked), asked.photograph, seed)
    redrawn = dict(zip(shares, _intervals.redrawn_means(values, asked.photograph, seed).T))
    redrawn |= dict(zip(MACRO, macro(confusions)))
    order = ["accuracy", *MACRO, *(name for name in shares if name != "accuracy")]
    return {n: float(means[n]) for n in order}, {n: _intervals.between(redrawn[n]) for n in order}


def _confusion(asked: Asked) -> np.ndarray:
    """How far each statement is a true positive, false negative, false positive, true negative.  -> [M, 4]

    Each row has one 1, or two halves for a tie.
    """
    said, true = right(asked.looking), asked.true
    return np.stack([true * said, true * (1 - said), ~true * said, ~true * (1 - said)], axis=1)


def _macro_by_sklearn(asked: Asked) -> tuple[float, float, float]:
    """Recall, precision and F1, each the mean over the two labels. A tie is counted twice, half as each answer."""
    said, true = right(asked.looking), asked.true
    precision, recall, f1, _ = precision_recall_fscore_support(
        np.concatenate([true, true]),
        np.repeat([True, False], len(true)),
        average="macro",
        sample_weight=np.concatenate([said, 1 - said]),
        zero_division=0,
    )
    return float(recall), float(precision), float(f1)


def macro(confusion: np.ndarray) -> np.ndarray:
    """Macro recall, precision and F1 of many tables at once; 0 where nothing is counted.  [draws, 4] -> [3, draws]"""
    tp, fn, fp, tn = confusion.T

    def share(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
        return np.divide(part, whole, out=np.zeros_like(part), where=whole > 0)

    return np.stack(
        [
            (share(tp, tp + fn) + share(tn, tn + fp)) / 2,
            (share(tp, tp + fp) + share(tn, tn + fn)) / 2,
            (share(2 * tp, 2 * tp + fp + fn) + share(2 * tn, 2 * tn + fp + fn)) / 2,
        ]
    )


def _apart(names: Sequence[str], answers: dict[str, np.ndarray], asked: Asked, seed: int) -> dict[str, Any]:
    """Of the statements of each name: how many, the share that is true, and the answers' shares that are right.

    interval: of accuracy; majority: of the name's own statements.
    """
    of = {str(name): np.array(names) == name for name in np.unique(names) if name}
    if not of:
        return {}
    alone = np.stack([np.where(here, answers["accuracy"], np.nan) for here in of.values()], axis=1)
    redrawn = _intervals.redrawn_means(alone, asked.photograph, seed)
    return {
        name: {
            "n": int(here.sum()),
            "true": float(asked.true[here].mean()),
            **{answer: float(values[here].mean()) for answer, values in answers.items()},
            "majority": float(max(asked.true[here].mean(), 1 - asked.true[here].mean())),
            "interval": list(_intervals.between(draws)),
        }
        for (name, here), draws in zip(of.items(), redrawn.T)
    }
