"""Images with captions: COCO's JSON, SimCLIP's table, and the JSON lines that `--task rewrite` writes."""

from __future__ import annotations

import csv
import io
import json
import logging
import os
import re
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

from pc_clip.core.errors import UserError
from pc_clip.data.dataset import Dataset, digest, first_file, read_file, read_text

log = logging.getLogger(__name__)

TABLES = (".tsv", ".csv", ".txt")  # endings of tables in any case; columns are apart by tabs whatever the ending


class Captions(dict[str, tuple[str, tuple[str, ...]]]):
    """Image id -> (file name, its captions, at least one). note: what was left out, counted by reason."""

    def __init__(self, path: Path, entries: dict[str, tuple[str, list[str]]], left_out: Counter[str]) -> None:
        super().__init__({key: (file, tuple(texts)) for key, (file, texts) in entries.items() if texts})
        if without := len(entries) - len(self):
            left_out[f"of {len(entries)} images have no caption"] += without
        counts = "; ".join(f"{count} {reason}" for reason, count in left_out.items())
        self.note = f"{path.name}: {counts}; left out" if counts else ""
        if not self:
            raise UserError(f"{path} holds no captions ({counts or 'it is empty'})")


def read_captions(path: str | Path) -> Captions:
    """Captions by image id from any of the formats, told apart by the file's ending. What is left out is logged."""
    path = Path(path)
    table = path.suffix.lower() in TABLES
    read = read_rewritten if path.suffix == ".jsonl" else read_simclip_tsv if table else read_coco_captions
    captions = read(path)
    if captions.note:
        log.warning("%s", captions.note)
    return captions


def _text(path: Path) -> str:
    if not path.is_file():
        raise UserError(f"no captions file at {path}. COCO's are in annotations_trainval2017.zip of cocodataset.org.")
    return read_text(path)


def _spaced(text: str) -> str:
    """With single spaces. JSON may hold half a surrogate pair, which cannot be written again."""
    return " ".join(text.encode("utf-8", "replace").decode().split())


# -- the formats -----------------------------------------------------------------------------------------


def image_id(value: object) -> str | None:
    """One form of an id: 3, 3.0, "3" and "000000000003" are "3". None for what is no id."""
    if isinstance(value, bool) or not isinstance(value, int | float | str) or value == "":
        return None
    if isinstance(value, float):
        return str(int(value)) if value.is_integer() else None
    text = str(value)
    return str(int(text)) if text.isascii() and text.isdecimal() else text


def read_coco_captions(path: Path) -> Captions:
    """A COCO captions file. Raises UserError that names the entry which is not what it should be."""
    try:
        content = json.loads(_text(path))
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is not JSON ({error}); fetch it again, it may have been cut short") from error
    lists = [content.get(kind) for kind in ("images", "annotations")] if isinstance(content, dict) else [None]
    if not all(isinstance(each, list) for each in lists):
        raise UserError(f'{path} is no COCO captions file: it needs the lists "images" and "annotations"')
    entries: dict[str, tuple[str, list[str]]] = {}
    for n, image in enumerate(lists[0]):
        key, name = _fields(image, "id", "file_name")
        if (key := image_id(key)) is None or not isinstance(name, str) or not name:
            raise UserError(f"{path}: entry {n} of images needs an id and a file_name: {str(image)[:80]}")
        if key in entries:
            raise UserError(f"{path}: two images have the id {key}, {entries[key][0]} and {name}; mend one")
        entries[key] = (name, [])
    left_out: Counter[str] = Counter()
    for n, annotation in enumerate(lists[1]):
        key, text = _fields(annotation, "image_id", "caption")
        if (key := image_id(key)) is None or not isinstance(text, str):
            is_other = not any(isinstance(a, dict) and "caption" in a for a in lists[1])
            hint = " (COCO's instances file? captions_*.json is wanted)" if is_other else ""
            raise UserError(f"{path}: entry {n} of annotations lacks image_id or caption: {str(annotation)[:80]}{hint}")
        if key not in entries:
            left_out["annotations are of images that it does not list"] += 1
        elif text := _spaced(text):
            entries[key][1].append(text)
        else:
            left_out["captions are empty"] += 1
    return Captions(path, entries, left_out)


