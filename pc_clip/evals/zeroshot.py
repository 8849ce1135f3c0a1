"""Zero-shot classification by prompts (Radford et al. 2021, section 3.1)."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from pc_clip.core.config.evaluate import EvaluateConfig
from pc_clip.data.dataset import Dataset, Question
from pc_clip.evals import EvalContext, Result
from pc_clip.evals.prompting import class_embeddings, templates_of
from pc_clip.metrics import intervals

LARGEST_CONFUSION = 120  # classes of a confusion table that is still of use


def applies(data: Dataset, config: EvaluateConfig) -> str | None:
    return None if data.questions else "a data set with classes"


def evaluate(context: EvalContext) -> Result:
    """Top-1 and top-5 accuracy for each question the data set asks; `zeroshot` is the mean of the top-1."""
    details, right = answer(context)
    result = Result({"zeroshot": accuracy(details)}, sum(map(len, right.values())), details)
    for name, figures in details.items():
        result.metrics[f"zeroshot_{name}"] = figures["top1"]
        result.intervals[f"zeroshot_{name}"] = intervals.of_mean(right[name], context.config.seed)
        if len(figures["classes"]) > 5:
            result.metrics[f"top5_{name}"] = figures["top5"]
    if len(details) == 1:
        (result.intervals["zeroshot"],) = result.intervals.values()
    return result


def answer(context: EvalContext) -> tuple[dict[str, dict[str, Any]], dict[str, np.ndarray]]:
    """Each question's figures, and which of its images were right, [M] bool; without the slower intervals."""
    details, right = {}, {}
    for question in context.data.questions:
        prompts = class_embeddings(context.clip, question, templates_of(question, context.config))
        scores = context.z[torch.from_numpy(question.rows)] @ prompts.T  # [M, classes]
        details[question.name] = score(scores, question)
        right[question.name] = scores.argmax(1).numpy() == question.target
    return details, right


def accuracy(details: dict[str, dict[str, Any]]) -> float:
    """The mean over the questions."""
    return float(np.mean([figures["top1"] for figures in details.values()]))


def score(scores: Tensor, question: Question) -> dict[str, Any]:
    """Accuracy, by class too, and the largest confusions. scores: [M, classes]"""
    target, classes = torch.from_numpy(question.target), question.classes
    best, guess = scores.topk(min(5, scores.shape[1]), dim=1).indices, scores.argmax(1)
    confusion = np.zeros((len(classes),) * 2, dtype=np.int64)  # [true, guessed]
    np.add.at(confusion, (question.target, guess.numpy()), 1)
    counts = confusion.sum(1)
    per_class = {name: float(confusion[k, k] / counts[k]) for k, name in enumerate(classes) if counts[k]}
    wrong = confusion - np.diag(np.diag(confusion))
    largest = [divmod(int(k), len(classes)) for k in np.argsort(-wrong, axis=None)[:5]]
    return {
        "top1": float((guess == target).double().mean()),
        "top5": float((best == target[:, None]).any(1).double().mean()),
        "per_class": per_class,
        "confusions": [
            {"true": classes[a], "guessed": classes[b], "share": float(wrong[a, b] / counts[a])}
            for a, b in largest
            if wrong[a, b]
        ],
        "classes": list(classes),
        "confusion": confusion.tolist() if len(classes) <= LARGEST_CONFUSION else None,
    }
