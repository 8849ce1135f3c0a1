"""What is said of an image, true or false, and what contradicts it; and the files that say it.

`read_statements` takes .json, .jsonl, .csv, .tsv and .parquet, and folders of them. What a row is, its columns say:

    image, caption, label [, relation]          VSR: true or false; its relation is contradicted (data/relations.py)
    image, caption, negative_caption [, label]  SugarCrepe: the second is false; with a label 0, the first
    image, true_caption, false_caption,         ARO, its relations and its attributes: of the part of the image in the
      bbox_x, bbox_y, bbox_w, bbox_h            box, which is how ARO defines its test; without bbox, of all of it
    image, preferred, rejected                  your own pairs
    caption, preferred_image, rejected_image    ranking data: one text, two images

The column of the image may be called image, filename, image_path or image_id, and what it holds may be a view
(data/views.py). Further columns kind and category say what a row is reported under, else the file's name does, and
for VSR and ARO relation or attributes. Other columns are left alone. The names of columns are written as here.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from pc_clip.core.errors import UserError
from pc_clip.data import relations
from pc_clip.data.dataset import Statement, read_text

IMAGE_COLUMNS = ("image", "filename", "image_path", "image_id")
BOX_COLUMNS = ("bbox_x", "bbox_y", "bbox_w", "bbox_h")
LABELS = {"1": True, "1.0": True, "true": True, "0": False, "0.0": False, "false": False}
Rows = Iterator[tuple[str, Any]]  # where each stands, and its columns


def read_statements(paths: Sequence[str | Path], seed: int = 0) -> list[Statement]:
    """All statements of some files, in their order. A folder stands for the files in it, by name.

    seed: for the contradictions that are drawn. Rows that are there twice are kept. Raises UserError with file and
    line for a row that is none of the above, and for a file or folder without any.
    """
    statements = []
    for file in (file for path in paths for file in files_of(Path(path))):
        before = len(statements)
        statements += [
            _statement(_Row(where, row), file.stem, seed) for where, row in READERS[file.suffix.lower()](file)
        ]
        if len(statements) == before:
            raise UserError(f"{file} holds no rows; remove it, or write it again")
    return statements


def label_of(paths: Sequence[str | Path]) -> str:
    """A short name for results: the names of files without ending, and of folders, joined by "+"."""
    places = [Path(path) for path in paths]
    return "+".join(place.resolve().name if place.is_dir() else place.stem for place in places)


def files_of(path: Path) -> list[Path]:
    """The files of statements that a path stands for: itself, or those in a folder."""
    if path.is_dir():
        inside = sorted(p for p in path.iterdir() if p.suffix.lower() in READERS and not p.name.startswith("."))
        files = [p for p in inside if p.is_file()]
        if not files:
            raise UserError(f"{path} has no files of statements in it ({', '.join(READERS)}); name one that has")
        return files
    if not path.is_file():
        raise UserError(f"no file of statements at {path}; see data/statements.py for what one looks like")
    if path.suffix.lower() not in READERS:
        raise UserError(f"{path} is no file of statements: its name must end in {', '.join(READERS)}")
    return [path]


# -- what a row says -------------------------------------------------------------------------------------


class _Row:
    """A row of a file, and where it stands there. A column that holds nothing (null) counts as none."""

    def __init__(self, where: str, values: Any) -> None:
        if not isinstance(values, dict):
            raise UserError(f"{where}: a row must be an object with columns, found {str(values)[:60]!r}")
        self.where, self.values = where, {name: value for name, value in values.items() if value is not None}

    def wrong(self, what: str) -> UserError:
        return UserError(f"{self.where}: {what}")

    def text(self, column: str) -> str:
        """Words with single spaces. Raises UserError for anything else, and for none."""
        value = self.values[column]
        if not isinstance(value, str) or not value.strip():
            raise self.wrong(f"{column} must be a text with a word in it, found {str(value)[:60]!r}")
        return " ".join(value.split())

    def optional(self, column: str, default: str) -> str:
        return self.text(column) if self.values.get(column, "") != "" else default

    def image(self, *columns: str) -> str:
        """The name of an image, of the first of the columns that is there; a number too, as COCO's ids are."""
        column = next(column for column in columns or IMAGE_COLUMNS if column in self.values)
        value = self.values[column]
        if type(value) is int:
            return str(value)
        if not isinstance(value, str) or not value.strip():
            raise self.wrong(f"{column} must name an image, found {str(value)[:60]!r}")
        return value.strip()

    def label(self) -> bool:
        label = LABELS.get(str(self.values["label"]).strip().lower())
        if label is None:
            raise self.wrong(f"label must be 0 or 1 (false or true), found {str(self.values['label'])[:60]!r}")
        return label

    def box(self) -> str:
        """ARO's box as the end of a view's name; empty where the row has none."""
        if not any(column in self.values for column in BOX_COLUMNS):
            return ""
        try:
            x, y, width, height = numbers = [float(self.values[column]) for column in BOX_COLUMNS]
            if width <= 0 or height <= 0 or not all(map(float.is_integer, numbers)):
                raise ValueError
        except (KeyError, TypeError, ValueError):
            given = {column: self.values.get(column) for column in BOX_COLUMNS}
            raise self.wrong(f"a box needs {', '.join(BOX_COLUMNS)}, whole pixels, not empty; found {given}") from None
        return f"@box={x:.0f},{y:.0f},{x + width:.0f},{y + height:.0f}"


