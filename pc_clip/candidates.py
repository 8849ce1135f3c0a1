"""Candidates for a caption: the images that a model finds most similar to it, and crops of them where those are few."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pc_clip.datasets import Dataset
from pc_clip.errors import UserError

QUERIES, CROPS = 11, 12  # streams of random numbers, apart from each other and from other tasks'
KEPT = (0.40, 0.75)  # the share of its area that a crop keeps: something is really gone
ASPECT = (3 / 4, 4 / 3)  # of a crop, relative to its picture's
BLOCK = 256  # queries compared with all images at once
_SIDES = re.compile(r"\b(?:left|right)\b", re.IGNORECASE)


class Query(NamedTuple):
    """A caption, and the row of the image that it was written for."""

    row: int
    caption: str


class Candidate(NamedTuple):
    """A view (pc_clip/views.py) of an image. row: the image's; kept: the share of it that is seen, 1 for all of it.

    similarity: the cosine of the view and the caption.
    """

    view: str
    row: int
    kept: float
    similarity: float

    @property
    def is_whole(self) -> bool:
        return self.kept == 1


def draw_queries(data: Dataset, n: int | None, which: str, seed: int) -> list[Query]:
    """A caption each of `n` images (all for None), in the order of their rows.

    which: of an image's captions the longest, or a random one. Raises UserError where there are no captions, or fewer
    images with one than are asked for.
    """
    known = [row for row, texts in enumerate(data.captions or ()) if texts]
    if not known:
        raise UserError(f"{data.label} has no captions to rank its images by; name a file of them with --captions")
    if n is not None and n > len(known):
        raise UserError(f"rank.n_queries is {n}, but only {len(known)} images of {data.label} have captions")
    rng = np.random.default_rng([seed, QUERIES])
    rows = known if n is None else [known[k] for k in sorted(rng.choice(len(known), n, replace=False))]
    drawn = rng.random(len(rows))
    return [
        Query(row, max(texts, key=len) if which == "longest" else texts[int(draw * len(texts))])
        for row, draw in zip(rows, drawn)
        for texts in [data.captions[row]]
    ]


def retrieve(texts: Tensor, z: Tensor, own: Sequence[int], margin: float, most: int) -> list[list[tuple[int, float]]]:
    """For each text the rows and cosines of its candidates, the most similar first.

    texts [Q, D], z [N, D]: unit vectors. own: the row of each text's own image, which is among its candidates in any
    case, in place of the least similar where there would be more than `most`. margin: how far below the best a
    candidate's cosine may be.
    """
    found = []
    for start in range(0, len(texts), BLOCK):
        cosines = texts[start : start + BLOCK] @ z.T  # [B, N]
        best, rows = cosines.topk(min(most, len(z)), dim=1)
        for n, mine in enumerate(own[start : start + BLOCK]):
            near = [row for row, value in zip(rows[n].tolist(), best[n].tolist()) if value >= best[n, 0] - margin]
            near = near if mine in near else [*near[: most - 1], mine]
            values = {row: float(cosines[n, row]) for row in near}
            found.append(sorted(values.items(), key=lambda item: (-item[1], item[0])))
    return found


def crops(data: Dataset, query: Query, wholes: Sequence[int], n: int, seed: int) -> list[tuple[str, int, float]]:
    """Views that fill up the candidates: `n` crops of `wholes` (rows) in turn, as (view, row, share kept).

    Every other one is mirrored, by chance, unless the caption or the image's own speak of left or right.
    """
    rng = np.random.default_rng([seed, CROPS, query.row])
    found: dict[str, tuple[str, int, float]] = {}
    while len(found) < n:
        row = wholes[len(found) % len(wholes)]
        part, kept = _crop(rng)
        sided = any(map(_SIDES.search, (query.caption, *(data.captions[row] if data.captions else ()))))
        flip = "+flip" if rng.random() < 0.5 and not sided else ""
        view = f"{data.ids[row]}@crop={part}{flip}"
        found.setdefault(view, (view, row, kept))
    return list(found.values())


def _crop(rng: np.random.Generator) -> tuple[str, float]:
    """Left, top, right, bottom of a crop, as shares of width and height; and the share of the area that it keeps."""
    area = rng.uniform(*KEPT)
    aspect = np.exp(rng.uniform(*np.log(ASPECT)))
    width = float(np.clip((area * aspect) ** 0.5, area, 1))
    height = area / width
    left, top = rng.uniform(0, 1 - width), rng.uniform(0, 1 - height)
    edges = [round(float(edge), 3) for edge in (left, top, left + width, top + height)]
    kept = (edges[2] - edges[0]) * (edges[3] - edges[1])
    return ",".join(f"{edge:.3f}" for edge in edges), round(kept, 4)


def unit(z: Tensor) -> Tensor:
    return torch.nn.functional.normalize(z.float(), dim=-1)
