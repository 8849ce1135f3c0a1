"""Images of a data set and parts of them, by name; and the images that statements are about.

A view is the name of an image or of a part of it:

    ID                    the image
    ID@box=L,T,R,B        pixels of the original picture, integers; right and bottom are outside
    ID@crop=l,t,r,b       shares of its width and height, between 0 and 1
    ID@flip               mirrored left-right; after a box or a crop: ID@box=L,T,R,B+flip

What reaches beyond the picture is cut off at its border. (Pillow's own crop, and with it ARO's code, fills it with
black.) An ID is the data set's own, else the same without folder and ending, else the same number: COCO's "139",
"000000000139.jpg" and "COCO_val2014_000000000139.jpg" are one photograph.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple, TypeVar

import numpy as np
from PIL import Image, ImageOps

from pc_clip.core.errors import UserError
from pc_clip.data.dataset import IMAGE_SUFFIXES, Dataset, Statement, digest

SHAPES = "@box=L,T,R,B (integers), @crop=l,t,r,b (shares in 0..1), either with +flip behind it, or @flip"
_MEANT = re.compile(r"(?P<image>.+)@(?P<how>(?:box|crop|flip)(?!\w).*|\w+=.*)", re.DOTALL)
_HOW = re.compile(r"(?:(?P<kind>box|crop)=(?P<edges>[^+]*)(?P<and_flip>\+flip)?|flip)")
_INTEGER = re.compile(r"-?\d+")
_SHARE = re.compile(r"-?(?:\d+\.?\d*|\.\d+)(?:e-?\d+)?", re.IGNORECASE)
_COCO = re.compile(r"(?:COCO_(?:train|val|test)\d{4}_)?0*(\d+)")

Found = TypeVar("Found")


class View(NamedTuple):
    """kind: "box", "crop", or "" for all of the image. edges: left, top, right, bottom."""

    image: str
    kind: str = ""
    edges: tuple[float, ...] = ()
    flip: bool = False

    @property
    def name(self) -> str:
        """The same for all ways of writing a view of an image."""
        part = f"{self.kind}={','.join(map(repr, self.edges))}" if self.kind else ""
        how = "+".join(filter(None, (part, "flip" if self.flip else "")))
        return f"{self.image}@{how}" if how else self.image


class Located(NamedTuple):
    """Statements with their images. rows, others: [M] int64 into `data`; others: those of `instead`, else as rows.

    data: the views that are asked about, each once. absent: how many statements were left out for want of an image.
    """

    data: Dataset
    statements: list[Statement]
    rows: np.ndarray
    others: np.ndarray
    absent: int


class Matched(NamedTuple):
    """Statements whose images are among some ids. rows, others: [M] int64 into the ids, as in `Located`."""

    statements: list[Statement]
    rows: np.ndarray
    others: np.ndarray
    absent: int


def views(data: Dataset, names: Sequence[str]) -> Dataset:
    """A data set whose image n is the view names[n] of `data`; of captions, questions and the like it has none.

    Raises UserError for a view of another form, an image that is not in `data`, and one that two are meant by; and
    `load` does for a part that lies beside its picture.
    """
    ids, places = _Ids(data.ids, data.label), []
    for name in names:
        view = _parse(name, ids)
        row = ids.find(view.image)
        if row is None:
            raise UserError(f"{data.label} has no image {view.image!r}, wanted for the view {name!r}; {ids.example()}")
        places.append((row, view))
    return _of(data, list(names), places)


def located(statements: Sequence[Statement], data: Dataset) -> Located:
    """The statements whose images are in `data`, and a data set of just the views that they are about.

    Views are sorted by their image's row, then by name. Raises UserError where no statement's image is there, for a
    view of another form, and for an image asked for that two of `data` may be.
    """
    ids = _Ids(data.ids, data.label)

    def find(name: str) -> tuple[int, View] | None:
        view = _parse(name, ids)
        row = ids.find(view.image)
        return None if row is None else (row, view._replace(image=data.ids[row]))

    kept, pairs = _those_found(statements, find, ids)
    places = sorted({place for pair in pairs for place in pair}, key=lambda place: (place[0], place[1].name))
    at = {place: n for n, place in enumerate(places)}
    rows = np.array([[at[pair[k]] for pair in pairs] for k in (0, 1)], dtype=np.int64)
    names = [view.name for _, view in places]
    return Located(_of(data, names, places), kept, rows[0], rows[1], len(statements) - len(kept))


def match(statements: Sequence[Statement], ids: Sequence[str], label: str = "the file of embeddings") -> Matched:
    """The statements whose images are among `ids`, which are not loaded; a view must be there under its own name.

    label: what the ids are of, for the error that is raised where no statement's image is among them.
    """
    known = _Ids(ids, label)

    def find(name: str) -> int | None:
        return known.find(name) if _MEANT.fullmatch(name) is None else known.exact.get(name)

    kept, pairs = _those_found(statements, find, known)
    rows = np.array([[pair[k] for pair in pairs] for k in (0, 1)], dtype=np.int64)
    return Matched(kept, rows[0], rows[1], len(statements) - len(kept))


# -- names ---------------------------------------------------------------------------------------------


class _Ids:
    """Rows by id: exactly, without folder and ending, or by number."""

    def __init__(self, ids: Sequence[str], label: str) -> None:
        self.ids, self.label = ids, label
        self.exact = {name: row for row, name in enumerate(ids)}
        self.stems: dict[str, list[int]] = {}
        self.numbers: dict[str, list[int]] = {}
        for row, name in enumerate(ids):
            if _MEANT.fullmatch(name) is None:  # a view in a file of embeddings stands for nothing but itself
                self.stems.setdefault(_stem(name), []).append(row)
                if number := _COCO.fullmatch(_stem(name)):
                    self.numbers.setdefault(number[1], []).append(row)

    def find(self, name: str) -> int | None:
        """The row of an image; None where it is not there. Raises UserError where two may be meant."""
        if name in self.exact:
            return self.exact[name]
        rows = self.stems.get(_stem(name))
        if rows is None:
            number = _COCO.fullmatch(_stem(name))
            rows = self.numbers.get(number[1], []) if number else []
        if len(rows) > 1:
            raise UserError(
                f"image {name!r} may be {self.ids[rows[0]]!r} or {self.ids[rows[1]]!r} of {self.label}; "
                "write the whole id"
            )
        return rows[0] if rows else None

    def example(self) -> str:
        return f"its ids are like {self.ids[0]!r}" if len(self.ids) else "it has no images"


def _stem(name: str) -> str:
    """Without folders, and without the ending of an image file."""
    name = re.split(r"[/\\]", name)[-1]
    stem, dot, ending = name.rpartition(".")
    return stem if dot and f".{ending.lower()}" in IMAGE_SUFFIXES else name


def _parse(name: str, ids: _Ids) -> View:
    """What a name says. Raises UserError where it begins as a view and goes on otherwise."""
    meant = _MEANT.fullmatch(name)
    if name in ids.exact or meant is None:
        return View(name)  # an id may have an @ of its own
    how = _HOW.fullmatch(meant["how"])
    if how is None:
        raise UserError(f"no view: {name!r}; a part of an image is ID and then {SHAPES}")
    if how["kind"] is None:
        return View(meant["image"], flip=True)
    return View(meant["image"], how["kind"], _edges(name, how["kind"], how["edges"]), how["and_flip"] is not None)


def _edges(name: str, kind: str, text: str) -> tuple[float, ...]:
    numbers = text.split(",")
    form = _INTEGER if kind == "box" else _SHARE
    if len(numbers) != 4 or not all(map(form.fullmatch, numbers)):
        what = "four integers" if kind == "box" else "four numbers between 0 and 1"
        raise UserError(f"view {name!r}: {kind} wants {what}, found {text!r}; write ID and then {SHAPES}")
    left, top, right, bottom = map(int if kind == "box" else float, numbers)
    if right <= left or bottom <= top:
        raise UserError(f"view {name!r} is empty; right and bottom must be more than left and top")
    if right <= 0 or bottom <= 0 or (kind == "crop" and (left >= 1 or top >= 1)):
        raise UserError(f"view {name!r} lies outside its picture; its edges count from the picture's left and top")
    if kind == "crop":  # the picture's size need not be known; a box is clamped when it is loaded
        left, top, right, bottom = max(left, 0.0), max(top, 0.0), min(right, 1.0), min(bottom, 1.0)
    return left, top, right, bottom


def _those_found(
    statements: Sequence[Statement], find: Callable[[str], Found | None], ids: _Ids
) -> tuple[list[Statement], list[tuple[Found, Found]]]:
    """Statements whose images are all there, with the places of the image and of `instead`."""
    known: dict[str, Found | None] = {}
    kept, pairs = [], []
    for statement in statements:
        wanted = (statement.image, statement.instead or statement.image)
        for name in wanted:
            if name not in known:
                known[name] = find(name)
        first, second = known[wanted[0]], known[wanted[1]]
        if first is not None and second is not None:
            kept.append(statement)
            pairs.append((first, second))
    if not statements:
        raise UserError(f"there are no statements about images of {ids.label}")
    if not kept:
        raise UserError(
            f"none of the {len(statements)} statements is about an image of {ids.label}: they ask for "
            f"{statements[0].image!r} for instance, and {ids.example()}"
        )
    return kept, pairs


# -- pictures ------------------------------------------------------------------------------------------


def _of(data: Dataset, names: list[str], places: list[tuple[int, View]]) -> Dataset:
    whole = names == data.ids  # the very same pictures: so are their embeddings, which may be there already
    return dataclasses.replace(
        data,
        ids=names,
        load=data.load if whole else partial(_load, data.load, data.label, names, places),
        fingerprint=data.fingerprint if whole else digest(data.fingerprint, names),
        captions=None,
        questions=(),
        attributes=(),
        statements=(),
    )


def _load(
    load: Callable[[int], Image.Image], label: str, names: list[str], places: list[tuple[int, View]], place: int
) -> Image.Image:
    """At module level, because worker processes get it pickled."""
    row, view = places[place]
    image = load(row)
    if view.kind:
        left, top, right, bottom = _pixels(view, image.size)
        left, top, right, bottom = max(left, 0), max(top, 0), min(right, image.width), min(bottom, image.height)
        if right <= left or bottom <= top:
            raise UserError(
                f"view {names[place]!r} of {label} lies outside its picture, which is {image.width} pixels wide and "
                f"{image.height} high; boxes are in pixels of the original picture"
            )
        image = image.crop((left, top, right, bottom))
    return ImageOps.mirror(image) if view.flip else image


def _pixels(view: View, size: tuple[int, int]) -> tuple[int, ...]:
    """The edges in pixels; a crop takes at least one each way."""
    if view.kind == "box":
        return view.edges
    (left, top, right, bottom), (width, height) = view.edges, size
    x, y = min(math.floor(left * width + 0.5), width - 1), min(math.floor(top * height + 0.5), height - 1)
    return x, y, max(math.floor(right * width + 0.5), x + 1), max(math.floor(bottom * height + 0.5), y + 1)
