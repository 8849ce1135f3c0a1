"""The writer interface: a job, and the methods of a writer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from pc_clip.core.errors import UserError


class Job(NamedTuple):
    """One sentence to write: the texts of the first and second image or class, and a seed.

    second is empty where one image or class alone is written about. picture: id of an image for vision-language
    writers (ServerWriter.look).
    """

    first: str
    second: str
    seed: int
    picture: str = ""


class Answer(str):
    """A raw sentence. cut: whether it ended at the longest answer allowed, so that its end is missing."""

    cut: bool

    def __new__(cls, text: str, cut: bool = False) -> Answer:
        answer = super().__new__(cls, text)
        answer.cut = cut
        return answer


class Writer(ABC):
    """Turns jobs into raw sentences. The same job always gets the same sentence, as far as the writer is able to.

    needs_cleaning: whether its sentences go through the rules of write/cleaning.py, made for language models. failed:
    how many jobs the last stream left out because they could not be done; last_error: why the last of them.
    """

    needs_cleaning = True
    failed = 0
    last_error = ""

    @abstractmethod
    def stream(self, jobs: Sequence[Job]) -> Iterator[tuple[int, str]]:
        """(place in jobs, raw sentence) of each job once, in any order, as soon as each is finished.

        A sentence may be an Answer. A job that failed is left out and counted. jobs may be half a million: look at few
        at a time. The iterator is closed when its reader stops.
        """

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """The writer's identity and settings, for the metadata file."""

    def write(self, jobs: Sequence[Job]) -> list[str]:
        """Raw sentences in the order of the jobs. Raises UserError when one is missing."""
        sentences = dict(self.stream(jobs))
        if missing := len(jobs) - len(sentences):
            raise UserError(
                f"{missing} of {len(jobs)} sentences could not be written; the last error: {self.last_error}"
            )
        return [sentences[n] for n in range(len(jobs))]