def _statement(row: _Row, stem: str, seed: int) -> Statement:
    for columns, read in FORMS.items():
        if all(column in row.values for column in columns) and (_names_images(columns) or _names_images(row.values)):
            return read(row, stem, seed)
    needs = "; or ".join(", ".join(columns if _names_images(columns) else ("image", *columns)) for columns in FORMS)
    raise row.wrong(f"found {', '.join(map(str, row.values)) or 'nothing'}; a row needs {needs}")


def _names_images(columns: Iterable[str]) -> bool:
    return any(column in (*IMAGE_COLUMNS, "preferred_image") for column in columns)


def _pair(
    row: _Row, image: str, text: str, contradiction: str, kind: str, category: str = "", true: bool = True
) -> Statement:
    if text == contradiction:
        raise row.wrong(f"the two texts are the same, {text[:80]!r}, so that neither can win; remove the row")
    return Statement(image, text, contradiction, true, row.optional("kind", kind), row.optional("category", category))


def _preferred(row: _Row, stem: str, seed: int) -> Statement:
    return _pair(row, row.image(), row.text("preferred"), row.text("rejected"), stem)


def _negative(row: _Row, stem: str, seed: int) -> Statement:
    true = row.label() if row.values.get("label", "") != "" else True
    return _pair(row, row.image(), row.text("caption"), row.text("negative_caption"), stem, true=true)


def _labelled(row: _Row, stem: str, seed: int) -> Statement:
    text, label = row.text("caption"), row.label()
    relation = row.optional("relation", "").lower() or relations.find_relation(text)
    if relation is None:
        raise row.wrong(
            f"{text[:80]!r} is about no relation known in data/relations.yaml; give it in a column relation, or what "
            "contradicts it in a column negative_caption"
        )
    try:
        contradiction = relations.contradict(text, relation, seed)
    except UserError as error:
        raise row.wrong(str(error)) from None
    return _pair(row, row.image(), text, contradiction, relation, relations.category(relation), label)


def _aro(row: _Row, stem: str, seed: int) -> Statement:
    """ARO names its attributes as a list of the two that are exchanged."""
    kind, category = row.optional("relation_name", ""), "aro_relation"
    if "attributes" in row.values:
        attributes = row.values["attributes"]
        if not isinstance(attributes, list) or not all(isinstance(each, str) for each in attributes):
            raise row.wrong(f"attributes must be a list of texts, found {str(attributes)[:60]!r}")
        kind, category = " / ".join(attributes), "aro_attribution"
    texts = row.text("true_caption"), row.text("false_caption")
    return _pair(row, row.image() + row.box(), *texts, kind or stem, category if kind else "")


