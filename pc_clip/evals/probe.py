"""Few-shot linear probe (Radford et al. 2021, section 3.2): logistic regression on a few labelled images a class.

The probe sees unit image embeddings as they are. They are not standardised: one image a class says nothing of a
feature's spread, and all features of a unit vector are on one scale already. It is scikit-learn's
LogisticRegression with its L2 penalty. C is the middle of CS for fewer than CROSS_VALIDATED images a class; from
there on it is the one of CS with the smallest log loss in cross-validation on the first draw's images, and the
other draws use the same.

With a frozen image tower the probe alone cannot see any finetuning of the text tower: its figures are then
those of the untrained model, to the last digit. What text finetuning does shows in `zeroshot` and in
`probe_Kshot_with_text`, where an image's class is that with the largest sum of two log-probabilities: the
probe's, and the softmax of the zero-shot scores at the model's own temperature (its logit scale). That sum has no
weight to tune.
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
from pc_clip.data.registry import READERS, open_dataset
from pc_clip.evals import Curve, Result, Subject, mean, zeroshot
from pc_clip.metrics import intervals as _intervals

log = logging.getLogger(__name__)

CS = (0.1, 1.0, 10.0, 100.0, 1000.0)  # inverse strengths of the penalty
CROSS_VALIDATED = 4  # images a class, and folds at most
MOST_STEPS = 5000  # of the solver, far more than it takes
TRAIN = "train"

NEEDS = "a data set with classes and a train split other than the one reported on (example, cifar100)"


def applies(data: Dataset, config: EvaluateConfig) -> bool:
    return bool(data.questions and config.probe.shots) and _has_train_split(data)


def _has_train_split(data: Dataset) -> bool:
    reported_on = data.part or data.split
    return data.name in READERS and TRAIN in READERS[data.name].splits and reported_on not in (TRAIN, "all")


def evaluate(subject: Subject) -> Result:
    """Accuracy with k labelled images a class for each k of the shots, mean over questions and draws.

    Metrics: probe_Kshot, probe_Kshot_with_text, zeroshot. details: for each question the same, the standard error
    over draws, C, and how many classes had fewer than k images; such a class uses what it has, and one without
    any is never the probe's answer. Raises UserError where there is nothing to learn from.
    """
    config, shots = subject.config, sorted(set(subject.config.probe.shots))
    check_at_least("probe.shots", min(shots, default=0), 1)
    check_at_least("probe.draws", config.probe.draws, 1)
    train = training_split(subject)
    asked = matched(train, subject.data)
    drawn = [
        draw_shots(learnt, shots[-1], config.probe.draws, config.seed + 1000 * n) for n, (learnt, _) in enumerate(asked)
    ]
    needed = np.unique(np.concatenate([rows for draws in drawn for draw in draws for rows in draw]))
    log.info("  the probe looks at %d of %d labelled images", len(needed), len(train))
    z = Subject(subject.clip, subject.find_base, subset(train, needed), config).z.numpy()
    found = {}
    for (learnt, question), draws in zip(asked, drawn):
        labelled = [[np.searchsorted(needed, rows) for rows in draw] for draw in draws]
        found[question.name] = _of_question(subject, learnt, question, z, labelled, shots)
    return _report(found, shots, config, len(subject.data))


def also_reads(subject: Subject) -> Dataset | None:
    """The split that the probe learns from."""
    return subject.open(TRAIN) if _has_train_split(subject.data) else None


def training_split(subject: Subject) -> Dataset:
    """The labelled images, none of which is reported on. Raises UserError where there are none."""
    if not _has_train_split(subject.data):
        raise UserError(
            f"mode probe learns from the train split, and {subject.data.label} has none besides what is reported on"
        )
    return open_dataset(subject.data.name, subject.config.root, TRAIN, missing=subject.config.missing)


def matched(train: Dataset, test: Dataset) -> list[tuple[Question, Question]]:
    """The questions of both splits that ask about the same classes, of which two or more have labelled images."""
    learnt = {question.name: question for question in train.questions}
    asked = [(learnt[q.name], q) for q in test.questions if q.name in learnt and learnt[q.name].classes == q.classes]
    usable = [(a, b) for a, b in asked if len(np.unique(a.target)) > 1]
    if not usable:
        raise UserError(f"{train.label} has no labelled images of the classes that {test.label} asks about")
    return usable


def draw_shots(question: Question, k: int, draws: int, seed: int) -> list[list[np.ndarray]]:
    """Up to k images of each class, in random order, anew for each draw.  -> [draws][classes] of rows

    The first m of them are the draw for m images a class, so that more shots add to fewer.
    """
    found = []
    for draw in range(draws):
        rng = stream(seed, "shots", draw)
        of_class = [question.rows[question.target == c] for c in range(len(question.classes))]
        found.append([rng.permutation(rows)[:k] for rows in of_class])
    return found


class Shots(NamedTuple):
    """What one number of images a class came to. right, right_with_text: [draws, M] bool; c: the penalty's."""

    right: np.ndarray
    right_with_text: np.ndarray
    c: float
    short: int  # classes with fewer images


