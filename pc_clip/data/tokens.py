"""Tokenized texts, cached: open_clip's tokenizer reads some 9,000 sentences a second, a run has half a million."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from pc_clip.core.cache import cached

AT_A_TIME = 2048  # texts that are tokenised together
MANY = 20_000  # from so many texts on, worker processes are worth their start


def tokenize(tokenizer: Any, texts: Sequence[str], cache: Path | None = None) -> np.ndarray:
    """Tokens of texts, from the cache or made and put there.  -> [N, context length], uint16 (int32 if they need it)

    The array may be memory-mapped. cache: a folder, in place of the usual one.
    """
    made_by = identity(tokenizer)
    if made_by is None:
        return make(tokenizer, texts)
    key = {"texts": digest_of(texts), "tokenizer": made_by}
    return cached("texts", key, lambda: {"tokens": make(tokenizer, texts)}, cache)["tokens"]


def make(tokenizer: Any, texts: Sequence[str]) -> np.ndarray:
    """Tokens of texts, made anew, by several processes if there are many texts.  -> [N, context length]"""
    chunks = [texts[n : n + AT_A_TIME] for n in range(0, len(texts), AT_A_TIME)]
    workers = min(_cores(), 16) if len(texts) >= MANY and _cores() > 1 else 0
    loader = DataLoader(_Chunks(tokenizer, chunks), batch_size=None, num_workers=workers)
    bar = tqdm(loader, "tokenising", leave=False, disable=None if len(chunks) > 4 else True)
    return np.concatenate([part.numpy() for part in bar])


class _Chunks(Dataset):
    """Tokenises one part of the texts at a time, so that worker processes can share the work."""

    def __init__(self, tokenizer: Any, chunks: list[Sequence[str]]) -> None:
        self.tokenizer, self.chunks = tokenizer, chunks

    def __len__(self) -> int:
        return len(self.chunks)

    def __getitem__(self, n: int) -> Tensor:
        tokens = self.tokenizer(list(self.chunks[n]))
        small = int(tokens.min()) >= 0 and int(tokens.max()) <= np.iinfo(np.uint16).max
        return tokens.to(torch.uint16 if small else torch.int32)


def _cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def digest_of(texts: Sequence[str]) -> str:
    """SHA-256 of texts in their order. Where one ends and the next begins counts."""
    lengths = np.array([len(text) for text in texts], dtype="<u8").tobytes()
    return hashlib.sha256(lengths + "".join(texts).encode("utf-8", "surrogatepass")).hexdigest()


_PROBES = [  # texts on which tokenizers differ
    "The first image shows 2 DOGS;  a_b caf\u00e9 \u2019s they'll  <b>x &amp; y</b> \u4e2d\u6587 \U0001f600",
    "a photo of a cat, an unbelievably-striped zebra, 3.14 %",
    "x " * 300,
]


def identity(tokenizer: Any) -> str | None:
    """A cache key of a tokenizer: class, settings, library versions, and its tokens of a few probe texts.

    None for one without a context length, or that drops tokens at random: its tokens are not cached.
    """
    context = getattr(tokenizer, "context_length", None)
    if not context or getattr(tokenizer, "reduction_fn", None) is not None:
        return None
    versions = {name: version(name) for name in ("open_clip_torch", "transformers", "tokenizers", "ftfy", "regex")}
    kind = f"{type(tokenizer).__module__}.{type(tokenizer).__qualname__}"
    cleaning = getattr(getattr(tokenizer, "clean_fn", None), "__qualname__", None)
    settings = [context, getattr(tokenizer, "vocab_size", None), cleaning]  # special tokens are in no probe text
    parts = [kind, settings, versions, tokenizer(_PROBES).tolist()]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()
