"""Sentences on classes: how two differ (`--task compare`), and what one looks like (`--task describe`)."""

from __future__ import annotations

from typing import Any

from pc_clip.core.config.write import GenerateConfig
from pc_clip.data import class_text
from pc_clip.data.dataset import Dataset, Question
from pc_clip.data.differences import choose_pairs
from pc_clip.data.registry import READERS, open_dataset
from pc_clip.write.cleaning import clean
from pc_clip.write.work import MIN_OF_CLASSES, Task, job_seed
from pc_clip.write.writers import Job, Writer


def compare_task(config: GenerateConfig) -> Task:
    data, question = _classes(config)
    return Task(
        choose_pairs(list(question.classes), config.n_pairs, config.seed, config.both_orders),
        lambda a, b, n: _class_job(config.writer, data, question, a, b, job_seed(config.seed, n)),
        "pairs of classes",
        made_from=_of_classes(data, question),
    )


def describe_task(config: GenerateConfig) -> Task:
    data, question = _classes(config)

    def job(name: str, _: str, number: int) -> Job:
        seed = job_seed(config.seed, number)
        if config.writer == "rules":
            return Job(class_text.class_description(data, question, name, seed), "", seed)
        return Job(class_text.phrase(question, name), "", seed)

    return Task(
        [(name, str(k)) for name in question.classes for k in range(config.n_each)],
        job,
        "descriptions",
        {"class": "first", "text": "text"},
        _of_classes(data, question),
    )


def compare_classes(
    writer: Writer, kind: str, data: Dataset, question: Question, pairs: list[tuple[str, str]], seed: int
) -> list[str | None]:
    """A sentence a pair of classes on how the first differs from the second; None where it was not usable.

    kind: what the writer is, rules or a language model.
    """
    jobs = [_class_job(kind, data, question, a, b, job_seed(seed, n)) for n, (a, b) in enumerate(pairs)]
    answers = writer.write(jobs)
    return [None if getattr(raw, "cut", False) else clean(raw, MIN_OF_CLASSES)[0] for raw in answers]


def _classes(config: GenerateConfig) -> tuple[Dataset, Question]:
    splits = READERS[config.dataset].splits if config.dataset in READERS else ()
    data = open_dataset(config.dataset, config.root, config.split or next(iter(splits), None))
    return data, class_text.find_question(data, config.question)


def _of_classes(data: Dataset, question: Question) -> dict[str, Any]:
    return {"classes": list(question.classes), "data": data.label, "fingerprint": data.fingerprint}


def _class_job(writer: str, data: Dataset, question: Question, a: str, b: str, seed: int) -> Job:
    """Rules are told what sets the classes apart; a language model is told their names, and knows the rest."""
    if writer == "rules":
        return Job(*class_text.contrast_phrases(data, question, a, b, seed), seed)
    return Job(class_text.phrase(question, a), class_text.phrase(question, b), seed)
