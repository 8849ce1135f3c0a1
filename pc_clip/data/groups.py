"""Rows that ask more than a statement against its contradiction: SugarCrepe++'s, Winoground's and ImageCoDe's.

The files are .json, .jsonl, .csv, .tsv or .parquet as of statements (data/statements.py):

    image, caption, caption2, negative_caption           SugarCrepe++ and its like
    image_0, image_1, caption_0, caption_1 [, tag]       Winoground and its like (ColorSwap, EqBen, BiVLC)
    number of an image -> sentence, by set of images     ImageCoDe
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from pc_clip.data.statements import READERS, Row, files_of
from pc_clip.data.text_files import read_json, with_keys, words


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


class Pick(NamedTuple):
    """A sentence of one of the images in a folder, the one with the number `target`. kind: video or static."""

    folder: str
    target: int
    caption: str
    kind: str


def form_of(paths: Sequence[str | Path]) -> type[Triplet] | type[Quartet] | type[Pick] | None:
    """What the first row of some files is; None for statements."""
    file = files_of(Path(paths[0]))[0]
    columns = next(iter(READERS[file.suffix.lower()](file)), ("", {}))[1]
    if columns and all(str(key).isdecimal() for key in columns):
        return Pick
    return Triplet if "caption2" in columns else Quartet if "image_0" in columns else None


def read_groups(paths: Sequence[str | Path]) -> list[Triplet] | list[Quartet] | list[Pick]:
    """All rows of some files, which are of one form. kind: the row's tag, else its file's name.

    Raises UserError with file and line for a row of another form.
    """
    form, groups = form_of(paths), []
    if form is Pick:
        return [pick for path in paths for file in files_of(Path(path)) for pick in _picks(file)]
    wanted = ("caption", "caption2", "negative_caption") if form is Triplet else Quartet._fields[:4]
    for file in (file for path in paths for file in files_of(Path(path))):
        for where, columns in READERS[file.suffix.lower()](file):
            row = Row(where, with_keys(columns, where, wanted))
            kind = row.optional("kind", row.optional("tag", file.stem))
            images = [row.image()] if form is Triplet else [row.image("image_0"), row.image("image_1")]
            texts = map(row.text, wanted if form is Triplet else wanted[2:])
            groups.append(form(*images, *texts, kind))
    return groups


def _picks(file: Path) -> list[Pick]:
    """ImageCoDe's sets, of which those of photographs come from Open Images and all others from videos."""
    content, picks = read_json(file, dict), []
    for folder, sentences in content.items():
        with_keys(sentences, f"{file} set {folder}", ())
        kind = "static" if "open-images" in folder else "video"
        for number, text in sentences.items():
            picks.append(Pick(folder, int(number), words(text, f"{file} set {folder}", number), kind))
    return picks
