"""Views: the images that statements ask about, whole or boxes of them.

A view is the name of an image, or of a part of it: ID@box=L,T,R,B, pixels of the original picture, integers; right and
bottom are outside. What reaches beyond the picture is cut off at its border. (Pillow's own crop, and so ARO's code,
fills it with black.) An image is named by the data set's own id, else by the same without ending, or by its number:
COCO's "139", "000000000139.jpg" and "COCO_val2014_000000000139.jpg" are one photograph. A folder in a name and one in
an id must be the same: "cat/001.jpg" is never "dog/001.jpg".
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
from PIL import Image

from pc_clip.core.errors import UserError
from pc_clip.data.dataset import IMAGE_SUFFIXES, Dataset, Statement, digest, images_alone

_BOX = re.compile(r"-?\d+(,-?\d+){3}")
_COCO = re.compile(r"(?:COCO_(?:train|val|test)\d{4}_)?0*(\d+)")

Box = tuple[int, ...]  # left, top, right, bottom; empty for all of the image
Place = tuple[int, Box]  # row of an image, and the part of it


class Located(NamedTuple):
    """Statements with their images. rows, others: [M] int64 into `data`; others: of `rejected_image`, else as rows.

    data: the views that are asked about, each once; of captions, questions and the like it has none. None where the
    rows are of ids that were given. absent: how many statements were left out for want of an image.
    """

    data: Dataset | None
    statements: list[Statement]
    rows: np.ndarray
    others: np.ndarray
    absent: int


def located(statements: Sequence[Statement], data: Dataset) -> Located:
    """The statements whose images are in `data`, and a data set of just the views that they are about.

    Views are sorted by their image's row, then by box. Raises UserError where no statement's image is there, for a
    view of another form, and for an image asked for that two of `data` may be; and `load` does for a box that lies
    beside its picture.
    """
    ids = ImageIds(data.ids, data.label)
    chosen, pairs = _find(statements, ids.find_view, ids)
    places = sorted({place for pair in pairs for place in pair})
    number = {place: n for n, place in enumerate(places)}
    rows = np.array([[number[place] for place in pair] for pair in pairs], dtype=np.int64)
    names = [f"{data.ids[row]}@box={','.join(map(str, box))}" if box else data.ids[row] for row, box in places]
    views = images_alone(data)
    if names != data.ids:  # else the very same pictures: so are their embeddings, which may be there already
        load = partial(_load, data.load, data.label, names, places)
        views = dataclasses.replace(views, ids=names, load=load, fingerprint=digest(data.fingerprint, names))
    return Located(views, chosen, rows[:, 0], rows[:, 1], len(statements) - len(chosen))


def match(statements: Sequence[Statement], ids: Sequence[str], label: str = "the file of embeddings") -> Located:
    """The statements whose images are among `ids`, which are not loaded; a view must be there under its own name.

    label: what the ids are of, for the error that is raised where no statement's image is among them.
    """
    known = ImageIds(ids, label)
    chosen, pairs = _find(statements, known.find, known)
    rows = np.array(pairs, dtype=np.int64)
    return Located(None, chosen, rows[:, 0], rows[:, 1], len(statements) - len(chosen))


class ImageIds:
    """Rows by id: exactly, without ending, or by number."""

    def __init__(self, ids: Sequence[str], label: str) -> None:
        self.ids, self.label = ids, label
        self.exact = {name: row for row, name in enumerate(ids)}
        self.rows: dict[str, list[int]] = {}
        for row, name in enumerate(ids):
            if "@box=" not in name:  # a view in a file of embeddings stands for nothing but itself
                self.rows.setdefault(_parts(name)[1], []).append(row)

    def find(self, name: str) -> int | None:
        """The row of an image; None where it is not there. Raises UserError where two may be meant."""
        if name in self.exact or "@box=" in name:
            return self.exact.get(name)
        folders, key = _parts(name)
        rows = [row for row in self.rows.get(key, []) if _fit(folders, name, _parts(self.ids[row])[0])]
        if len(rows) > 1:
            raise UserError(
                f"image {name!r} may be {self.ids[rows[0]]!r} or {self.ids[rows[1]]!r} of {self.label}; "
                "write the whole id"
            )
        return rows[0] if rows else None

    def find_view(self, name: str) -> Place | None:
        """The row of an image and a box of it. Raises UserError for a name that begins as a view and goes on wrong."""
        image, is_view, edges = (name, "", "") if name in self.exact else name.partition("@box=")
        box = tuple(map(int, edges.split(","))) if _BOX.fullmatch(edges) else ()
        if is_view and (not box or box[2] <= max(box[0], 0) or box[3] <= max(box[1], 0)):
            raise UserError(f"no view: {name!r}; a part of an image is ID@box=L,T,R,B, four integers, not empty")
        row = self.find(image)
        return None if row is None else (row, box)


def _parts(name: str) -> tuple[list[str], str]:
    """The folders of a name, and the rest without the ending of an image file: the number where it is one."""
    *folders, name = re.split(r"[/\\]", name)
    stem, ending = os.path.splitext(name)
    stem = stem if ending.lower() in IMAGE_SUFFIXES else name
    number = _COCO.fullmatch(stem)
    return folders, number[1] if number else stem


def _fit(folders: list[str], name: str, of_id: list[str]) -> bool:
    """Whether the innermost folders are the same; an id without any fits COCO's files, whose numbers occur once."""
    if folders and not of_id:
        return re.search(r"\d{12}(\.\w+)?$", name) is not None
    depth = min(len(folders), len(of_id))
    return depth == 0 or folders[-depth:] == of_id[-depth:]


def _find(statements: Sequence[Statement], find: Callable, ids: ImageIds) -> tuple[list[Statement], list[tuple]]:
    """Statements whose images are all there, with the places of the image and of `rejected_image`."""
    names = dict.fromkeys(name for s in statements for name in (s.image, s.rejected_image or s.image))
    places = {name: find(name) for name in names}
    pairs = [(places[s.image], places[s.rejected_image or s.image]) for s in statements]
    there = [n for n, pair in enumerate(pairs) if None not in pair]
    if not there:
        asked = f"they ask for {statements[0].image!r} for instance" if statements else "there are none"
        raise UserError(
            f"none of the {len(statements)} statements is about an image of {ids.label}: {asked}, and its ids are like "
            f"{next(iter(ids.ids), 'none')!r}"
        )
    return [statements[n] for n in there], [pairs[n] for n in there]


def _load(load: Callable[[int], Image.Image], label: str, names: list[str], places: list[Place], n: int) -> Image.Image:
    row, box = places[n]
    image = load(row)
    if not box:
        return image
    left, top, right, bottom = max(box[0], 0), max(box[1], 0), min(box[2], image.width), min(box[3], image.height)
    if right <= left or bottom <= top:
        raise UserError(
            f"view {names[n]!r} of {label} lies outside its picture, which is {image.width} pixels wide and "
            f"{image.height} high; boxes are in pixels of the original picture"
        )
    return image.crop((left, top, right, bottom))
