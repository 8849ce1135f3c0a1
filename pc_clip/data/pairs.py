"""Run a change model over the pairs of a data set: embeddings, sentences, attention maps, cached tokens."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import closing
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from pc_clip.core.cache import cached
from pc_clip.data.dataset import Change, Dataset, digest
from pc_clip.data.images import Reader, plain
from pc_clip.models.change_model import Search
from pc_clip.models.clip import Clip, hash_tensors

log = logging.getLogger(__name__)


class Caption(NamedTuple):
    """A sentence on one pair. tokens: its pieces.

    attention: [T, 2, rows, columns], for each piece how much the decoder's last layer looked at each patch of before
    and after; None unless asked for.
    """

    text: str
    log_likelihood: float
    tokens: list[str]
    attention: np.ndarray | None = None


def pair_rows(data: Dataset) -> np.ndarray:
    """The images of each change, as rows of the data set.  -> [N, 2] int64"""
    row = {key: n for n, key in enumerate(data.ids)}
    pairs = [(row[change.before], row[change.after]) for change in data.changes]
    return np.array(pairs, dtype=np.int64).reshape(-1, 2)


@torch.no_grad()
def captions(
    clip: Clip,
    data: Dataset,
    *,
    beams: int = 1,
    length_penalty: float = 1.0,
    batch_size: int = 128,
    workers: int = 0,
    attention: bool = False,
) -> list[Caption]:
    """A sentence on each of data.changes, in their order. Each pair goes through the encoder once.

    Raises UserError for an image that cannot be read.
    """
    change, search, captions = clip.change, Search(beams, length_penalty), []
    search.check()
    for seen in seen_by_encoder(clip, data, batch_size, workers, "writing sentences"):
        tokens, likelihood = change.write(seen, search)
        maps = change.maps(tokens, seen).float().cpu().numpy() if attention else None
        for n, (numbers, value) in enumerate(zip(tokens.tolist(), likelihood.tolist())):
            words = change.vocabulary.words(numbers)
            looks = maps[n, : len(words)] if attention else None
            captions.append(Caption(change.vocabulary.decode(numbers), value, words, looks))
    return captions


@torch.no_grad()
def embed_pairs(clip: Clip, data: Dataset, *, batch_size: int = 128, workers: int = 0) -> Tensor:
    """Unit embeddings of data.changes, on the CPU.  -> [N, D] float32. Raises UserError for an unreadable image."""
    seen = seen_by_encoder(clip, data, batch_size, workers, "encoding pairs")
    z = [clip.change.encoder.embed(tokens).float().cpu() for tokens in seen]
    return nn.functional.normalize(torch.cat(z), dim=-1)


def seen_by_encoder(clip: Clip, data: Dataset, batch_size: int, workers: int, doing: str) -> Iterator[Tensor]:
    """The encoder's tokens of data.changes, batch by batch.  -> [B, 2 (P + 1), W]"""
    pairs = pair_rows(data)
    batches = [pairs[n : n + batch_size] for n in range(0, len(pairs), batch_size)]
    bar = tqdm(total=len(pairs), desc=doing, unit="pair", leave=False, disable=None if len(batches) > 4 else True)
    with bar:
        for before, after in read_pairs(Reader(data, plain(clip.preprocess), workers), batches):
            yield clip.change.encoder(before.to(clip.device), after.to(clip.device))
            bar.update(len(before))


@torch.no_grad()
def frozen_tokens(clip: Clip, data: Dataset, batch_size: int = 64, workers: int = 0) -> np.ndarray:
    """A frozen encoder's tokens of data.changes, memory-mapped from the cache.  -> [N, 2 (P + 1), W] float16

    Raises UserError for an image that cannot be read.
    """
    encoder = clip.change.encoder
    key = {  # decoder and text tower have no part
        "image_tower": clip.image_tower_hash(),
        "encoder": hash_tensors(encoder.state_dict(), extra=f"{clip.name} {encoder.intra_layers}"),
        "images": data.fingerprint,
        "pairs": digest([(change.before, change.after) for change in data.changes]),
        "device": clip.device.type,
    }

    def make() -> dict[str, np.ndarray]:
        tokens = np.empty((len(data.changes), 2 * (encoder.patches + 1), encoder.width), np.float16)
        log.info("%.1f GB of tokens of a frozen encoder", tokens.nbytes / 1e9)
        row = 0
        for batch in seen_by_encoder(clip, data, batch_size, workers, "encoding pairs"):
            tokens[row : row + len(batch)] = batch.float().cpu().numpy()
            row += len(batch)
        return {"tokens": tokens}

    return cached("pairs", key, make)["tokens"]


def read_pairs(reader: Reader, batches: Sequence[np.ndarray]) -> Iterator[tuple[Tensor, Tensor]]:
    """Pixels of both images of some pairs, [B, 2] rows each. An image of several pairs is read once a batch."""
    distinct = [np.unique(rows, return_inverse=True) for rows in batches]
    with closing(reader.batches(rows for rows, _ in distinct)) as coming:
        for batch, (_, place), pairs in zip(coming, distinct, batches):
            pixels, place = batch.whole(), torch.from_numpy(place.reshape(pairs.shape))
            yield pixels[place[:, 0]], pixels[place[:, 1]]


def distinct_sentences(changes: Sequence[Change]) -> tuple[list[str], list[list[int]]]:
    """The M distinct sentences of N changes, and for each change which of them are said of its two images."""
    place: dict[str, int] = {}
    texts_of: dict[tuple[str, str], set[int]] = {}
    for change in changes:
        of_pair = texts_of.setdefault((change.before, change.after), set())
        of_pair |= {place.setdefault(text, len(place)) for text in change.sentences}
    return list(place), [sorted(texts_of[change.before, change.after]) for change in changes]
