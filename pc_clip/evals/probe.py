"""Few-shot linear probe (Radford et al. 2021, section 3.2): logistic regression on a few labelled images a class.

The probe sees unit image embeddings as they are. They are not standardised: one image a class says nothing of a
feature's spread, and all features of a unit vector are on one scale already. It is scikit-learn's
LogisticRegression with its L2 penalty. C is the middle of CS for fewer than CROSS_VALIDATED images a class; from
there on it is the one of CS with the smallest log loss in cross-validation on the first draw's images, and the
other draws use the same.

With a frozen image tower the probe cannot see any finetuning of the text tower: its figures are those of the
untrained model, to the last digit. Text finetuning shows in `zeroshot` and in `probe_Kshot_with_text`, where an
image's class is that with the largest sum of two log-probabilities: the probe's, and the softmax of the zero-shot
scores at the model's own temperature (its logit scale). That sum has no weight to tune.
"""

from __future__ import annotations

import logging
from typing import NamedTuple

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, StratifiedKFold

from pc_clip.core.config.evaluate import EvaluateConfig
from pc_clip.core.errors import UserError, check_at_least
from pc_clip.core.random import stream
from pc_clip.data.dataset import Dataset, Question, subset
from pc_clip.data.registry import READERS
from pc_clip.evals import Curve, EvalContext, Result, mean, zeroshot
from pc_clip.metrics import intervals

log = logging.getLogger(__name__)

CS = (0.1, 1.0, 10.0, 100.0, 1000.0)  # inverse strengths of the penalty
CROSS_VALIDATED = 4  # images a class, and folds at most
MOST_STEPS = 5000  # of the solver, far more than it takes
TRAIN = "train"


def applies(data: Dataset, config: EvaluateConfig) -> str | None:
    if data.questions and config.probe.shots and _has_train_split(data):
        return None
    return "a data set with classes and a train split other than the one reported on (example, cifar100)"


def _has_train_split(data: Dataset) -> bool:
    reported_on = data.part or data.split
    return data.name in READERS and TRAIN in READERS[data.name].splits and reported_on not in (TRAIN, "all")


def also_reads(context: EvalContext) -> Dataset | None:
    """The split that the probe learns from."""
    return context.open(TRAIN) if _has_train_split(context.data) else None


def evaluate(context: EvalContext) -> Result:
    """Accuracy with k labelled images a class for each k of the shots, mean over questions and draws.

    Metrics: probe_Kshot, probe_Kshot_with_text, zeroshot. details: for each question the same, the standard error
    over draws, C, and how many classes had fewer than k images; such a class uses what it has, and one without
    any is never the probe's answer. Raises UserError where there is nothing to learn from.
    """
    config, shots = context.config, sorted(set(context.config.probe.shots))
    check_at_least("probe.shots", min(shots, default=0), 1)
    check_at_least("probe.draws", config.probe.draws, 1)
    train = also_reads(context)
    if train is None:
        raise UserError(
            f"mode probe learns from the train split, and {context.data.label} has none besides what is reported on"
        )
    pairs = matched(train, context.data)
    drawn = [
        draw_shots(learnt, shots[-1], config.probe.draws, config.seed + 1000 * n) for n, (learnt, _) in enumerate(pairs)
    ]
    needed = np.unique(np.concatenate([rows for draws in drawn for draw in draws for rows in draw]))
    log.info("  the probe looks at %d of %d labelled images", len(needed), len(train))
    z = EvalContext(context.clip, context.find_base, subset(train, needed), config).z.numpy()
    answers = {}
    for (learnt, question), draws in zip(pairs, drawn):
        labelled = [[np.searchsorted(needed, rows) for rows in draw] for draw in draws]
        by_text = _log_probabilities_of_text(context, question)
        by_shots = {k: _probe(context, learnt, question, z, labelled, k, by_text) for k in shots}
        answers[question.name] = by_text.argmax(1) == question.target, by_shots
    return _report(answers, shots, config, len(context.data))


def matched(train: Dataset, test: Dataset) -> list[tuple[Question, Question]]:
    """The questions of both splits that ask about the same classes, of which two or more have labelled images."""
    learnt = {question.name: question for question in train.questions}
    pairs = [(learnt[q.name], q) for q in test.questions if q.name in learnt and learnt[q.name].classes == q.classes]
    usable = [(a, b) for a, b in pairs if len(np.unique(a.target)) > 1]
    if not usable:
        raise UserError(f"{train.label} has no labelled images of the classes that {test.label} asks about")
    return usable


def draw_shots(question: Question, k: int, draws: int, seed: int) -> list[list[np.ndarray]]:
    """Up to k images of each class, in random order, anew for each draw.  -> [draws][classes] of rows

    The first m of them are the draw for m images a class, so that more shots add to fewer.
    """
    of_class = [question.rows[question.target == c] for c in range(len(question.classes))]
    streams = [stream(seed, "shots", draw) for draw in range(draws)]
    return [[rng.permutation(rows)[:k] for rows in of_class] for rng in streams]


