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
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from pc_clip.core.errors import UserError
from pc_clip.data import relations
from pc_clip.data.dataset import Statement

IMAGE_COLUMNS = ("image", "filename", "image_path", "image_id")
BOX_COLUMNS = ("bbox_x", "bbox_y", "bbox_w", "bbox_h")
LABELS = {"1": True, "1.0": True, "true": True, "0": False, "0.0": False, "false": False}


def read_statements(paths: Sequence[str | Path], seed: int = 0) -> list[Statement]:
    """All statements of some files, in their order. A folder stands for the files in it, by name.

    seed: for the contradictions that are drawn. Rows that are there twice are kept. Raises UserError with file and
    line for a row that is none of the above, and for a file or folder without any.
    """
    found = []
    for file in (file for path in paths for file in files_of(Path(path))):
        before = len(found)
        found += [_statement(row, file.stem, seed) for row in READERS[file.suffix.lower()](file)]
        if len(found) == before:
            raise UserError(f"{file} holds no rows; remove it, or write it again")
    return found


def label_of(paths: Sequence[str | Path]) -> str:
    """A short name for results: the names of files without ending, and of folders, joined by "+"."""
    places = [Path(path) for path in paths]
    return "+".join(place.resolve().name if place.is_dir() else place.stem for place in places)


def files_of(path: Path) -> list[Path]:
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


# -- what a row says -----------------------------------------------------------------------------------


class _Row:
    """A row of a file, and where it stands there. A column that holds nothing (null) counts as none."""

    def __init__(self, where: str, values: dict[str, Any]) -> None:
        self.where, self.values = where, {name: value for name, value in values.items() if value is not None}

    def __contains__(self, column: str) -> bool:
        return column in self.values

    def wrong(self, what: str) -> UserError:
        return UserError(f"{self.where}: {what}")

    def text(self, column: str) -> str:
        """Words with single spaces. Raises UserError for anything else, and for none."""
        value = self.values[column]
        if not isinstance(value, str):
            raise self.wrong(f"{column} must be a text, found {str(value)[:60]!r}")
        if not value.strip():
            raise self.wrong(f"{column} is empty; fill it in or remove the row")
        return " ".join(value.split())

    def optional(self, column: str, default: str) -> str:
        return self.text(column) if self.values.get(column, "") != "" else default

    def name(self, column: str) -> str:
        """The name of an image; a number too, as COCO's ids are in some files."""
        value = self.values[column]
        if isinstance(value, int) and not isinstance(value, bool):
            return str(value)
        if not isinstance(value, str) or not value.strip():
            raise self.wrong(f"{column} must name an image, found {str(value)[:60]!r}")
        return value.strip()

    def image(self) -> str:
        return self.name(next(column for column in IMAGE_COLUMNS if column in self))

    def label(self) -> bool:
        found = LABELS.get(str(self.values["label"]).strip().lower())
        if found is None:
            raise self.wrong(f"label must be 0 or 1 (false or true), found {str(self.values['label'])[:60]!r}")
        return found

    def integer(self, column: str) -> int:
        try:
            number = float(self.values[column])
            if number == int(number):
                return int(number)
        except (TypeError, ValueError, OverflowError):
            pass
        raise self.wrong(f"{column} must be a whole number of pixels, found {str(self.values[column])[:60]!r}")


def _statement(row: _Row, stem: str, seed: int) -> Statement:
    for columns, read in FORMS.items():
        if all(column in row for column in columns) and (_names_images(columns) or _names_images(row.values)):
            return read(row, stem, seed)
    needs = "; or ".join(", ".join(columns if _names_images(columns) else ("image", *columns)) for columns in FORMS)
    raise row.wrong(f"found {', '.join(row.values) or 'nothing'}; a row needs {needs}")


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
            f"{text[:80]!r} is about no relation known in data/relations.py; give it in a column relation, or what "
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
    if "attributes" in row:
        attributes = row.values["attributes"]
        if not isinstance(attributes, list) or not all(isinstance(each, str) for each in attributes):
            raise row.wrong(f"attributes must be a list of texts, found {str(attributes)[:60]!r}")
        kind, category = " / ".join(attributes), "aro_attribution"
    image = row.image() + _box(row)
    return _pair(
        row, image, row.text("true_caption"), row.text("false_caption"), kind or stem, category if kind else ""
    )


def _box(row: _Row) -> str:
    there = [column for column in BOX_COLUMNS if column in row]
    if not there:
        return ""
    if len(there) < len(BOX_COLUMNS):
        raise row.wrong(f"a box needs {', '.join(BOX_COLUMNS)}, found only {', '.join(there)}")
    x, y, width, height = map(row.integer, BOX_COLUMNS)
    if width <= 0 or height <= 0:
        raise row.wrong(f"the box is empty: bbox_w is {width} and bbox_h is {height}")
    return f"@box={x},{y},{x + width},{y + height}"


