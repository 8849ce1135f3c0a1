"""What methods share: texts as tokens, this process's part of a batch, images as pixels or embeddings."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from accelerate import PartialState
from torch import Tensor
from tqdm import tqdm

from pc_clip.clip import Clip
from pc_clip.config import FinetuneConfig
from pc_clip.datasets import Dataset
from pc_clip.embeddings import embed_images, load_embeddings
from pc_clip.errors import UserError


class Texts:
    """Distinct texts, tokenised once. `rows` maps texts to rows of `tokens`, [U, L] int32."""

    def __init__(self, clip: Clip, texts: Sequence[str]) -> None:
        self.clip = clip
        self.distinct = list(dict.fromkeys(texts))
        self.row = {text: n for n, text in enumerate(self.distinct)}
        chunks = range(0, len(self.distinct), 4096)
        bar = tqdm(chunks, "tokenising", leave=False, disable=None if len(chunks) > 2 else True)
        self.tokens = torch.cat([clip.tokenizer(self.distinct[n : n + 4096]).int() for n in bar])
        self.truncated = int((self.tokens[:, -1] != 0).sum()) if clip._causal_tower is not None else 0

    def rows(self, texts: Sequence[str]) -> np.ndarray:
        return np.array([self.row[text] for text in texts], dtype=np.int64)

    def batch(self, rows: np.ndarray) -> Tensor:
        """Tokens of some rows, cut to the longest of them.  -> [B, L] int64"""
        return self.clip.trim(self.tokens[torch.from_numpy(rows)].long())


class Images:
    """Images by row: cached embeddings, or pixels where the image tower itself learns."""

    def __init__(self, clip: Clip, data: Dataset, config: FinetuneConfig) -> None:
        self.clip, self.data = clip, data
        self.learns = config.model.train == "both"
        self.z: Tensor | None = None
        self.ids = data.ids
        if config.data.embeddings:
            if self.learns:
                raise UserError("model.train both learns from images; data.embeddings cannot stand in for them")
            self.z, self.ids = load_embeddings(config.data.embeddings, clip)
        elif not self.learns:
            with PartialState().main_process_first():  # the others then find them in the cache
                self.z, self.ids = embed_images(clip, data, workers=config.data.workers)

    def batch(self, rows: np.ndarray) -> Tensor:
        """[B, D] embeddings, or [B, 3, H, W] pixels when the image tower learns."""
        if self.z is not None:
            return self.z[torch.from_numpy(rows)]
        return torch.stack([self.clip.preprocess(self.data.load(int(row))) for row in rows])

    def encode(self, images: Tensor) -> Tensor:
        """[B, D] embeddings of a batch from `batch`."""
        return images if self.z is not None else self.clip.encode_image(images)


def my_share(setting: str, batch_size: int) -> slice:
    """Which part of each global batch this process takes. Raises UserError when it cannot be dealt out evenly."""
    state = PartialState()
    if batch_size % state.num_processes:
        raise UserError(f"{setting} {batch_size} cannot be dealt out to {state.num_processes} processes")
    each = batch_size // state.num_processes
    return slice(state.process_index * each, (state.process_index + 1) * each)


def shuffled_batches(n: int, batch_size: int, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """Every item at most once an epoch, in whole batches."""
    order = rng.permutation(n)
    for start in range(0, n - batch_size + 1, batch_size):
        yield order[start : start + batch_size]
