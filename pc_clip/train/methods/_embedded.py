"""Embeddings of what a method learns from, by the model as it is now, made by all processes together."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather
from torch import Tensor, nn
from tqdm import tqdm

from pc_clip.core.config.train import FinetuneConfig
from pc_clip.data.dataset import subset
from pc_clip.data.embedding_shards import Rows
from pc_clip.data.embeddings import Options, embed_images, encode
from pc_clip.train.methods._batches import Images, Tokens

BLOCK = 1 << 16  # rows that are in all processes' hands at a time
TEXTS = 256  # a batch


def of_texts(texts: Tokens, rows: np.ndarray) -> Tensor:
    """Unit embeddings of some texts of a table.  -> [R, D] float32, on the CPU"""

    @torch.no_grad()
    def compute(places: np.ndarray) -> Tensor:
        z = torch.empty(len(places), texts.clip.embed_dim)
        mine = rows[places]
        order = np.argsort((texts.tokens[mine] != 0).sum(1), kind="stable")  # like lengths together: less padding
        for start in range(0, len(mine), TEXTS):
            some = order[start : start + TEXTS]
            found = texts.clip.encode_text(texts.batch(mine[some]).to(texts.clip.device))
            z[torch.from_numpy(some)] = nn.functional.normalize(found.float(), dim=-1).cpu()
        return z

    return _together(len(rows), compute, "embedding texts")


def of_images(images: Images, rows: np.ndarray, now: bool, config: FinetuneConfig) -> Tensor:
    """Unit embeddings of some images: cached ones, or where the tower learns and `now`, fresh.  -> [R, D] float32"""
    if images.z is not None:
        z = images.z.whole() if isinstance(images.z, Rows) else images.z
        return nn.functional.normalize(z[torch.from_numpy(rows)].float(), dim=-1)
    if not now:
        with PartialState().main_process_first():  # the others then find them in the cache
            z = embed_images(images.clip, images.data, workers=config.data.workers).z
        return nn.functional.normalize(z[torch.from_numpy(rows)].float(), dim=-1)

    def compute(some: np.ndarray) -> Tensor:
        options = Options(workers=config.data.workers, precision=config.train.precision)
        found = encode(images.clip, subset(images.data, rows[some]), options).z
        return nn.functional.normalize(found.float(), dim=-1)

    return _together(len(rows), compute, "embedding images")


def _together(n: int, compute: Callable[[np.ndarray], Tensor], what: str) -> Tensor:
    """Rows 0 to n - 1 by `compute`, each process its part; every process has them all.  -> [n, D] on the CPU"""
    state = PartialState()
    found, starts = torch.empty(0), range(0, n, BLOCK)
    for start in tqdm(starts, what, leave=False, disable=None if len(starts) > 1 and state.is_main_process else True):
        block = np.arange(start, min(start + BLOCK, n))
        each = -(-len(block) // state.num_processes)
        mine = np.resize(block[state.process_index * each : (state.process_index + 1) * each], each)
        z = compute(mine)
        z = z if state.num_processes == 1 else gather(z.to(state.device))[: len(block)].cpu()
        found = found if len(found) else torch.empty(n, z.shape[1])  # filled: what torch.cat makes is there twice
        found[start : start + len(block)] = z
    return found
