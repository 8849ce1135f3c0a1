"""The prompts of a question, and its classes as unit vectors."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from pc_clip.core.config.evaluate import EvaluateConfig
from pc_clip.core.errors import UserError, check_choice
from pc_clip.data.dataset import Question
from pc_clip.models.clip import Clip


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