def _fields(entry: Any, *names: str) -> list[Any]:
    return [entry.get(name) if isinstance(entry, dict) else None for name in names]


def read_simclip_tsv(path: Path) -> Captions:
    """SimCLIP's table, `image caption1 caption2 ...`, tab-separated. The id is the column `id`, else the file's name.

    An empty caption and "nan" are none. Raises UserError for absent columns and for a row that does not fit.
    """
    (_, head), *rows = _rows(path)
    columns = [n for n, name in enumerate(head) if re.fullmatch(r"caption\d*", name)]
    if "image" not in head or not columns:
        apart = " (one column: separate them by tabs)" if len(head) == 1 else ""
        raise UserError(
            f"{path} needs a column image and columns caption1, caption2, ...; found {', '.join(head)}{apart}"
        )
    image = head.index("image")
    named = head.index("id") if "id" in head else image
    entries: dict[str, tuple[str, list[str]]] = {}
    for line, row in rows:
        if any(field.strip() for field in row[len(head) :]):
            raise UserError(f"{path}, line {line}: {len(row)} fields, but the first line names {len(head)} columns")
        row += [""] * (len(head) - len(row))
        if not row[image].strip():
            raise UserError(f"{path}, line {line}: no image is named, in {' '.join(row).strip()[:80]!r}")
        key = row[named] or row[image]
        if key in entries:
            raise UserError(f"{path}, line {line}: a second row for {key!r}; put all captions of an image into one row")
        texts = [_spaced(row[n]) for n in columns]
        entries[key] = (row[image], [text for text in texts if text and text.lower() != "nan"])
    return Captions(path, entries, Counter())


def _rows(path: Path) -> list[tuple[int, list[str]]]:
    """The rows that hold anything, the head first, with the line each ends in.

    Fields in quotes are read as pandas writes them, line breaks and all. SimCLIP's own tables have captions with a lone
    quote, which would swallow the rows after it, tabs too: where that happens, quotes are read as characters.
    """
    text = _text(path)
    rows = _csv(text, csv.QUOTE_MINIMAL)
    if rows is None or any("\t" in field and "\n" in field for _, row in rows for field in row):
        rows = _csv(text, csv.QUOTE_NONE)
        quoted = re.compile(r'"(?:[^"]|"")*"')
        rows = rows and [
            (n, [f[1:-1].replace('""', '"') if quoted.fullmatch(f) else f for f in row]) for n, row in rows
        ]
        if lone := next((n for n, row in rows or [] if len(row) == 1 < len(rows[0][1])), None):
            raise UserError(f"{path}, line {lone}: one field only; is a quote before it not closed?")
    if not rows:
        raise UserError(f"{path} is no tab-separated table: it is empty, or holds bytes that are no text")
    return rows


def _csv(text: str, quoting: int) -> list[tuple[int, list[str]]] | None:
    reader = csv.reader(io.StringIO(text, newline=""), delimiter="\t", quoting=quoting, strict=True)
    try:
        return [(reader.line_num, row) for row in reader if any(map(str.strip, row))]
    except csv.Error:
        return None