def _of_question(
    subject: Subject,
    learnt: Question,
    question: Question,
    z: np.ndarray,
    draws: list[list[np.ndarray]],
    shots: list[int],
) -> tuple[np.ndarray, dict[int, Shots]]:
    """Which images zero-shot gets right, [M] bool, and which the probe does for each number of shots."""
    test = subject.z[torch.from_numpy(question.rows)]
    prompts = zeroshot.class_embeddings(subject.clip, question, zeroshot.templates_of(question, subject.config))
    scale = subject.clip.model.logit_scale.detach().exp().cpu()
    by_text = torch.log_softmax(scale * test @ prompts.T, dim=1).numpy()  # [M, classes]
    found = {}
    for k in shots:
        c, right, right_with_text = None, [], []
        for draw in draws:
            rows = np.concatenate([of_class[:k] for of_class in draw])
            target = np.concatenate([np.full(len(of_class[:k]), n) for n, of_class in enumerate(draw)])
            c = c or choose_c(z[rows], target, k, subject.config.seed)
            by_probe = log_probabilities(z[rows], target, test.numpy(), len(question.classes), c)
            right.append(by_probe.argmax(1) == question.target)
            right_with_text.append((by_probe + by_text).argmax(1) == question.target)
        short = int((np.bincount(learnt.target, minlength=len(learnt.classes)) < k).sum())
        found[k] = Shots(np.array(right), np.array(right_with_text), c, short)
    return by_text.argmax(1) == question.target, found


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
    found = np.full((len(test), classes), -np.inf)
    found[:, probe.classes_] = probe.predict_log_proba(test)
    return found


def _report(
    found: dict[str, tuple[np.ndarray, dict[int, Shots]]], shots: list[int], config: EvaluateConfig, n: int
) -> Result:
    """Means over questions and draws, their spread, and the curve over the number of shots."""
    metrics, details, intervals = {"zeroshot": mean([right.mean() for right, _ in found.values()])}, {}, {}
    errors = {}
    for k in shots:
        for name, which in ((f"probe_{k}shot", "right"), (f"probe_{k}shot_with_text", "right_with_text")):
            right = {q: getattr(by_shots[k], which) for q, (_, by_shots) in found.items()}  # [draws, M] each
            by_draw = np.mean([each.mean(1) for each in right.values()], axis=0)  # [draws]
            metrics[name], errors[name] = float(by_draw.mean()), _standard_error(by_draw)
            if len(right) == 1:
                intervals[name] = _intervals.of_mean(next(iter(right.values())).mean(0), config.seed)
    for q, (text_right, by_shots) in found.items():
        details[q] = {"zeroshot": float(text_right.mean())}
        for k, of_k in by_shots.items():
            details[q][f"{k}shot"] = {
                "probe": float(of_k.right.mean()), "probe_error": _standard_error(of_k.right.mean(1)),
                "with_text": float(of_k.right_with_text.mean()),
                "with_text_error": _standard_error(of_k.right_with_text.mean(1)),
                "C": of_k.c, "classes_with_fewer": of_k.short,
            }  # fmt: skip
    series = {
        "probe": [(k, metrics[f"probe_{k}shot"]) for k in shots],
        "probe and prompts": [(k, metrics[f"probe_{k}shot_with_text"]) for k in shots],
        "zero-shot": [(k, metrics["zeroshot"]) for k in shots],
    }
    curve = Curve("Few labelled images", "labelled images a class", "accuracy", series)
    about = {"draws": config.probe.draws, "standard_error": errors, "questions": details}
    return Result(metrics, n, about, intervals=intervals, curves=[curve])


def _standard_error(by_draw: np.ndarray) -> float | None:
    """Of the mean over draws; None for a single one, which says nothing of it."""
    return float(by_draw.std(ddof=1) / np.sqrt(len(by_draw))) if len(by_draw) > 1 else None
