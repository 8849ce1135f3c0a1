"""Statements about images, true or false, with their contradictions; readers of the published files.

`read_statements` takes .json, .jsonl, .csv, .tsv and .parquet, and folders of them. What a row is, its columns say:

    image, caption, label [, relation]          VSR: true or false; its relation is contradicted (data/relations.py)
    image, caption, negative_caption [, label]  SugarCrepe: the second is false; with a label 0, the first
    image, true_caption, false_caption,         ARO, its relations and its attributes: of the part of the image in the
      bbox_x, bbox_y, bbox_w, bbox_h            box, which is how ARO defines its test; without bbox, of all of it
    image, caption, foil [, mturk]              VALSE: the second is false
    image, preferred, rejected                  your own pairs
    caption, preferred_image, rejected_image    ranking data: one text, two images

The column of the image may be called image, filename, image_path, image_id or image_file, and what it holds may be a
view (data/views.py). Further columns kind and category say what a row is reported under, else the file's name does,
and for VSR and ARO relation or attributes. Other columns are left alone. The names of columns are written as here.
"""

from __future__ import annotations

import csv
import io
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pc_clip.core.errors import UserError
from pc_clip.data import relations
from pc_clip.data.dataset import Statement
from pc_clip.data.text_files import Entries, image_name, json_lines, read_json, read_text, with_keys, words

log = logging.getLogger(__name__)

IMAGE_COLUMNS = ("image", "filename", "image_path", "image_id", "image_file")
BOX_COLUMNS = ("bbox_x", "bbox_y", "bbox_w", "bbox_h")
PAIRS = (  # true, false
    ("preferred", "rejected"), ("true_caption", "false_caption"), ("caption", "negative_caption"), ("caption", "foil"),
)  # fmt: skip
CONFIRMED = 2  # of three annotators, who have to have preferred a caption for VALSE to count it
LABELS = {"1": True, "1.0": True, "true": True, "0": False, "0.0": False, "false": False}


def read_statements(paths: Sequence[str | Path], seed: int = 0, unconfirmed: bool = False) -> list[Statement]:
    """All statements of some files, in their order. A folder stands for the files in it, by name.

    seed: for the contradictions that are drawn. unconfirmed: keep VALSE's rows that fewer than CONFIRMED annotators
    confirmed, which its authors leave out; they are counted in the log. Rows that are there twice are kept.
    Raises UserError with file and line for a row that is none of the above, and for a file or folder without any.
    """
    statements = []
    for file in (file for path in paths for file in files_of(Path(path))):
        rows = [Row(where, row) for where, row in READERS[file.suffix.lower()](file)]
        kept = [row for row in rows if row.has_a_foil() and (unconfirmed or row.is_confirmed())]
        if not kept:
            raise UserError(f"{file} holds no rows; remove it, or write it again")
        if len(kept) < len(rows):
            log.info(
                "%s: %d of %d rows are left out, not confirmed (--unconfirmed)", file, len(rows) - len(kept), len(rows)
            )
        statements += [_statement(row, file.stem, seed) for row in kept]
    return statements


def label_of(paths: Sequence[str | Path]) -> str:
    """A short name for results: the names of files without ending, and of folders, joined by "+"."""
    places = [Path(path) for path in paths]
    return "+".join(place.resolve().name if place.is_dir() else place.stem for place in places)


def files_of(path: Path) -> list[Path]:
    """The files of statements that a path stands for: itself, or those in a folder."""
    inside = sorted(p for p in path.iterdir() if not p.name.startswith(".")) if path.is_dir() else [path]
    files = [p for p in inside if p.suffix.lower() in READERS and p.is_file()]
    if not files:
        raise UserError(f"no file of statements at {path}: one whose name ends in {', '.join(READERS)}")
    return files


class Row:
    """A row of a file, and where it stands there. A column that holds nothing (null) counts as none."""

    def __init__(self, where: str, columns: dict[str, Any]) -> None:
        self.where, self.columns = where, {name: value for name, value in columns.items() if value is not None}

    def wrong(self, what: str) -> UserError:
        return UserError(f"{self.where}: {what}")

    def text(self, column: str) -> str:
        return words(self.columns[column], self.where, column)

    def optional(self, column: str, default: str) -> str:
        return self.text(column) if self.columns.get(column, "") != "" else default

    def image(self, *columns: str) -> str:
        """The name of an image, of the first of the columns that is there."""
        column = next(column for column in columns or IMAGE_COLUMNS if column in self.columns)
        return image_name(self.columns[column], self.where, column)

    def label(self) -> bool:
        label = LABELS.get(str(self.columns["label"]).strip().lower())
        if label is None:
            raise self.wrong(f"label must be 0 or 1 (false or true), found {str(self.columns['label'])[:60]!r}")
        return label

    def is_confirmed(self) -> bool:
        votes = self.columns.get("mturk")
        return not isinstance(votes, dict) or votes.get("caption", 0) >= CONFIRMED

    def has_a_foil(self) -> bool:
        """Some unconfirmed rows of VALSE have no foil but the caption itself."""
        return "foil" not in self.columns or self.columns["foil"] != self.columns.get("caption")

    def box(self) -> str:
        """ARO's box as the end of a view's name; empty where the row has none."""
        given = {column: self.columns[column] for column in BOX_COLUMNS if column in self.columns}
        if not given:
            return ""
        try:
            x, y, width, height = numbers = [float(given[column]) for column in BOX_COLUMNS]
            if width <= 0 or height <= 0 or not all(map(float.is_integer, numbers)):
                raise ValueError
        except (KeyError, TypeError, ValueError):
            raise self.wrong(f"a box needs {', '.join(BOX_COLUMNS)}, whole pixels, not empty; found {given}") from None
        return f"@box={x:.0f},{y:.0f},{x + width:.0f},{y + height:.0f}"

    def aro_kind(self, stem: str) -> tuple[str, str]:
        """Kind and category: ARO names its relation, or as a list the two attributes that are exchanged."""
        attributes = self.columns.get("attributes", [])
        if not isinstance(attributes, list) or not all(isinstance(each, str) for each in attributes):
            raise self.wrong(f"attributes must be a list of texts, found {str(attributes)[:60]!r}")
        if attributes:
            return " / ".join(attributes), "aro_attribution"
        relation = self.optional("relation_name", "")
        return (relation, "aro_relation") if relation else (stem, "")

    def contradicted(self, text: str, seed: int) -> tuple[str, str]:
        """The relation that a text is about, and the text that contradicts it."""
        relation = self.optional("relation", "").lower() or relations.find_relation(text)
        try:
            if relation:
                return relation, relations.contradict(text, relation, seed)
        except UserError as error:
            raise self.wrong(str(error)) from None
        raise self.wrong(
            f"{text[:80]!r} is about no relation known in data/relations.yaml; give it in a column relation, or what "
            "contradicts it in a column negative_caption"
        )


