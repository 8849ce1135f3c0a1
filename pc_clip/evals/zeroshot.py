"""Zero-shot classification by prompts (Radford et al. 2021, section 3.1)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pc_clip.core.config.evaluate import EvaluateConfig
from pc_clip.core.errors import UserError, check_choice
from pc_clip.data.dataset import Dataset, Question
from pc_clip.evals import Result, Subject, mean
from pc_clip.metrics import intervals as _intervals
from pc_clip.models.clip import Clip

LARGEST_CONFUSION = 120  # classes; a larger table says nothing to anyone and swells the result

NEEDS = "a data set with classes"


def applies(data: Dataset, config: EvaluateConfig) -> bool:
    return bool(data.questions)


class Answers(NamedTuple):
    """What was answered to each question: a table of figures, and which images were right. [M] bool each"""

    details: dict[str, dict[str, Any]]
    right: dict[str, np.ndarray]

    @property
    def accuracy(self) -> float:
        """The mean over the questions."""
        return mean([found["top1"] for found in self.details.values()])

    def interval(self, seed: int) -> tuple[float, float] | None:
        """Of the accuracy; None where it is a mean over several questions."""
        return _intervals.of_mean(next(iter(self.right.values())), seed) if len(self.right) == 1 else None


def evaluate(subject: Subject) -> Result:
    """Top-1 and top-5 accuracy for each question the data set asks; `zeroshot` is the mean of the top-1."""
    answers, seed = answer(subject), subject.config.seed
    metrics, intervals, total = {"zeroshot": answers.accuracy}, {}, 0
    for question in subject.data.questions:
        found = answers.details[question.name]
        total += len(question.rows)
        intervals[f"zeroshot_{question.name}"] = _intervals.of_mean(answers.right[question.name], seed)
        metrics[f"zeroshot_{question.name}"] = found["top1"]
        if len(question.classes) > 5:
            metrics[f"top5_{question.name}"] = found["top5"]
    if len(answers.right) == 1:
        intervals["zeroshot"] = next(iter(intervals.values()))
    return Result(metrics, total, answers.details, intervals=intervals)


def answer(subject: Subject) -> Answers:
    """Every question, without the intervals, which take longer than the answers of a small model."""
    details, right = {}, {}
    for question in subject.data.questions:
        prompts = class_embeddings(subject.clip, question, templates_of(question, subject.config))
        scores = subject.z[torch.from_numpy(question.rows)] @ prompts.T  # [M, classes]
        details[question.name] = score(scores, question)
        right[question.name] = (scores.argmax(1) == torch.from_numpy(question.target)).numpy()
    return Answers(details, right)


def templates_of(question: Question, config: EvaluateConfig) -> tuple[str, ...]:
    """The prompts of a question: the user's own, the data set's list with --prompts several, else the one default.

    Raises UserError for a prompt without a place for the class.
    """
    check_choice("prompts", config.prompts, ("paper", "several"))
    found = tuple(config.templates) or (config.prompts == "several" and question.several) or question.templates
    for template in found:
        if "{}" not in template:
            raise UserError(f"the prompt {template!r} has no {{}} where the class belongs")
    return found


def class_embeddings(clip: Clip, question: Question, templates: Sequence[str] = ()) -> Tensor:
    """One unit vector a class: the mean over the templates of the unit embeddings of its prompts.  -> [classes, D]"""
    used = tuple(templates) or question.templates
    prompts = [template.replace("{}", name) for name in question.classes for template in used]
    z = clip.embed_texts(prompts).view(len(question.classes), len(used), -1)
    return F.normalize(z.mean(1), dim=-1)


def score(scores: Tensor, question: Question) -> dict:
    """Accuracy and where it goes wrong, from scores [M, classes]."""
    target = torch.from_numpy(question.target)
    best = scores.topk(min(5, scores.shape[1]), dim=1).indices
    guess = best[:, 0]
    confusion = np.zeros((len(question.classes),) * 2, dtype=np.int64)  # [true, guessed]
    np.add.at(confusion, (question.target, guess.numpy()), 1)
    counts = confusion.sum(1)
    per_class = {name: confusion[k, k] / counts[k] for k, name in enumerate(question.classes) if counts[k]}
    wrong = confusion - np.diag(np.diag(confusion))
    largest = [divmod(int(k), len(question.classes)) for k in np.argsort(-wrong, axis=None)[:5]]
    return {
        "top1": float((guess == target).double().mean()),
        "top5": float((best == target[:, None]).any(1).double().mean()),
        "per_class": {name: float(value) for name, value in per_class.items()},
        "worst": sorted(per_class, key=per_class.get)[:5],
        "confusions": [
            {"true": question.classes[a], "guessed": question.classes[b], "share": float(wrong[a, b] / counts[a])}
            for a, b in largest
            if wrong[a, b]
        ],
        "classes": list(question.classes),
        "confusion": confusion.tolist() if len(question.classes) <= LARGEST_CONFUSION else None,
    }
