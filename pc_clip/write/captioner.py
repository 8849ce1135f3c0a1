"""Sentences by a captioner of changes (pc_clip/change): it looks at two pictures, and reads no captions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from pc_clip.core.config.write import ChangeWriterConfig
from pc_clip.core.random import stream
from pc_clip.write.writers import Job, Writer

if TYPE_CHECKING:
    from pc_clip.data.dataset import Dataset
    from pc_clip.models.clip import Clip


class ToldWriter(Writer):
    """Says of each pair what the data set says of it; one of several sentences by seed.

    Where the data set lists the same two images more than once, any sentence of any of these may be drawn.
    """

    needs_cleaning = False

    def __init__(self, data: Dataset, seed: int) -> None:
        told: dict[tuple[str, str], list[tuple[int, str]]] = {}
        for row, change in enumerate(data.changes):
            told.setdefault((change.after, change.before), []).extend((row, text) for text in change.sentences)
        self.said = {}
        for pair, of in told.items():
            first, _ = of[0]
            self.said[pair] = of[stream(seed, "told", first).integers(len(of))][1]

    def stream(self, jobs: Sequence[Job]) -> Iterator[tuple[int, str]]:
        yield from enumerate(self.said[job.first, job.second] for job in jobs)

    def describe(self) -> dict[str, Any]:
        return {"writer": "change", "told": True}


class ChangeWriter(Writer):
    """Says how the first image of a job differs from the second; a job names them by the ids of the data set.

    Its sentences say how what came after differs from what was before, so that the second image is the one before.
    """

    needs_cleaning = False  # it knows the words of its training sentences and no others

    def __init__(self, clip: Clip, data: Dataset, config: ChangeWriterConfig) -> None:
        """clip: with a decoder. Raises UserError for a search that cannot be."""
        from pc_clip.data.images import Reader, plain
        from pc_clip.models.change_model import (
            Search,  # here and below, because the settings of all scripts read this file
        )

        self.clip, self.config = clip, config
        self.search = Search(config.beams, config.length_penalty)
        self.search.check()
        self.row = {key: n for n, key in enumerate(data.ids)}
        self.reader = Reader(data, plain(clip.preprocess), config.workers)
        self.weights = clip.weights_hash()

    @torch.no_grad()
    def stream(self, jobs: Sequence[Job]) -> Iterator[tuple[int, str]]:
        """As Writer says, a batch at a time. Raises UserError for an image that cannot be read."""
        from pc_clip.data.pairs import read_pairs

        pairs = np.array([(self.row[job.second], self.row[job.first]) for job in jobs], dtype=np.int64).reshape(-1, 2)
        starts = range(0, len(pairs), self.config.batch_size)
        batches = [pairs[start : start + self.config.batch_size] for start in starts]
        with closing(read_pairs(self.reader, batches)) as coming:
            for start, (before, after) in zip(starts, coming):
                yield from enumerate(self._say(before, after), start)

    def _say(self, before: Tensor, after: Tensor) -> list[str]:
        """[B, 3, H, W], [B, 3, H, W] -> B sentences"""
        change, device = self.clip.change, self.clip.device
        found = change.write(change.encoder(before.to(device), after.to(device)), self.search)
        return [change.vocabulary.decode(numbers) for numbers in found.tokens.tolist()]

    def describe(self) -> dict[str, Any]:
        return {
            "writer": "change",
            "checkpoint": self.config.checkpoint,
            "weights": self.weights,
            "model": self.clip.describe(),
            **self.search._asdict(),
        }
