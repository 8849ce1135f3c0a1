"""Graded attributes of images: the data set's own, and those defined on classes in data/attributes/.

data/attributes/NAME.yaml is one task. What is known of an image is what is known of its class, and classes and
attributes are found by name, never by position:

    dataset: cifar100
    attributes:
      size:
        more: a larger animal           # "The first image shows ...", of an image that has more of it
        less: a smaller animal
        high: a photo of a large animal # for a prompt, of one image that has much of it
        low: a photo of a small animal
        high_classes: [camel, lion]     # either two lists of classes,
        low_classes: [hamster, mouse]   # images of all others are left out;
        graded: big                     # or an attribute that the data set's own files grade the classes by,
        minus: small                    # less another one, if it has an opposite
        gap: 0.5                        # two images differ clearly when they are further apart than this
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from pc_clip.core.config.evaluate import EvaluateConfig
from pc_clip.core.errors import UserError, nearest
from pc_clip.core.paths import package_data
from pc_clip.data import graded_nouns
from pc_clip.data.dataset import Attribute, Dataset, Question

FOLDER = package_data(Path(__file__).with_name("attributes"))
NOUNS = "nouns"
_WORDS = ("more", "less", "high", "low")


def tasks_of(dataset: str) -> list[str]:
    """The tasks that are defined on a data set."""
    return [path.stem for path in sorted(FOLDER.glob("*.yaml")) if read_task(path)["dataset"] == dataset]


def known_of(data: Dataset, config: EvaluateConfig) -> bool:
    """Whether anything graded is known of a data set's images."""
    return bool(data.attributes or tasks_of(data.name) or (NOUNS in config.tasks and data.captions))


def of(data: Dataset, config: EvaluateConfig) -> tuple[Attribute, ...]:
    """The data set's own attributes and those of its tasks, or of the tasks that were asked for alone.

    The task nouns, of any data set with captions, has to be asked for (data/graded_nouns.py).
    Raises UserError for a task that is unknown or of another data set.
    """
    defined = tasks_of(data.name)
    own = {attribute.name for attribute in data.attributes}
    nouns = NOUNS in config.tasks and bool(data.captions)
    for task in config.tasks:
        if task not in defined and task not in own and not (nouns and task == NOUNS):
            raise UserError(f"{data.name} has no task {task!r}. {nearest(task, [*defined, *own])}")
    wanted = config.tasks or [*own, *defined]
    attributes = (
        *(graded_nouns.attributes_of(data) if nouns else ()),
        *(attribute for attribute in data.attributes if attribute.name in wanted),
        *(attribute for task in defined if task in wanted for attribute in read(FOLDER / f"{task}.yaml", data)),
    )
    if nouns and not attributes:
        raise UserError(f"the captions of {data.name} name no two grades of size, people, nature or light to rank by")
    return attributes


def read(path: Path, data: Dataset) -> list[Attribute]:
    """The attributes of one task, with a value for each image of `data`; NaN where the task says nothing of its class.

    Raises UserError for a class or a graded attribute that the data set does not have.
    """
    attributes = read_task(path)["attributes"]
    if not data.questions:
        raise UserError(f"{path} asks about classes, and {data.label} has none")
    question, read = data.questions[0], []
    for name, about in attributes.items():
        value = np.full(len(data), np.nan)
        value[question.rows] = _by_class(about, question, f"{path}: {name}")[question.target]
        name = path.stem if len(attributes) == 1 else f"{path.stem}_{name}"
        sentences = (about[word] for word in _WORDS)
        read.append(Attribute(name, value, *sentences, gap=float(about.get("gap", 0.5)), task=path.stem))
    return read


def _by_class(about: dict[str, Any], question: Question, where: str) -> np.ndarray:
    """An attribute's value for each class.  -> [classes], NaN where it is unknown"""
    if "graded" in about:
        value = _graded(about["graded"], question, where)
        return value - _graded(about["minus"], question, where) if "minus" in about else value
    value = np.full(len(question.classes), np.nan)
    place = {name: n for n, name in enumerate(question.classes)}
    for key, amount in (("high_classes", 1.0), ("low_classes", 0.0)):
        for name in about[key]:
            if name not in place:
                raise UserError(f"{where}: {name!r} is not a class of this data set. {nearest(name, place)}")
            if not np.isnan(value[place[name]]):
                raise UserError(f"{where}: {name!r} is named twice")
            value[place[name]] = amount
    return value


def _graded(attribute: str, question: Question, where: str) -> np.ndarray:
    if attribute not in question.graded:
        raise UserError(f"{where}: the data set grades no {attribute!r}. {nearest(attribute, question.graded)}")
    of_class = question.graded[attribute]
    return np.array([of_class.get(name, np.nan) for name in question.classes])


@cache
def read_task(path: Path) -> dict[str, Any]:
    """The content of a task's file, cached: do not modify it."""
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict) or {"dataset", "attributes"} - content.keys():
        raise UserError(f"{path} is not an attribute task: it needs dataset and attributes")
    for name, about in content["attributes"].items():
        needed = {*_WORDS, "graded"} if "graded" in about else {*_WORDS, "high_classes", "low_classes"}
        if wrong := sorted((needed - about.keys()) | (about.keys() - needed - {"minus", "gap"})):
            raise UserError(f"{path}: {name} lacks, or has beside {', '.join(sorted(needed))}: {', '.join(wrong)}")
    return content
