"""The first half of ranking data: captions as queries, and the images that are candidates for each (rank.py)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pc_clip.core.config.write import GenerateConfig
from pc_clip.core.errors import UserError
from pc_clip.core.random import stream
from pc_clip.data.dataset import Dataset
from pc_clip.data.embeddings import embed_images
from pc_clip.models.clip import Clip

BLOCK = 256  # captions compared with all images at once
SAME = 1 - 1e-5  # two embeddings with this cosine are of one picture; float32 leaves the rest


class Query(NamedTuple):
    """A caption and the image it was written for. candidates: rows of images and their cosines, best first."""

    row: int
    caption: str
    candidates: Sequence[tuple[int, float]] = ()


def words_of(caption: str) -> tuple[str, ...]:
    """A caption without what makes no other caption of it: capitals, spaces and punctuation."""
    return tuple(re.findall(r"\w+", caption.lower()))


def draw_queries(data: Dataset, n: int | None, which: str, seed: int) -> list[Query]:
    """A caption each of `n` images (all for None), in the order of their rows; none of them twice.

    which: of an image's captions the longest, or a random one. Raises UserError where there are no captions, or fewer
    different ones than are asked for.
    """
    rows = [row for row, texts in enumerate(data.captions or ()) if texts]
    if not rows:
        raise UserError(f"{data.label} has no captions to rank its images by; name a file of them with --captions")
    rng = stream(seed, "queries")
    order, draws = rng.permutation(rows).tolist(), rng.random(len(rows))
    queries: dict[tuple[str, ...], Query] = {}  # two images with one caption would ask the same question twice
    for row, draw in zip(order, draws):
        texts = data.captions[row]
        caption = max(texts, key=len) if which == "longest" else texts[int(draw * len(texts))]
        queries.setdefault(words_of(caption), Query(row, caption))
    if n is not None and len(queries) < n:
        raise UserError(f"rank.n_queries is {n}, but only {len(queries)} captions of {data.label} differ")
    return sorted(list(queries.values())[:n])


def retrieve(texts: Tensor, z: Tensor, own: Sequence[int], margin: float, most: int) -> list[list[tuple[int, float]]]:
    """For each text the rows and cosines of its candidates, the most similar first.

    texts [Q, D], z [N, D]: unit vectors. own: the row of each text's own image, which is a candidate in any case.
    margin: how far below the best a cosine may be. A picture that is there twice is one candidate.
    """
    candidates = []
    for start in range(0, len(texts), BLOCK):
        cosines = texts[start : start + BLOCK] @ z.T  # [B, N]
        best, rows = cosines.topk(min(most, len(z)), dim=1)
        for n, mine in enumerate(own[start : start + BLOCK]):
            near = [mine]
            for row, value in zip(rows[n].tolist(), best[n].tolist()):
                if value >= best[n, 0] - margin and len(near) < most and float((z[near] @ z[row]).max()) < SAME:
                    near.append(row)
            candidates.append(sorted(((row, float(cosines[n, row])) for row in near), key=lambda item: -item[1]))
    return candidates


def find_candidates(config: GenerateConfig, data: Dataset, clip: Clip) -> list[Query]:
    """The queries that the settings draw, each with its candidates."""
    rank = config.rank
    queries = draw_queries(data, rank.n_queries, config.caption, config.seed)
    texts = clip.embed_texts([query.caption for query in queries])  # [Q, D]
    z = embed_images(clip, data, batch_size=rank.batch_size, workers=rank.workers).z  # [N, D]
    z = torch.nn.functional.normalize(z.float(), dim=-1)
    near = retrieve(texts, z, [query.row for query in queries], rank.margin, rank.most)
    return [query._replace(candidates=candidates) for query, candidates in zip(queries, near)]
