"""Zero-shot with extended class descriptions: the looks of a class, written out, in addition to its name.

generate_diffs.py --task describe writes a sentence or more a class. Two ways of using them are compared with plain
prompts: `extended_append` puts a description after the class's prompt ("This is a photo of a zebra. A zebra
is ..."), `extended_average` takes each description as one more prompt of the class. A class without a
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
from pc_clip.evals import EvalContext, Result
from pc_clip.evals.prompting import templates_of
from pc_clip.evals.zeroshot import score
from pc_clip.metrics import intervals
from pc_clip.models.clip import Clip


def applies(data: Dataset, config: EvaluateConfig) -> str | None:
    if data.questions and config.extended.descriptions:
        return None
    return "a data set with classes, and --extended.descriptions FILE (generate_diffs.py --task describe writes one)"


def evaluate(context: EvalContext) -> Result:
    """Accuracy on the question that the descriptions are about, plain and with them; gain_* are differences."""
    config = context.config
    descriptions = read_descriptions(config.extended.descriptions)
    question = _question_of(context.data, descriptions, config.extended.descriptions)
    z = context.z[torch.from_numpy(question.rows)]
    details = {
        "question": question.name, "described": sum(name in descriptions for name in question.classes),
        "classes": len(question.classes), "descriptions": descriptions, "per_class": {},
    }  # fmt: skip
    result, plain = Result({}, len(question.rows), details), None
    for name, texts in class_texts(question, templates_of(question, config), descriptions).items():
        scores = z @ _mean_embeddings(context.clip, texts).T
        right = (scores.argmax(1).numpy() == question.target).astype(float)
        details["per_class"][name] = score(scores, question)["per_class"]
        plain = right if plain is None else plain  # the first one's
        figures = {name: right} | ({} if name == "extended_plain" else {f"gain_{name}": right - plain})
        result.metrics |= {figure: float(values.mean()) for figure, values in figures.items()}
        result.intervals |= {figure: intervals.of_mean(values, config.seed) for figure, values in figures.items()}
    return result


def class_texts(
    question: Question, templates: tuple[str, ...], descriptions: dict[str, list[str]]
) -> dict[str, list[list[str]]]:
    """The texts of each class, by the way descriptions are used."""
    plain = [[template.replace("{}", name) for template in templates] for name in question.classes]
    known = [descriptions.get(name, []) for name in question.classes]
    appended = [
        [f"{prompt.rstrip('.')}. {text}" for prompt in prompts for text in texts] if texts else prompts
        for prompts, texts in zip(plain, known)
    ]
    averaged = [prompts + texts for prompts, texts in zip(plain, known)]
    return {"extended_plain": plain, "extended_append": appended, "extended_average": averaged}


def _mean_embeddings(clip: Clip, texts: list[list[str]]) -> Tensor:
    """One unit vector a class: the mean of its texts' unit embeddings.  -> [classes, D]"""
    z = clip.embed_texts([text for of_class in texts for text in of_class])
    return F.normalize(torch.stack([part.mean(0) for part in z.split([len(t) for t in texts])]), dim=-1)


def _question_of(data: Dataset, descriptions: dict[str, list[str]], source: str) -> Question:
    """The question whose classes are described. Raises UserError for a class no question knows."""
    best = max(data.questions, key=lambda q: len(descriptions.keys() & set(q.classes)))
    if unknown := sorted(descriptions.keys() - set(best.classes)):
        known = nearest(unknown[0], best.classes)
        raise UserError(f"{source} describes {unknown[0]!r}, which is not a class of {data.name}. {known}")
    return best
