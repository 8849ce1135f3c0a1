"""Difference sentences by a change captioner, which sees both pictures and no captions.

A change sentence says how the picture after differs from the one before; a difference says how its first image differs
from its second. So `first` is the picture after, and `second` the one before. Sentences that say that nothing changed
hold no direction to learn: they are rejected as no_change, and counted in NAME.meta.json.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import closing
from typing import Any

import numpy as np
import torch

from pc_clip.core.config.settings import DataConfig
from pc_clip.core.config.write import ChangeWriterConfig, GenerateConfig
from pc_clip.core.distributed import Processes
from pc_clip.core.environment import resolve_device
from pc_clip.core.errors import UserError, check_at_least
from pc_clip.core.random import stream
from pc_clip.data.dataset import Dataset
from pc_clip.data.differences import choose_pairs
from pc_clip.data.images import Reader, plain
from pc_clip.data.pairs import read_pairs
from pc_clip.data.training_data import load_dataset
from pc_clip.models import loading
from pc_clip.models.change_model import Search, change_of
from pc_clip.models.clip import Clip
from pc_clip.write.cleaning import Checked
from pc_clip.write.progress import Item
from pc_clip.write.work import Task, draw_images
from pc_clip.write.writers import Job, Writer


def change_task(config: GenerateConfig, processes: Processes) -> Task:
    """Raises UserError for settings that do not fit, and for a checkpoint that cannot write."""
    change = config.change
    if change.references and (change.checkpoint or config.both_orders or change.beams != 1):
        raise UserError(
            "change.references writes the data set's sentences, of pairs in its own order; leave change.checkpoint, "
            "change.beams and both_orders out"
        )
    for name, least in (("beams", 1), ("batch_size", 1), ("workers", 0)):
        check_at_least(f"change.{name}", getattr(change, name), least)
    clip = None if change.references else _captioner(change, processes)
    data = load_dataset(DataConfig(config.dataset, config.root, config.split, change.missing, upright=change.upright))
    if change.references and not data.changes:
        raise UserError(f"{data.label} says nothing of pairs of images; leave change.references out")
    return Task(
        pairs(data, config),
        lambda first, second, _: Job(first, second, 0),  # it draws nothing
        "pairs",
        made_from={
            "data": data.label,
            "fingerprint": data.fingerprint,
            "change": {"beams": change.beams, "length_penalty": change.length_penalty},
            "checkpoint": clip.weights_hash() if clip else "references",
        },
        make_writer=lambda _: ChangeWriter(clip, data, change) if clip else ReferenceWriter(data, config.seed),
        judge=lambda raw, _: judge(raw),
    )


def pairs(data: Dataset, config: GenerateConfig) -> list[Item]:
    """(after, before) of each change of a data set, each pair once, or of `n_pairs` of them drawn by seed.

    A data set without changes gives pairs of its images as other writers have them. With `both_orders` the mirror
    image follows each pair, unless it came before. Raises UserError when fewer pairs exist than were asked for.
    """
    if not data.changes:
        ids = draw_images(data.ids, config, "images are there")
        return choose_pairs(ids, config.n_pairs, config.seed, config.both_orders)
    if config.n_images is not None:
        raise UserError(f"--n_images has no effect on {data.label}, which has pairs of its own; take --n_pairs")
    changes = list(dict.fromkeys((change.after, change.before) for change in data.changes))
    if config.n_pairs is not None:
        if config.n_pairs > len(changes):
            raise UserError(f"{config.n_pairs} pairs were asked for, but {data.label} has {len(changes)}")
        rng = stream(config.seed, "pairs")
        changes = [changes[n] for n in np.sort(rng.choice(len(changes), config.n_pairs, replace=False))]
    if config.both_orders:  # of which a data set may list some itself
        changes = list(dict.fromkeys(p for pair in changes for p in (pair, pair[::-1])))
    return changes


def _captioner(config: ChangeWriterConfig, processes: Processes) -> Clip:
    """The model of a checkpoint. Raises UserError for one that has no decoder."""
    device = resolve_device(config.device, "change.device")
    device = f"cuda:{processes.local_rank}" if device == "cuda" and processes.size > 1 else device
    clip = loading.load_model(config.checkpoint, device=device) if config.checkpoint else None
    if clip is None or change_of(clip) is None or clip.change.decoder is None:
        raise UserError(
            f"--change.checkpoint {config.checkpoint!r} cannot write of pairs of images; give a run of finetune.py "
            "--method change --change.stage caption, or --change.references true for what the data set itself says"
        )
    return clip


# -- writers -------------------------------------------------------------------------------------------


class ReferenceWriter(Writer):
    """Says of each pair what the data set says of it: one of all sentences listed for these two images, by seed."""

    needs_cleaning = False

    def __init__(self, data: Dataset, seed: int) -> None:
        listed: dict[tuple[str, str], list[tuple[int, str]]] = {}
        for row, change in enumerate(data.changes):
            listed.setdefault((change.after, change.before), []).extend((row, text) for text in change.sentences)
        self.sentence = {
            pair: rows[stream(seed, "told", rows[0][0]).integers(len(rows))][1] for pair, rows in listed.items()
        }

    def stream(self, jobs: Sequence[Job]) -> Iterator[tuple[int, str]]:
        yield from enumerate(self.sentence[job.first, job.second] for job in jobs)

    def describe(self) -> dict[str, Any]:
        return {"writer": "change", "references": True}


class ChangeWriter(Writer):
    """Says how the first image of a job (after) differs from the second (before); a job has their ids in `data`."""

    needs_cleaning = False  # it knows the words of its training sentences and no others

    def __init__(self, clip: Clip, data: Dataset, config: ChangeWriterConfig) -> None:
        """clip: with a decoder. Raises UserError for a search that cannot be."""
        self.clip, self.config = clip, config
        self.search = Search(config.beams, config.length_penalty)
        self.search.check()
        self.row = {key: n for n, key in enumerate(data.ids)}
        self.reader = Reader(data, plain(clip.preprocess), config.workers)

    @torch.no_grad()
    def stream(self, jobs: Sequence[Job]) -> Iterator[tuple[int, str]]:
        """See Writer; a batch at a time. Raises UserError for an image that cannot be read."""
        change, device, size = self.clip.change, self.clip.device, self.config.batch_size
        rows = np.array([(self.row[job.second], self.row[job.first]) for job in jobs], dtype=np.int64).reshape(-1, 2)
        starts = range(0, len(rows), size)
        with closing(read_pairs(self.reader, [rows[start : start + size] for start in starts])) as batches:
            for start, (before, after) in zip(starts, batches):  # [B, 3, H, W] each
                written = change.write(change.encoder(before.to(device), after.to(device)), self.search)
                yield from enumerate((change.vocabulary.decode(words) for words in written.tokens.tolist()), start)

    def describe(self) -> dict[str, Any]:
        return {
            "writer": "change",
            "checkpoint": self.config.checkpoint,
            "weights": self.clip.weights_hash(),
            "model": self.clip.describe(),
            **self.search._asdict(),
        }


# -- sentences that say nothing ------------------------------------------------------------------------


def judge(raw: str) -> Checked:
    """A sentence to keep, or why it is not: empty, or no_change."""
    text = " ".join(raw.split())
    if not text:
        return Checked(None, "empty")
    return Checked(None, "no_change") if says_no_change(text) else Checked(text, "kept")


_WHOLE = (
    r"(?:every\ ?thing|all|they|it|(?:\w+\ ){0,2}(?:scenes?|images?|pictures?|photos?|shots?|pair|views?|two|both))"
)
_NO_CHANGE = re.compile(
    rf"""
    # "no visible differences", "nothing in the second picture has changed"
    \bno \ (?:\w+\ ){{0,2}}(?:changes?|different|differences?|alterations?|modifications?)\b
  | \bnothing \ (?:(?!else)\w+\ ){{0,8}}(?:chang|alter|modif|mov|differ|happen)\w*\b
    # "both images are the same", "everything is as it was", "the scene did not change"
  | ^{_WHOLE}\ (?:\w+\ ){{0,4}}(?:same|identical|unchanged|alike)(?:\ (?:as|in|to|with)\b.*)?\W*$
  | ^{_WHOLE}\ (?:\w+\ ){{0,2}}(?:is|are|was|were|looks?|stay\w*|remain\w*)\ (?:just\ |exactly\ )?as\b
  | ^{_WHOLE}\ (?:\w+\ )?(?:not|\w+n't|never)\ (?:\w+\ )?(?:chang|differ|alter)\w*\b
  | ^(?:the\ )?(?:same|no|none|nothing|unchanged|identical)\W*$
    """,
    re.VERBOSE | re.IGNORECASE,
)
_EXCEPT = re.compile(
    r"\b(?:but|except\w*|other than|apart from|besides|aside from|only|however|although|though)\b", re.I
)


def says_no_change(text: str) -> bool:
    """Whether a sentence says that two whole pictures do not differ, and makes no exception ("nothing but ...")."""
    return bool(_NO_CHANGE.search(text)) and not _EXCEPT.search(text)