def _ranking(row: _Row, stem: str, seed: int) -> Statement:
    text, image, other = row.text("caption"), row.image("preferred_image"), row.image("rejected_image")
    if image == other:
        raise row.wrong(f"preferred_image and rejected_image are both {image!r}; remove the row")
    return Statement(image, text, text, True, row.optional("kind", stem), row.optional("category", ""), other)


# By the columns that a row must have, beside one that names its image; the first that fits.
FORMS: dict[tuple[str, ...], Callable[[_Row, str, int], Statement]] = {
    ("preferred", "rejected"): _preferred,
    ("caption", "preferred_image", "rejected_image"): _ranking,
    ("true_caption", "false_caption"): _aro,
    ("caption", "negative_caption"): _negative,
    ("caption", "label"): _labelled,
}


# -- the rows of a file ----------------------------------------------------------------------------------


def _json(path: Path) -> Rows:
    """A list of rows, or an object of them, as SugarCrepe writes them."""
    try:
        content = json.loads(read_text(path))
    except json.JSONDecodeError as error:
        lines = " (for a JSON in each line, the name must end in .jsonl)" if error.msg == "Extra data" else ""
        raise UserError(f"{path} is not JSON: {error}{lines}; it may have been cut short") from None
    if isinstance(content, list):
        content = dict(enumerate(content))
    elif not isinstance(content, dict) or not all(isinstance(row, dict) for row in content.values()):
        raise UserError(f"{path} must be a list of rows or an object of rows, found {str(content)[:60]!r}")
    for key, row in content.items():
        yield f"{path} entry {key}", row


def _json_lines(path: Path) -> Rows:
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if line.strip():
            try:
                yield f"{path} line {number}", json.loads(line)
            except json.JSONDecodeError as error:
                raise UserError(f"{path} line {number} is not JSON ({error.msg}): {line.strip()[:60]!r}") from None


def _table(path: Path) -> Rows:
    """CSV or TSV, the columns named in the first line; a field in quotes may hold line breaks."""
    text = io.StringIO(read_text(path), newline="")
    reader = csv.DictReader(text, delimiter="\t" if path.suffix.lower() == ".tsv" else ",", strict=True)
    try:
        names = reader.fieldnames = [name.strip() for name in reader.fieldnames or ()]
        if len(set(names)) < len(names):
            raise UserError(f"{path}: a column is there twice among {', '.join(names)}; rename one")
        for row in reader:
            if None in row or None in row.values():
                raise UserError(
                    f"{path} line {reader.line_num}: it does not have the {len(names)} fields that the first line "
                    "names; put quotes around a field that holds what separates fields"
                )
            yield f"{path} line {reader.line_num}", row
    except csv.Error as error:
        raise UserError(f"{path} line {reader.line_num}: {error}; is a quote not closed?") from None


def _parquet(path: Path) -> Rows:
    """Only the columns that are known: a file may hold pictures as well."""
    from pyarrow import ArrowException, parquet

    known = {*IMAGE_COLUMNS, *BOX_COLUMNS, "kind", "category", "relation", "relation_name", "attributes"}
    known.update(column for columns in FORMS for column in columns)
    try:
        columns = [name for name in parquet.read_schema(path).names if name in known]
        rows = parquet.read_table(path, columns=columns).to_pylist()
    except (ArrowException, OSError) as error:
        raise UserError(f"{path} cannot be read as Parquet ({str(error).splitlines()[0]}); write it again") from None
    for number, row in enumerate(rows, 1):
        yield f"{path} row {number}", row


READERS: dict[str, Callable[[Path], Rows]] = {
    ".json": _json,
    ".jsonl": _json_lines,
    ".csv": _table,
    ".tsv": _table,
    ".parquet": _parquet,
}
