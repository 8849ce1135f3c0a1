"""The prompts of a question, its classes as unit vectors, and what comparisons of classes add to them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from pc_clip.core.config.evaluate import EvaluateConfig
from pc_clip.core.errors import UserError, check_choice
from pc_clip.data.dataset import Question
from pc_clip.models.clip import Clip

Comparisons = Sequence[Mapping[str, str]]  # of {class_a, class_b, text}


def templates_of(question: Question, config: EvaluateConfig) -> tuple[str, ...]:
    """The prompts of a question: the user's own, the data set's list with --prompts several, else the one default.

    Raises UserError for a prompt without a place for the class.
    """
    check_choice("prompts", config.prompts, ("paper", "several"))
    templates = tuple(config.templates) or (config.prompts == "several" and question.several) or question.templates
    for template in templates:
        if "{}" not in template:
            raise UserError(f"the prompt {template!r} has no {{}} where the class belongs")
    return templates


def class_embeddings(clip: Clip, question: Question, templates: Sequence[str] = ()) -> Tensor:
    """One unit vector a class: the mean over the templates of the unit embeddings of its prompts.  -> [classes, D]"""
    templates = tuple(templates) or question.templates
    prompts = [template.replace("{}", name) for name in question.classes for template in templates]
    z = clip.embed_texts(prompts).view(len(question.classes), len(templates), -1)
    return F.normalize(z.mean(1), dim=-1)


def corrections(
    clip: Clip, question: Question, prompts: Tensor, comparisons: Comparisons, calibration: str, offset: Tensor
) -> tuple[Tensor, Tensor]:
    """mean over a of (t_a - enc(how a differs from b)) for each class b; t_b itself where nothing is known.

    offset: [D], the mean embedding of unlabelled images.  -> [classes, D], and what is to be added to each class's
    score, [classes]: with calibration offset the mean score of its difference embeddings over these images, else 0.
    """
    corrected, shift = prompts.clone(), torch.zeros(len(prompts))
    for b, name in enumerate(question.classes):
        about = [c for c in comparisons if c["class_b"] == name]
        if about:
            from_a = prompts[[question.classes.index(c["class_a"]) for c in about]]  # [A, D]
            gaps = clip.embed_texts([c["text"] for c in about])  # [A, D]
            if calibration != "none":
                gaps = gaps * (from_a - prompts[b]).norm(dim=-1, keepdim=True)
            corrected[b] = (from_a - gaps).mean(0)
            if calibration == "offset":
                shift[b] = (gaps @ offset).mean()
    return corrected, shift
