"""What all writers share: a job, and what a writer has to do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol


class Job(NamedTuple):
    """One sentence to write: what is known of the first and the second image or class, and a seed of its own.

    second is empty where one class alone is described.
    """

    first: str
    second: str
    seed: int


class Writer(Protocol):
    def write(self, jobs: Sequence[Job]) -> list[str]:
        """Raw sentences, one a job. The same job always gets the same sentence."""

    def describe(self) -> dict[str, Any]:
        """What made the sentences, for the file beside them."""
