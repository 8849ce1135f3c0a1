"""Texts as tokens, made once: a table in a file that later runs map into memory.

open_clip's tokenizer is plain Python and reads some nine thousand sentences a second, so that the half million of a
run take a minute. `tokenize` keeps what it made (`pc_clip.core.cache`) under a key of the texts and of all that the
tokenizer's answer depends on.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import unicodedata
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from pc_clip.core import cache as array_cache

AT_A_TIME = 2048  # texts that are tokenised together
MANY = 20_000  # from so many texts on, worker processes are worth their start

# -- tokens --------------------------------------------------------------------------------------------


def tokenize(tokenizer: Any, texts: Sequence[str], cache: Path | None = None) -> np.ndarray:
    """Tokens of texts, from the cache or made and put there.  -> [N, context length], uint16 (int32 if they need it)

    The array may be mapped from its file: it takes no memory until it is read. A tokenizer of a kind that is not
    known here (`identity`) is asked each time. cache: a folder; data/cache/tokens unless given.
    """
    made_by = identity(tokenizer)
    if made_by is None:
        return make(tokenizer, texts)
    key = {"texts": digest_of(texts), "tokenizer": made_by}
    return array_cache.cached("texts", key, lambda: {"tokens": make(tokenizer, texts)}, cache)["tokens"]


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


# -- which tokenizer -----------------------------------------------------------------------------------

_PROBE = [
    "The first image shows 2 DOGS;  a_b caf\u00e9 \u2019s",
    "x " * 300,
]  # seen by every tokenizer, as a second look


def identity(tokenizer: Any) -> str | None:
    """Names all that the tokenizer's answer depends on: class, vocabulary, settings, versions of the libraries.

    None for a tokenizer of another class than open_clip's two, with attributes that are not known here, or whose
    answer is left to chance: what it would say tomorrow is not known.
    """
    describe = {"SimpleTokenizer": _simple, "HFTokenizer": _hugging_face}.get(type(tokenizer).__name__)
    if type(tokenizer).__module__ != "open_clip.tokenizer" or describe is None:
        return None
    about = describe(tokenizer)
    if about is None or not tokenizer.context_length:
        return None
    machine = [*sys.version_info[:2], unicodedata.unidata_version, version("open_clip_torch"), version("ftfy")]
    about |= {"class": type(tokenizer).__name__, "context": tokenizer.context_length, "machine": machine}
    about["says"] = tokenizer(_PROBE).tolist()
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()


_SIMPLE = (
    "byte_encoder byte_decoder encoder decoder bpe_ranks cache pat vocab_size all_special_ids sot_token_id "
    "eot_token_id context_length clean_fn reduction_fn"
)
_HUGGING_FACE = "tokenizer_mode context_length clean_fn strip_sep_token tokenizer set_lang_fn"


def _simple(tokenizer: Any) -> dict[str, Any] | None:
    """CLIP's own."""
    cleaning = _name(tokenizer.clean_fn)
    if tokenizer.reduction_fn is not None or cleaning is None or vars(tokenizer).keys() - _SIMPLE.split():
        return None  # a reduction drops tokens at random
    return {
        "vocabulary": list(tokenizer.encoder.items()),
        "merges": list(tokenizer.bpe_ranks.items()),
        "bytes": list(tokenizer.byte_encoder.items()),
        "words": [tokenizer.pat.pattern, tokenizer.pat.flags, version("regex")],
        "special": [tokenizer.sot_token_id, tokenizer.eot_token_id],
        "cleaning": cleaning,
    }


def _hugging_face(tokenizer: Any) -> dict[str, Any] | None:
    """One of transformers' that is kept whole in one description (the "fast" ones are)."""
    inner, cleaning = tokenizer.tokenizer, _name(tokenizer.clean_fn)
    known = getattr(inner, "is_fast", False) and type(inner).__module__.startswith("transformers.")
    if not known or cleaning is None or vars(tokenizer).keys() - _HUGGING_FACE.split():
        return None
    whole = json.loads(inner.backend_tokenizer.to_str())
    ids = [getattr(inner, f"{name}_token_id") for name in ("pad", "sep", "cls", "bos", "eos")]
    return {
        # Padding and truncation are left as the last call wanted them; open_clip says at each call what it wants.
        "whole": {name: part for name, part in whole.items() if name not in ("padding", "truncation")},
        "inner": [
            f"{type(inner).__module__}.{type(inner).__qualname__}",
            inner.padding_side,
            inner.truncation_side,
            ids,
        ],
        "mode": [tokenizer.tokenizer_mode, tokenizer.strip_sep_token],
        "cleaning": cleaning,
        "libraries": [version("transformers"), version("tokenizers")],
    }


def _name(cleaning: Callable[[str], str]) -> str | None:
    """A cleaning function of open_clip's by name; None for any other."""
    name = getattr(cleaning, "__qualname__", "<")
    return name if getattr(cleaning, "__module__", "") == "open_clip.tokenizer" and "<" not in name else None