def _statement(row: Row, stem: str, seed: int) -> Statement:
    """The statement of a row; its kind is the file's name `stem` by default."""
    columns, kind, category, true, other = row.columns.keys(), stem, "", True, ""
    texts = next((pair for pair in PAIRS if columns >= {*pair}), None)
    ranks = columns >= {"caption", "preferred_image", "rejected_image"} and texts != PAIRS[0]
    if not ranks and not (columns & {*IMAGE_COLUMNS} and (texts or columns >= {"caption", "label"})):
        forms = "caption, label; or caption, preferred_image, rejected_image"
        raise row.wrong(
            f"found {', '.join(columns) or 'nothing'}; a row needs an image ({', '.join(IMAGE_COLUMNS)}), and "
            f"{'; or '.join(map(', '.join, PAIRS))}; or {forms}"
        )
    if ranks:
        image, other = row.image("preferred_image"), row.image("rejected_image")
        text = contradiction = row.text("caption")
    elif texts:
        image, text, contradiction = row.image(), *map(row.text, texts)
        if texts == PAIRS[1]:
            image += row.box()
            kind, category = row.aro_kind(stem)
        elif texts == PAIRS[3]:
            category = "valse"
        elif texts == PAIRS[2] and row.columns.get("label", "") != "":
            true = row.label()
    else:
        image, text, true = row.image(), row.text("caption"), row.label()
        kind, contradiction = row.contradicted(text, seed)
        category = relations.category(kind)
    if text == contradiction and image == (other or image):
        raise row.wrong(f"the two texts or images are the same, {text[:80]!r}, so that neither can win; remove the row")
    kind, category = row.optional("kind", kind), row.optional("category", category)
    return Statement(image, text, contradiction, true, kind, category, other)


def _json(path: Path) -> Entries:
    """A list of rows, or an object of them, as SugarCrepe writes them."""
    content = read_json(path)
    for key, row in content.items() if isinstance(content, dict) else enumerate(content):
        yield f"{path} entry {key}", with_keys(row, f"{path} entry {key}", ())


def _table(path: Path) -> Entries:
    """CSV or TSV, the columns named in the first line; a field in quotes may hold line breaks."""
    text = io.StringIO(read_text(path), newline="")
    reader = csv.DictReader(text, delimiter="\t" if path.suffix.lower() == ".tsv" else ",", strict=True)
    try:
        names = reader.fieldnames = [name.strip() for name in reader.fieldnames or ()]
        for row in reader:
            where = f"{path} line {reader.line_num}"
            if None in row or None in row.values() or len(row) < len(names):
                raise UserError(
                    f"{where}: it does not have the {len(names)} different fields that the first line names; put "
                    "quotes around a field that holds what separates fields"
                )
            yield where, row
    except csv.Error as error:
        raise UserError(f"{path} line {reader.line_num}: {error}; is a quote not closed?") from None


def _parquet(path: Path) -> Entries:
    """Without columns of pictures, which a file may hold as well."""
    from pyarrow import ArrowException, parquet, types

    def holds_pictures(kind: Any) -> bool:
        return types.is_binary(kind) or types.is_large_binary(kind) or types.is_struct(kind)

    try:
        columns = [column.name for column in parquet.read_schema(path) if not holds_pictures(column.type)]
        rows = parquet.read_table(path, columns=columns).to_pylist()
    except (ArrowException, OSError) as error:
        raise UserError(f"{path} cannot be read as Parquet ({str(error).splitlines()[0]}); write it again") from None
    for number, row in enumerate(rows, 1):
        yield f"{path} row {number}", row


READERS: dict[str, Callable[[Path], Entries]] = {
    ".json": _json,
    ".jsonl": json_lines,
    ".csv": _table,
    ".tsv": _table,
    ".parquet": _parquet,
}