def _ranking(row: _Row, stem: str, seed: int) -> Statement:
    text, image, instead = row.text("caption"), row.name("preferred_image"), row.name("rejected_image")
    if image == instead:
        raise row.wrong(f"preferred_image and rejected_image are both {image!r}; remove the row")
    return Statement(image, text, text, True, row.optional("kind", stem), row.optional("category", ""), instead)


# By the columns that a row must have, beside one that names its image; the first that fits.
FORMS: dict[tuple[str, ...], Callable[[_Row, str, int], Statement]] = {
    ("preferred", "rejected"): _preferred,
    ("caption", "preferred_image", "rejected_image"): _ranking,
    ("true_caption", "false_caption"): _aro,
    ("caption", "negative_caption"): _negative,
    ("caption", "label"): _labelled,
}


# -- the rows of a file --------------------------------------------------------------------------------


def _no_text(path: Path, error: Exception) -> UserError:
    return UserError(f"{path} is no UTF-8 text ({error}); write it again as UTF-8")


def _json(path: Path) -> Iterator[_Row]:
    """A list of rows, or an object of them, as SugarCrepe writes them."""
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError as error:
        raise _no_text(path, error) from None
    except json.JSONDecodeError as error:
        lines = " (for a JSON in each line, the name must end in .jsonl)" if error.msg == "Extra data" else ""
        raise UserError(f"{path} is not JSON: {error}{lines}; it may have been cut short") from None
    if isinstance(content, list):
        entries = [(str(n), row) for n, row in enumerate(content)]
    elif isinstance(content, dict) and all(isinstance(row, dict) for row in content.values()):
        entries = list(content.items())
    else:
        raise UserError(f"{path} must be a list of rows or an object of rows, found {str(content)[:60]!r}")
    for key, row in entries:
        yield _object(f"{path} entry {key}", row)


def _json_lines(path: Path) -> Iterator[_Row]:
    try:
        with path.open(encoding="utf-8-sig") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    where = f"{path} line {number}"
                    try:
                        row = json.loads(line)
                    except json.JSONDecodeError as error:
                        raise UserError(f"{where} is not JSON ({error.msg}), found {line.strip()[:60]!r}") from None
                    yield _object(where, row)
    except UnicodeDecodeError as error:
        raise _no_text(path, error) from None


def _object(where: str, row: Any) -> _Row:
    if not isinstance(row, dict):
        raise UserError(f"{where}: a row must be an object with columns, found {str(row)[:60]!r}")
    return _Row(where, row)


def _table(path: Path) -> Iterator[_Row]:
    """CSV or TSV, the columns named in the first line; a field in quotes may hold line breaks."""
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    head: list[str] | None = None
    line = 1
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, delimiter=delimiter, strict=True)
            for fields in reader:
                where, line = f"{path} line {line}", reader.line_num + 1
                if not fields:
                    continue
                if head is None:
                    head = _head(where, fields)
                elif len(fields) != len(head):
                    raise UserError(
                        f"{where}: {len(fields)} fields, but the first line names {len(head)} columns; put quotes "
                        "around a field that holds what separates fields"
                    )
                else:
                    yield _Row(where, dict(zip(head, fields)))
    except csv.Error as error:
        raise UserError(f"{path} line {line}: {error}; is a quote not closed?") from None
    except UnicodeDecodeError as error:
        raise _no_text(path, error) from None


def _head(where: str, fields: list[str]) -> list[str]:
    names = [field.strip() for field in fields]
    if twice := {name for name in names if names.count(name) > 1}:
        raise UserError(f"{where}: the column {min(twice)!r} is there twice; rename one")
    return names


def _parquet(path: Path) -> Iterator[_Row]:
    """Only the columns that are known: a file may hold pictures as well."""
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise UserError(f"to read {path}, pyarrow is needed: pip install -r requirements.txt") from None
    known = {*IMAGE_COLUMNS, *BOX_COLUMNS, "kind", "category", "relation", "relation_name", "attributes"}
    known.update(column for columns in FORMS for column in columns)
    try:
        with parquet.ParquetFile(path) as file:
            columns = [name for name in file.schema_arrow.names if name in known]
            start = 1
            for batch in file.iter_batches(columns=columns):
                for number, row in enumerate(batch.to_pylist(), start):
                    yield _Row(f"{path} row {number}", row)
                start += batch.num_rows
    except (ArrowException, OSError) as error:
        raise UserError(f"{path} cannot be read as Parquet ({str(error).splitlines()[0]}); write it again") from None


READERS: dict[str, Callable[[Path], Iterator[_Row]]] = {
    ".json": _json,
    ".jsonl": _json_lines,
    ".csv": _table,
    ".tsv": _table,
    ".parquet": _parquet,
}
