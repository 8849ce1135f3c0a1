"""Benchmark rows with several captions or images: SugarCrepe++, Winoground, ImageCoDe, multiple choice.

The files are .json, .jsonl, .csv, .tsv or .parquet as of statements (data/statements.py):

    image, caption, caption2, negative_caption           SugarCrepe++ and its like
    image_0, image_1, caption_0, caption_1 [, tag]       Winoground and its like (ColorSwap, EqBen, BiVLC)
    image, captions, answer [, group, kind]              several candidates; the answer's place, from 0
    image_path, caption_options                          What'sUp: the first is right
    image_path, caption_0 to caption_3, correct_answer   NegBench's multiple choice
    number of an image -> sentence, by set of images     ImageCoDe
    reference, caption, target_hard                      CIRR
    candidate, captions, target                          FashionIQ
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pc_clip.core.errors import UserError
from pc_clip.data.dataset import Dataset
from pc_clip.data.statements import READERS, Row, files_of
from pc_clip.data.text_files import Entries, read_json, with_keys, words
from pc_clip.data.views import ImageIds

log = logging.getLogger(__name__)


class Triplet(NamedTuple):
    """Two captions of an image that say the same, and one in the words of the first that is wrong."""

    image: str
    caption: str
    paraphrase: str
    negative: str
    kind: str


class Quartet(NamedTuple):
    """Two images and a caption of each, mostly in the same words."""

    image_0: str
    image_1: str
    caption_0: str
    caption_1: str
    kind: str


class Choice(NamedTuple):
    """An image, captions of which the one at place `answer` holds, and a set of rows that belong together, if any."""

    image: str
    captions: tuple[str, ...]
    answer: int
    group: str
    kind: str


class Pick(NamedTuple):
    """A sentence of one of the images in a folder, the one with the number `target`. kind: video or static."""

    folder: str
    target: int
    caption: str
    kind: str


class Relative(NamedTuple):
    """A relative caption: the change from the image `reference` to `target`. kind: its file.

    members: CIRR's six similar images, reference and target among them; empty for others.
    """

    reference: str
    target: str
    caption: str
    kind: str
    members: tuple[str, ...] = ()


def form_of(paths: Sequence[str | Path]) -> type[NamedTuple] | None:
    """The form of the first row of some files; None for statements."""
    file = files_of(Path(paths[0]))[0]
    columns = next(iter(READERS[file.suffix.lower()](file)), ("", {}))[1]
    if columns and all(str(key).isdecimal() for key in columns):
        return Pick
    if {"reference", "target_hard"} <= columns.keys() or {"candidate", "target"} <= columns.keys():
        return Relative
    if "caption_options" in columns or {"captions", "answer"} <= columns.keys() or "correct_answer" in columns:
        return Choice
    return Triplet if "caption2" in columns else Quartet if "image_0" in columns else None


def read_groups(paths: Sequence[str | Path]) -> list[Any]:
    """All rows of some files, which are of one form. kind: the row's tag, else its file's name.

    Raises UserError with file and line for a row of another form.
    """
    form, groups = form_of(paths), []
    if form is Pick:
        return [pick for path in paths for file in files_of(Path(path)) for pick in _picks(file)]
    if form is Relative:
        return [_relative(*row, file) for path in paths for file in files_of(Path(path)) for row in _rows(file)]
    if form is Choice:
        return [_choice(*row, file) for path in paths for file in files_of(Path(path)) for row in _rows(file)]
    wanted = ("caption", "caption2", "negative_caption") if form is Triplet else Quartet._fields[:4]
    for file in (file for path in paths for file in files_of(Path(path))):
        for where, columns in _rows(file):
            row = Row(where, with_keys(columns, where, wanted))
            kind = row.optional("kind", row.optional("tag", file.stem))
            images = [row.image()] if form is Triplet else [row.image("image_0"), row.image("image_1")]
            texts = map(row.text, wanted if form is Triplet else wanted[2:])
            groups.append(form(*images, *texts, kind))
    return groups


def with_images(groups: Sequence[Any], names: Sequence[str], data: Dataset) -> tuple[list[Any], np.ndarray]:
    """The groups whose images are all in a data set, and the rows of these.  -> M groups, [M, len(names)] int64

    names: the fields that name images. The others are counted in the log. Raises UserError where none is left.
    """
    ids = ImageIds(data.ids, data.label)
    places = [[ids.find(getattr(group, name)) for name in names] for group in groups]
    there = [n for n, rows in enumerate(places) if None not in rows]
    if not there:
        raise UserError(f"of none of the {len(groups)} rows are the images in {data.label}")
    if absent := len(groups) - len(there):
        log.info("  %d of %d rows are left out: an image of theirs is absent", absent, len(groups))
    return [groups[n] for n in there], np.array([places[n] for n in there], dtype=np.int64)


def _picks(file: Path) -> list[Pick]:
    """ImageCoDe's sets, of which those of photographs come from Open Images and all others from videos."""
    content, picks = read_json(file, dict), []
    for folder, sentences in content.items():
        with_keys(sentences, f"{file} set {folder}", ())
        kind = "static" if "open-images" in folder else "video"
        for number, text in sentences.items():
            picks.append(Pick(folder, int(number), words(text, f"{file} set {folder}", number), kind))
    return picks


def _rows(file: Path) -> Entries:
    return READERS[file.suffix.lower()](file)


def _choice(where: str, columns: dict[str, Any], file: Path) -> Choice:
    row = Row(where, columns)
    captions = columns.get("caption_options", columns.get("captions"))
    if captions is None:  # NegBench: a column a caption
        captions = [row.columns[name] for n in range(len(columns)) if (name := f"caption_{n}") in row.columns]
        while captions and captions[-1] == "":  # fewer options than the table has columns; `words` refuses one before
            captions.pop()
    elif isinstance(captions, str) and captions.startswith("["):  # a list in a table
        try:
            captions = json.loads(captions)
        except ValueError as error:
            raise row.wrong(f"captions must be a list in JSON, found {captions[:60]!r}") from error
    if not isinstance(captions, list) or len(captions) < 2:
        raise row.wrong(f"captions must be a list of two texts or more, found {str(captions)[:60]!r}")
    answer = str(columns.get("answer", columns.get("correct_answer", 0)))  # What'sUp has none: the first is right
    if not answer.isdecimal() or int(answer) >= len(captions):
        raise row.wrong(f"the answer must be the place of one of {len(captions)} captions, from 0; found {answer!r}")
    texts = tuple(words(text, where, "captions") for text in captions)
    kind = row.optional("kind", row.optional("correct_answer_template", file.stem))
    return Choice(row.image(), texts, int(answer), str(row.columns.get("group", "")), kind)


def _relative(where: str, columns: dict[str, Any], file: Path) -> Relative:
    """FashionIQ's two captions are joined by "and"."""
    of_cirr = "reference" in columns
    wanted = ("reference", "target_hard", "caption") if of_cirr else ("candidate", "target", "captions")
    row = Row(where, with_keys(columns, where, wanted))
    texts = [columns["caption"]] if of_cirr else columns["captions"]
    if not isinstance(texts, list) or not texts:
        raise row.wrong(f"captions must be a list of texts, found {str(texts)[:60]!r}")
    caption = " and ".join(words(text, where, wanted[2]) for text in texts)
    reference, target = row.image(wanted[0]), row.image(wanted[1])
    members = tuple((columns.get("img_set") or {}).get("members", ()))
    if members and not {reference, target} <= set(members):
        raise row.wrong("img_set.members must hold the reference and the target")
    return Relative(reference, target, caption, file.stem, members)
