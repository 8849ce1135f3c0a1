"""Phrases about classes, which writers compare and describe.

The rules writer needs more than names to say anything: grades of the classes in the data set's files (awa2, cub), or
captions of their images (the example).
"""

from __future__ import annotations

import re
from collections import defaultdict
from pathlib import Path

from pc_clip.core.errors import UserError, nearest
from pc_clip.core.random import stream
from pc_clip.data import attributes
from pc_clip.data.dataset import Dataset, Question
from pc_clip.data.text_files import json_lines, words

_OPENING = re.compile(r"^this is an? (?:photo|picture|image) of ", re.IGNORECASE)


def phrase(question: Question, name: str) -> str:
    """A class as its prompt names it: "a grizzly bear", "an apple", "an object on the left"."""
    text = _OPENING.sub("", question.templates[0].replace("{}", name)).rstrip(".")
    return re.sub(r"^a(?= [aeiou])", "an", text)


def find_question(data: Dataset, name: str | None) -> Question:
    """Raises UserError where the data set has no such question, or several and none was named."""
    known = {question.name: question for question in data.questions}
    if not known:
        raise UserError(f"{data.label} has no classes")
    if name is None and len(known) > 1:
        raise UserError(f"{data.label} asks about {', '.join(known)}; say which with --question")
    if name is not None and name not in known:
        raise UserError(f"{data.label} asks no question {name!r}. {nearest(name, known)}")
    return known[name] if name else next(iter(known.values()))


def contrast_phrases(data: Dataset, question: Question, a: str, b: str, seed: int) -> tuple[str, str]:
    """Two phrases that set class a against class b, from what the data set's files say of them; else their names.

    CUB's attributes come in families ("has_wing_color::blue"), of which the one with the widest gaps is taken.
    """
    gaps = {name: of_class[a] - of_class[b] for name, of_class in question.graded.items()}
    families = defaultdict(dict)
    for name, gap in gaps.items():
        family, _, value = name.partition("::")
        families[family][value] = gap
    if any("::" in name for name in gaps):
        family = max(families, key=lambda name: (sum(map(abs, families[name].values())), name))
        gap = families[family]
        return _in_words(family, max(gap, key=gap.get)), _in_words(family, min(gap, key=gap.get))
    phrases, rng = _graded_phrases(data), stream(seed, "class text")
    gaps = {name: gaps[name] for name in phrases if name in gaps}
    if not any(gaps.values()):
        return phrase(question, a), phrase(question, b)
    name = max(gaps, key=lambda name: (abs(gaps[name]), rng.random(), name))
    high, low = phrases[name]
    return (high, low) if gaps[name] > 0 else (low, high)


def class_description(data: Dataset, question: Question, name: str, seed: int) -> str:
    """One description of a class by rule: from its grades, or a caption of one of its images that names it.

    Of the grades the five most pronounced are told, one a family; equal ones are drawn.
    Raises UserError where nothing is known of it.
    """
    rng = stream(seed, "class text")
    if question.graded:
        phrases = _graded_phrases(data)
        graded = [
            (of_class[name], rng.random(), attribute)
            for attribute, of_class in question.graded.items()
            if of_class[name] > 0 and ("::" in attribute or attribute in phrases)
        ]
        parts: dict[str, str] = {}
        for _, _, attribute in sorted(graded, reverse=True):
            family, _, value = attribute.partition("::")
            parts.setdefault(family, _in_words(family, value) if value else phrases[attribute][0])
        whole = phrase(question, name)
        whole = whole[:1].upper() + whole[1:]
        return f"{whole}: {', '.join(list(parts.values())[:5])}." if parts else whole
    if data.captions:
        rows = question.rows[question.target == question.classes.index(name)]
        if not len(rows):
            raise UserError(f"{data.label} shows no {name}, so that there is no caption to describe it by")
        captions = [caption for row in rows for caption in data.captions[row]]
        naming = [caption for caption in captions if name.lower() in caption.lower()]
        return str(rng.choice(naming or captions))
    raise UserError(
        f"the rules know nothing of the classes of {data.name} but their names; use --writer transformers, which asks "
        "a language model"
    )


def _graded_phrases(data: Dataset) -> dict[str, tuple[str, str]]:
    """Graded attribute -> what shows much of it, and what little, from data/attributes/."""
    tasks = (attributes.read_task(attributes.FOLDER / f"{task}.yaml") for task in attributes.tasks_of(data.name))
    return {
        about["graded"]: (about["high"], about["low"])
        for task in tasks
        for about in task["attributes"].values()
        if "graded" in about and "minus" not in about
    }


def _in_words(family: str, value: str) -> str:
    part = family.removeprefix("has_").replace("_", " ")
    value = re.sub(r"_?\(.*?\)", "", value).replace("_", " ").strip()
    return f"a bird of {value} {part}" if part in ("size", "shape") else f"a bird with {value} {part}"


def read_descriptions(path: str | Path) -> dict[str, list[str]]:
    """A file of class descriptions, one JSON a line with class and text: class -> its descriptions.

    Raises UserError for a file that is absent or empty, and for a line that is none.
    """
    descriptions: dict[str, list[str]] = {}
    for where, line in json_lines(Path(path), ("class", "text")):
        descriptions.setdefault(words(line["class"], where, "class"), []).append(words(line["text"], where, "text"))
    if not descriptions:
        raise UserError(f"{path} is empty; generate_diffs.py --task describe --overwrite true writes it again")
    return descriptions