class Shots(NamedTuple):
    """The answers with one number of images a class. right, right_with_text: [draws, M] bool; c: the penalty's."""

    right: np.ndarray
    right_with_text: np.ndarray
    c: float
    short: int  # classes with fewer images


def _log_probabilities_of_text(context: EvalContext, question: Question) -> np.ndarray:
    """Of zero-shot classification at the model's own temperature.  -> [M, classes]"""
    z = context.z[torch.from_numpy(question.rows)]
    prompts = zeroshot.class_embeddings(context.clip, question, zeroshot.templates_of(question, context.config))
    scale = context.clip.model.logit_scale.detach().exp().cpu()
    return torch.log_softmax(scale * z @ prompts.T, dim=1).numpy()


def _probe(
    context: EvalContext,
    learnt: Question,
    question: Question,
    z: np.ndarray,
    draws: list[list[np.ndarray]],
    k: int,
    by_text: np.ndarray,
) -> Shots:
    """The probe on k images a class of each draw. z: [S, D], of the labelled images; draws: rows of z by class."""
    test = context.z[torch.from_numpy(question.rows)].numpy()
    c, right, right_with_text = None, [], []
    for draw in draws:
        rows = np.concatenate([of_class[:k] for of_class in draw])
        target = np.concatenate([np.full(len(of_class[:k]), n) for n, of_class in enumerate(draw)])
        c = c or choose_c(z[rows], target, k, context.config.seed)
        by_probe = log_probabilities(z[rows], target, test, len(question.classes), c)
        right.append(by_probe.argmax(1) == question.target)
        right_with_text.append((by_probe + by_text).argmax(1) == question.target)
    short = int((np.bincount(learnt.target, minlength=len(learnt.classes)) < k).sum())
    return Shots(np.array(right), np.array(right_with_text), c, short)


def choose_c(z: np.ndarray, target: np.ndarray, k: int, seed: int) -> float:
    """The C of a probe on k images a class. z: [S, D], target: [S]."""
    fewest = np.unique(target, return_counts=True)[1].min()
    if k < CROSS_VALIDATED or fewest < 2:
        return CS[len(CS) // 2]
    folds = StratifiedKFold(min(CROSS_VALIDATED, int(fewest)), shuffle=True, random_state=seed)
    search = GridSearchCV(
        LogisticRegression(max_iter=MOST_STEPS), {"C": CS}, scoring="neg_log_loss", cv=folds, refit=False
    )
    return float(search.fit(z, target).best_params_["C"])


def log_probabilities(z: np.ndarray, target: np.ndarray, test: np.ndarray, classes: int, c: float) -> np.ndarray:
    """Learn from z [S, D], target [S]; log-probabilities for test [M, D].  -> [M, classes], -inf for unseen classes"""
    probe = LogisticRegression(C=c, max_iter=MOST_STEPS).fit(z, target)
    known = np.full((len(test), classes), -np.inf)
    known[:, probe.classes_] = probe.predict_log_proba(test)
    return known


def _report(
    answers: dict[str, tuple[np.ndarray, dict[int, Shots]]], shots: list[int], config: EvaluateConfig, n: int
) -> Result:
    """Means over questions and draws, their spread, and the curve over the number of shots."""
    zero_shot = mean([right.mean() for right, _ in answers.values()])
    questions: dict[str, dict] = {name: {"zeroshot": float(right.mean())} for name, (right, _) in answers.items()}
    details = {"draws": config.probe.draws, "standard_error": {}, "questions": questions}
    result = Result({"zeroshot": zero_shot}, n, details)
    series: dict[str, list] = {"probe": [], "probe and prompts": [], "zero-shot": [(k, zero_shot) for k in shots]}
    for k in shots:
        for line, suffix, field in (("probe", "", "right"), ("probe and prompts", "_with_text", "right_with_text")):
            name = f"probe_{k}shot{suffix}"
            right = [getattr(by_shots[k], field) for _, by_shots in answers.values()]  # [draws, M] each
            by_draw = np.mean([each.mean(1) for each in right], axis=0)  # [draws]
            result.metrics[name] = float(by_draw.mean())
            details["standard_error"][name] = _standard_error(by_draw)
            series[line].append((k, result.metrics[name]))
            if len(right) == 1:
                result.intervals[name] = intervals.of_mean(right[0].mean(0), config.seed)
        for question, (_, by_shots) in answers.items():
            each = by_shots[k]
            questions[question][f"{k}shot"] = {
                "probe": float(each.right.mean()), "probe_error": _standard_error(each.right.mean(1)),
                "with_text": float(each.right_with_text.mean()),
                "with_text_error": _standard_error(each.right_with_text.mean(1)),
                "C": each.c, "classes_with_fewer": each.short,
            }  # fmt: skip
    result.curves = [Curve("Few labelled images", "labelled images a class", "accuracy", series)]
    return result


def _standard_error(by_draw: np.ndarray) -> float | None:
    """Of the mean over draws; None for a single one, which says nothing of it."""
    return float(by_draw.std(ddof=1) / np.sqrt(len(by_draw))) if len(by_draw) > 1 else None
