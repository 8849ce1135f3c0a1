"""What all writers share: a job, and what a writer has to do."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple


class Job(NamedTuple):
    """One sentence to write: what is known of the first and the second image or class, and a seed of its own.

    second is empty where one image or class alone is written about. picture: the name of one for the writer to look at,
    if it can; how it is had by that name is the writer's own (ServerWriter.look).
    """

    first: str
    second: str
    seed: int
    picture: str = ""


class Writer(ABC):
    """Turns jobs into raw sentences. The same job always gets the same sentence, as far as the writer is able to.

    needs_cleaning: whether its sentences go through the rules of write/cleaning.py, made for language models.
    """

    needs_cleaning = True

    @abstractmethod
    def stream(self, jobs: Sequence[Job]) -> Iterator[tuple[int, str]]:
        """(place in jobs, raw sentence) of each job once, in any order, as soon as each is finished.

        jobs may be half a million, each built when it is looked at, from any thread: look at few at a time. The
        iterator is closed when its reader stops.
        """

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """What made the sentences, for the file beside them."""

    def write(self, jobs: Sequence[Job]) -> list[str]:
        """Raw sentences in the order of the jobs."""
        found = dict(self.stream(jobs))
        return [found[n] for n in range(len(jobs))]
