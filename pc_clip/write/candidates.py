"""Candidates for a caption: the images that a model finds most similar to it, and crops of them where those are few."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pc_clip.core.config.write import GenerateConfig
from pc_clip.core.errors import UserError
from pc_clip.core.files import write_text
from pc_clip.core.random import stream
from pc_clip.data.dataset import Dataset
from pc_clip.data.embeddings import embed_images
from pc_clip.data.views import views
from pc_clip.models.clip import Clip

KEPT = (0.40, 0.75)  # the share of its area that a crop keeps: something is really gone
ASPECT = (3 / 4, 4 / 3)  # of a crop, relative to its picture's
BLOCK = 256  # queries compared with all images at once
SAME = 1 - 1e-5  # two embeddings with this cosine are of one picture; float32 leaves the rest
_SIDES = re.compile(r"\b(?:left|right)(?:most|hand|wards?)?\b", re.IGNORECASE)


class Query(NamedTuple):
    """A caption, and the row of the image that it was written for."""

    row: int
    caption: str


class Candidate(NamedTuple):
    """A view (data/views.py) of an image. row: the image's; kept: the share of it that is seen, 1 for all of it.

    similarity: the cosine of the view and the caption.
    """

    view: str
    row: int
    kept: float
    similarity: float

    @property
    def is_whole(self) -> bool:
        return self.kept == 1


class Asked(NamedTuple):
    """A query with its candidates. same_picture: how many more there were that show what another one shows."""

    query: Query
    candidates: list[Candidate]
    same_picture: int = 0


# -- queries -------------------------------------------------------------------------------------------


def words_of(caption: str) -> tuple[str, ...]:
    """A caption without what makes no other caption of it: capitals, spaces and punctuation."""
    return tuple(re.findall(r"\w+", caption.lower()))


def draw_queries(data: Dataset, n: int | None, which: str, seed: int) -> list[Query]:
    """A caption each of `n` images (all for None), in the order of their rows; none of them twice.

    Two images with one caption would ask the same question twice, and might contradict each other. Of those drawn the
    first is asked about. which: of an image's captions the longest, or a random one. Raises UserError where there are
    no captions, or fewer different ones than are asked for.
    """
    known = [row for row, texts in enumerate(data.captions or ()) if texts]
    if not known:
        raise UserError(f"{data.label} has no captions to rank its images by; name a file of them with --captions")
    if n is not None and n > len(known):
        raise UserError(f"rank.n_queries is {n}, but only {len(known)} images of {data.label} have captions")
    rng = stream(seed, "queries")
    order, drawn = rng.permutation(known).tolist(), rng.random(len(known))
    found: dict[tuple[str, ...], Query] = {}
    for row, draw in zip(order, drawn):
        texts = data.captions[row]
        caption = max(texts, key=len) if which == "longest" else texts[int(draw * len(texts))]
        found.setdefault(words_of(caption), Query(row, caption))
        if len(found) == n:
            break
    if n is not None and len(found) < n:
        raise UserError(
            f"rank.n_queries is {n}, but the images of {data.label} have only {len(found)} captions drawn "
            "that differ; ask for fewer"
        )
    return sorted(found.values())


# -- their candidates ----------------------------------------------------------------------------------


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


def one_a_picture(z: Tensor, rows: Sequence[int], own: int) -> list[int]:
    """Those of `rows` that show different pictures: of equal ones `own`, else the first. z [N, D]: unit vectors.

    A picture that is there twice fits a caption as well as itself, and no order of the two means anything.
    """
    kept: list[int] = []
    for row in sorted(rows, key=lambda row: row != own):
        if not kept or float((z[kept] @ z[row]).max()) < SAME:
            kept.append(row)
    return [row for row in rows if row in kept]


def crops(data: Dataset, query: Query, wholes: Sequence[int], n: int, seed: int) -> list[tuple[str, int, float]]:
    """Views that fill up the candidates: `n` crops of `wholes` (rows) in turn, as (view, row, share kept).

    Every other one is mirrored, by chance, unless the caption or the image's own speak of left or right.
    """
    rng = stream(seed, "crops", query.row)
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


def find_candidates(config: GenerateConfig, data: Dataset, clip: Clip) -> list[Asked]:
    """The queries that the settings draw, each with its candidates: images, then crops of them, by similarity each."""
    rank, options = config.rank, {"batch_size": config.rank.batch_size, "workers": config.rank.workers}
    queries = draw_queries(data, rank.n_queries, config.caption, config.seed)
    texts = clip.embed_texts([query.caption for query in queries])  # [Q, D]
    z = unit(embed_images(clip, data, **options).z)  # [N, D]
    retrieved = retrieve(texts, z, [query.row for query in queries], rank.margin, rank.most)
    near = []
    for query, found in zip(queries, retrieved):
        kept = one_a_picture(z, [row for row, _ in found], query.row)
        near.append([(row, cosine) for row, cosine in found if row in kept])
    parts = _crops_of(queries, near, texts, config, data, clip)
    return [
        Asked(
            query,
            [*(Candidate(data.ids[row], row, 1.0, round(cosine, 6)) for row, cosine in kept), *parts[n]],
            len(found) - len(kept),
        )
        for n, (query, found, kept) in enumerate(zip(queries, retrieved, near))
    ]


def _crops_of(
    queries: Sequence[Query],
    near: Sequence[Sequence[tuple[int, float]]],
    texts: Tensor,
    config: GenerateConfig,
    data: Dataset,
    clip: Clip,
) -> list[list[Candidate]]:
    """The crops that fill up each query's candidates, the most similar first. near: rows and cosines of its images."""
    drawn = [
        crops(data, query, [row for row, _ in found], max(0, config.rank.least - len(found)), config.seed)
        for query, found in zip(queries, near)
    ]
    names = sorted({view for found in drawn for view, _, _ in found})
    if not names:
        return [[] for _ in queries]
    place = {name: n for n, name in enumerate(names)}
    options = {"batch_size": config.rank.batch_size, "workers": config.rank.workers}
    z = unit(embed_images(clip, views(data, names), **options).z)
    found = [
        [Candidate(view, row, kept, round(float(z[place[view]] @ text), 6)) for view, row, kept in each]
        for each, text in zip(drawn, texts)
    ]
    return [sorted(each, key=lambda c: (-c.similarity, c.view)) for each in found]


# -- as a file -----------------------------------------------------------------------------------------


def write_candidates(path: Path, asked: Sequence[Asked], data: Dataset) -> None:
    """A JSON a line, with ids in place of rows."""
    lines = [
        {
            "image": data.ids[one.query.row],
            "caption": one.query.caption,
            "candidates": [{**c._asdict(), "row": data.ids[c.row]} for c in one.candidates],
            "same_picture": one.same_picture,
        }
        for one in asked
    ]
    write_text(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))


def read_candidates(path: Path, data: Dataset) -> list[Asked]:
    """What `write_candidates` wrote of the same data."""
    rows = {key: row for row, key in enumerate(data.ids)}
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
    return [
        Asked(
            Query(rows[line["image"]], line["caption"]),
            [Candidate(**{**c, "row": rows[c["row"]]}) for c in line["candidates"]],
            line["same_picture"],
        )
        for line in lines
    ]
