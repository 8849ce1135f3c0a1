"""Zero-shot with extended class descriptions: what a class looks like, written out, beside its name.

generate_diffs.py --task describe writes a sentence or more a class. Two ways of using them, each reported beside
plain prompts: `extended_append` puts a description after the class's prompt ("This is a photo of a zebra. A zebra
is ..."), `extended_average` counts each description as one more prompt of the class. A class without a
description keeps its plain prompts.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pc_clip.core.config.evaluate import EvaluateConfig
from pc_clip.core.errors import UserError, nearest
from pc_clip.data.class_text import read_descriptions
from pc_clip.data.dataset import Dataset, Question
from pc_clip.evals import Result, Subject
from pc_clip.evals.zeroshot import class_embeddings, score, templates_of
from pc_clip.metrics import intervals as _intervals
from pc_clip.models.clip import Clip

NEEDS = "a data set with classes, and --extended.descriptions FILE (generate_diffs.py --task describe writes one)"


def applies(data: Dataset, config: EvaluateConfig) -> bool:
    return bool(data.questions) and bool(config.extended.descriptions)


def evaluate(subject: Subject) -> Result:
    """Test accuracy of the question that the descriptions are about, plain and with them; gain_* are differences."""
    config = subject.config
    descriptions = read_descriptions(config.extended.descriptions)
    question = _question_of(subject.data, descriptions, config.extended.descriptions)
    templates = templates_of(question, config)
    z = subject.z[torch.from_numpy(question.rows)]
    ways = {
        "extended_plain": class_embeddings(subject.clip, question, templates),
        "extended_append": _from_texts(subject.clip, appended(question, templates, descriptions)),
        "extended_average": _from_texts(subject.clip, added(question, templates, descriptions)),
    }
    found = {name: score(z @ prompts.T, question) for name, prompts in ways.items()}
    right = {n: ((z @ p.T).argmax(1) == torch.from_numpy(question.target)).double().numpy() for n, p in ways.items()}
    metrics = {name: f["top1"] for name, f in found.items()}
    intervals = {name: _intervals.of_mean(hits, config.seed) for name, hits in right.items()}
    for name in ("extended_append", "extended_average"):
        metrics[f"gain_{name}"] = metrics[name] - metrics["extended_plain"]
        intervals[f"gain_{name}"] = _intervals.of_mean(right[name] - right["extended_plain"], config.seed)
    details = {
        "question": question.name,
        "described": sum(name in descriptions for name in question.classes),
        "classes": len(question.classes),
        "descriptions": descriptions,
        "per_class": {name: f["per_class"] for name, f in found.items()},
    }
    return Result(metrics, len(question.rows), details, intervals=intervals)


def appended(question: Question, templates: tuple[str, ...], descriptions: dict[str, list[str]]) -> list[list[str]]:
    """The prompts of each class, each followed by each of its descriptions."""
    return [
        [
            f"{prompt.rstrip('.')}. {told}" if told else prompt
            for prompt in (template.replace("{}", name) for template in templates)
            for told in descriptions.get(name, [""])
        ]
        for name in question.classes
    ]


def added(question: Question, templates: tuple[str, ...], descriptions: dict[str, list[str]]) -> list[list[str]]:
    """The prompts of each class, and its descriptions as further ones."""
    return [
        [template.replace("{}", name) for template in templates] + descriptions.get(name, [])
        for name in question.classes
    ]


def _from_texts(clip: Clip, texts: list[list[str]]) -> Tensor:
    """One unit vector a class: the mean of its texts' unit embeddings.  -> [classes, D]"""
    z = clip.embed_texts([text for of_class in texts for text in of_class])
    return F.normalize(torch.stack([part.mean(0) for part in z.split([len(t) for t in texts])]), dim=-1)


def _question_of(data: Dataset, descriptions: dict[str, list[str]], source: str) -> Question:
    """The question whose classes are described. Raises UserError for a class no question knows."""
    best = max(data.questions, key=lambda q: len(descriptions.keys() & set(q.classes)))
    unknown = sorted(descriptions.keys() - set(best.classes))
    if unknown:
        raise UserError(
            f"{source} describes {unknown[0]!r}, which is no class of {data.name}. {nearest(unknown[0], best.classes)}"
        )
    return best
