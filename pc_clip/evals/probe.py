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
from typing import Any

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, StratifiedKFold

from pc_clip.core.config.evaluate import EvaluateConfig
from pc_clip.core.errors import UserError, check_at_least
from pc_clip.core.random import stream
from pc_clip.data.dataset import Dataset, Question, subset
from pc_clip.data.registry import READERS
from pc_clip.evals import Curve, EvalContext, Result
from pc_clip.evals.prompting import class_embeddings, templates_of
from pc_clip.metrics import intervals

log = logging.getLogger(__name__)

CS = (0.1, 1.0, 10.0, 100.0, 1000.0)  # inverse strengths of the penalty
CROSS_VALIDATED = 4  # images a class, and folds at most
MOST_STEPS = 5000  # of the solver, far more than it takes
TRAIN = "train"


def applies(data: Dataset, config: EvaluateConfig) -> str | None:
    reported_on = data.part or data.split
    has_train = data.name in READERS and TRAIN in READERS[data.name].splits and reported_on not in (TRAIN, "all")
    if data.questions and config.probe.shots and has_train:
        return None
    return "a data set with classes and a train split other than the one reported on (example, cifar100)"


def also_reads(context: EvalContext) -> Dataset:
    """The split that the probe learns from."""
    return context.open(TRAIN)


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
    pairs = matched(train, context.data)
    drawn = [
        draw_shots(learnt, shots[-1], config.probe.draws, config.seed + 1000 * n) for n, (learnt, _) in enumerate(pairs)
    ]
    needed = np.unique(np.concatenate([rows for draws in drawn for draw in draws for rows in draw]))
    log.info("  the probe looks at %d of %d labelled images", len(needed), len(train))
    z = context.on(subset(train, needed)).z.numpy()
    details: dict[str, Any] = {"draws": config.probe.draws, "standard_error": {}, "questions": {}}
    result, right = Result({}, len(context.data), details), {}  # right: metric -> [draws, M] a question
    for (_, question), draws in zip(pairs, drawn):
        labelled = [[np.searchsorted(needed, rows) for rows in draw] for draw in draws]
        by_text = _log_probabilities_of_text(context, question)
        of_question = {"zeroshot": by_text.argmax(1)[None] == question.target}
        about = details["questions"][question.name] = {"C": {}, "classes_with_fewer": {}}
        for k in shots:
            c, by_probe = _probe(context, question, z, labelled, k)  # [draws, M, classes]
            of_question[f"probe_{k}shot"] = by_probe.argmax(2) == question.target
            of_question[f"probe_{k}shot_with_text"] = (by_probe + by_text).argmax(2) == question.target
            about["C"][f"{k}shot"] = c
            about["classes_with_fewer"][f"{k}shot"] = sum(len(rows) < k for rows in labelled[0])
        about |= {name: float(each.mean()) for name, each in of_question.items()}
        for name, each in of_question.items():
            right.setdefault(name, []).append(each)
    for name, of_questions in right.items():
        by_draw = np.mean([each.mean(1) for each in of_questions], axis=0)  # [draws]
        result.metrics[name] = float(by_draw.mean())
        (details["standard_error"][name],) = intervals.standard_errors(by_draw[:, None])
        if len(of_questions) == 1:
            result.intervals[name] = intervals.of_mean(of_questions[0].mean(0), config.seed)
    names = {"probe": "probe_{}shot", "probe and prompts": "probe_{}shot_with_text", "zero-shot": "zeroshot"}
    series = {line: [(k, result.metrics[name.format(k)]) for k in shots] for line, name in names.items()}
    result.curves = [Curve("Few labelled images", "labelled images a class", "accuracy", series)]
    return result


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


def _log_probabilities_of_text(context: EvalContext, question: Question) -> np.ndarray:
    """Zero-shot log-probabilities at the model's temperature.  -> [M, classes]"""
    z = context.z[torch.from_numpy(question.rows)]
    prompts = class_embeddings(context.clip, question, templates_of(question, context.config))
    scale = context.clip.model.logit_scale.detach().exp().cpu()
    return torch.log_softmax(scale * z @ prompts.T, dim=1).numpy()


def _probe(
    context: EvalContext, question: Question, z: np.ndarray, draws: list[list[np.ndarray]], k: int
) -> tuple[float, np.ndarray]:
    """C, and log-probabilities of a probe on k images a class of each draw, -inf for classes without images.

    z: [S, D], of the labelled images; draws: rows of z by class.  -> C, [draws, M, classes]
    """
    test, c = context.z[torch.from_numpy(question.rows)].numpy(), None
    known = np.full((len(draws), len(test), len(question.classes)), -np.inf)
    for draw, of_draw in zip(draws, known):
        rows = np.concatenate([of_class[:k] for of_class in draw])
        target = np.repeat(np.arange(len(draw)), [len(of_class[:k]) for of_class in draw])
        c = c or choose_c(z[rows], target, k, context.config.seed)
        probe = LogisticRegression(C=c, max_iter=MOST_STEPS).fit(z[rows], target)
        of_draw[:, probe.classes_] = probe.predict_log_proba(test)
    return c, known


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
