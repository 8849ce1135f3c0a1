"""Difference sentences of any writer in other words: --task reword, by rule or by a language model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pc_clip.core.config.write import GenerateConfig
from pc_clip.core.errors import UserError
from pc_clip.core.random import stream
from pc_clip.data import differences
from pc_clip.data.download import file_digest
from pc_clip.data.wordings import Wordings, reword, swap_roles
from pc_clip.write.cleaning import Checked, Given, check
from pc_clip.write.words import content_words_by_image
from pc_clip.write.work import Task, job_seed, least_characters
from pc_clip.write.writers import Job, Writer


def reword_task(config: GenerateConfig) -> Task:
    """A sentence for each of a file of differences, about the same images."""
    if not config.differences:
        raise UserError("--task reword needs --differences FILE, the sentences that are put in other words")
    known = differences.read(config.differences)
    by_rule = config.writer == "rules"
    return Task(
        [(each.first, each.second) for each in known],
        lambda i, j, n: Job(known[n].text, "", job_seed(config.seed, n)),
        "differences",
        made_from={"differences_sha256": file_digest(Path(config.differences), "sha256")},
        make_writer=_Rules if by_rule else None,
        judge=_judge_rule if by_rule else lambda raw, job: _judge_model(raw, job, least_characters(config)),
    )


class _Rules(Writer):
    """Other names for the images, another order or connective (data/wordings.reword); empty where that is unclear."""

    needs_cleaning = False

    def __init__(self, config: GenerateConfig) -> None:
        wording = config.wording
        self.wordings = Wordings(wording.families, wording.schemes, without=wording.without)

    def stream(self, jobs: Sequence[Job]) -> Iterator[tuple[int, str]]:
        for n, job in enumerate(jobs):
            yield n, reword(job.first, self.wordings, stream(job.seed, "reword")) or ""

    def describe(self) -> dict[str, Any]:
        return {"writer": "rules", "schemes": list(self.wordings.schemes)}


def _judge_rule(raw: str, job: Job) -> Checked:
    return Checked(raw or None, "kept" if raw else "no_roles")


def _judge_model(raw: str, job: Job, min_characters: int) -> Checked:
    """Clean a reworded sentence, and check that each image keeps its content words."""
    checked = check(raw, Given(min_characters, (job.first,)))
    if checked.text is None:
        return checked
    if swap_roles(checked.text) is None:
        return Checked(None, "no_roles")
    (a, b), (first, second) = content_words_by_image(job.first), content_words_by_image(checked.text)
    straight, crossed = len(a & first) + len(b & second), len(a & second) + len(b & first)
    return checked if straight > crossed else Checked(None, "roles_exchanged")