def read_rewritten(path: Path) -> Captions:
    """Captions that generate_diffs.py --task rewrite wrote, a JSON a line with image and text; no file names."""
    entries: dict[str, tuple[str, list[str]]] = {}
    left_out: Counter[str] = Counter()
    for number, line in enumerate(_text(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            key, text = _fields(json.loads(line), "image", "text")
        except json.JSONDecodeError:
            key = text = None
        if not isinstance(text, str) or isinstance(key, bool) or not isinstance(key, int | str):
            raise UserError(f"{path}, line {number}: wanted JSON with image and text, found {line[:80]!r}")
        texts = entries.setdefault(str(key), ("", []))[1]
        if text := _spaced(text):
            texts.append(text)
        else:
            left_out["captions are empty"] += 1
    return Captions(path, entries, left_out)


# -- the data sets ---------------------------------------------------------------------------------------


def open_coco(root: Path, split: str, missing: str = "error") -> Dataset:
    """COCO's layout: {root}/[annotations/]captions_{split}.json, pictures in {root}/{split}/.

    missing: an absent picture is an "error", or its image is left out ("skip"), or kept until it is looked at
    ("keep", for embeddings that were made elsewhere).
    """
    folders = (root / "annotations", root)
    path = next((p for folder in folders if (p := folder / f"captions_{split}.json").is_file()), None)
    if path is None:
        present = sorted(p.stem.removeprefix("captions_") for f in folders for p in f.glob("captions_*.json"))
        raise UserError(f"{root} has no captions_{split}.json; splits found there: {', '.join(present) or 'none'}")
    get = f"Get {split}.zip of cocodataset.org"
    return _with_pictures("coco", split, split, path, read_coco_captions(path), root, split, missing, get)


def open_tsv(root: Path, split: str, missing: str = "error") -> Dataset:
    """SimCLIP's table, and its pictures below {root}, in the folders where COCO's may be.

    split: NAME for {root}/NAME.tsv (or .csv, .txt), or the path of a table that lies anywhere. missing: as for COCO. A
    column `image` with whole paths is taken at its word. A table that is not {root}/NAME.tsv has six digits of its path
    in the label, so that results of two tables of one name are kept apart.
    """
    path = next((p for p in [*_named(root, split), Path(split), root / split] if is_table(p)), None)
    if path is None:
        present = sorted({p.stem for p in root.glob("*") if is_table(p)})
        file = split if Path(split).suffix.lower() in TABLES else f"{split}.tsv"
        raise UserError(
            f"{root} has no {file}; tables found there: {', '.join(present) or 'none'}. "
            "A table elsewhere is named by its path: --data.split FILE.tsv (--split for run.py)."
        )
    first = next((p for p in _named(root, path.stem) if is_table(p)), None)  # what its bare name would open
    label = path.stem
    if first is None or first.resolve() != path.resolve():
        label += f"-{digest(str(path.resolve()))[:6]}"
    captions = read_simclip_tsv(path)
    return _with_pictures("tsv", label, split, path, captions, root, path.stem, missing, "Put them there")


def is_table(path: Path) -> bool:
    """Whether there is a file whose name ends as a table's does."""
    return path.suffix.lower() in TABLES and path.is_file()


def _named(root: Path, name: str) -> list[Path]:
    """Where a table may be that is named without its ending."""
    return [root / f"{name}{ending}" for ending in (*TABLES, *map(str.upper, TABLES))]


def _with_pictures(
    name: str, split: str, part: str, path: Path, captions: Captions, root: Path, inner: str, missing: str, get: str
) -> Dataset:
    """A data set of captions by image id, and of pictures that are looked for below `root`.

    path: the file of the captions. inner: the folder below `root` where pictures are looked for first. get: how they
    are had, for the error.
    """
    folders = [str(folder) for folder in (root / inner, root / "images" / inner, root / "images", root)]
    files = {key: first_file(os.path.join(folder, file) for folder in folders) for key, (file, _) in captions.items()}
    absent = [captions[key][0] for key, file in files.items() if file is None]
    if absent and missing != "keep" and (missing == "error" or len(absent) == len(files)):
        raise UserError(
            f"{len(absent)} of the {len(files)} pictures in {path} are not in {root / inner}, first {absent[0]}. "
            f"{get}, or use only those that are there with --data.missing skip (--missing for run.py)."
        )
    ids = [key for key, file in files.items() if file is not None or missing == "keep"]
    places = [files[key] or (os.path.join(folders[0], captions[key][0]),) for key in ids]
    note = f"{len(absent)} pictures named in {path.name} are absent{'' if missing == 'keep' else ' and left out'}"
    return Dataset(
        name=name,
        split=split,
        ids=ids,
        load=partial(read_file, [place[0] for place in places]),  # says which one is absent
        fingerprint=digest(*[(key, *place[1:]) for key, place in zip(ids, places)]),
        captions=[captions[key][1] for key in ids],
        note="; ".join(filter(None, (captions.note, note if absent else ""))),
        part=part,
    )
