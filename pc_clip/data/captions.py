"""Images with captions: COCO's JSON, Karpathy's, tables, CUB's text files, and the JSON lines of `--task rewrite`."""

from __future__ import annotations

import csv
import io
import logging
import os
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd

from pc_clip.core.errors import UserError
from pc_clip.data.dataset import CAPTION_COLUMN, LABEL_COLUMNS, Dataset, NoSplit, Question, digest
from pc_clip.data.picture_files import OR_SKIP, find_list, find_pictures
from pc_clip.data.text_files import image_name, json_lines, read_json, read_text, with_keys, words

log = logging.getLogger(__name__)

TABLES = (".tsv", ".csv", ".txt", ".parquet")  # endings of tables, in any case
IMAGE_COLUMNS = ("image", "filepath", "file_name", "filename", "image_path", "path")


class Captions(dict[str, tuple[str, tuple[str, ...]]]):
    """Image id -> (file name, its captions: at least one, or a label). note: what was left out, counted by reason.

    labels: the class of an image by its id, where the file has a column of classes.
    """

    def __init__(
        self,
        path: Path,
        entries: dict[str, tuple[str, list[str]]],
        left_out: Counter[str],
        labels: dict[str, str] | None = None,
    ) -> None:
        """entries: all captions as they are written; those without a word are left out and counted."""
        super().__init__()
        self.labels = labels or {}
        for key, (file, texts) in entries.items():
            kept = tuple(filter(None, texts))
            if kept or key in self.labels:
                self[key] = file, kept
            left_out["captions are empty"] += len(texts) - len(kept)
        left_out[f"of {len(entries)} images have no caption"] += len(entries) - len(self)
        counts = "; ".join(f"{count} {reason}" for reason, count in left_out.items() if count)
        self.note = f"{path.name}: {counts}; left out" if counts else ""
        if not self:
            raise UserError(f"{path} holds no captions ({counts or 'it is empty'})")


def read_captions(path: str | Path) -> Captions:
    """Captions by image id from any of the formats, told apart by the file's ending. What is left out is logged."""
    path = Path(path)
    if path.is_dir():
        return _with_note_logged(read_text_folder(path))
    if not path.is_file():
        raise UserError(f"no captions file at {path}. COCO's are in annotations_trainval2017.zip of cocodataset.org.")
    table = path.suffix.lower() in TABLES
    read = read_rewritten if path.suffix == ".jsonl" else read_table if table else read_coco_captions
    return _with_note_logged(read(path))


def _with_note_logged(captions: Captions) -> Captions:
    if not any(texts for _, texts in captions.values()):
        raise UserError("the file holds classes and no captions; open it as a data set, tsv, to classify its images")
    if captions.note:
        log.warning("%s", captions.note)
    return captions


def image_id(value: object) -> str | None:
    """One form of an id: 3, 3.0, "3" and "000000000003" are "3". None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float | str) or value == "":
        return None
    if isinstance(value, float):
        return str(int(value)) if value.is_integer() else None
    text = str(value)
    return str(int(text)) if text.isascii() and text.isdecimal() else text


def read_coco_captions(path: Path) -> Captions:
    """A COCO captions file, or Karpathy's. Raises UserError that names the entry which is not what it should be."""
    content = read_json(path, dict)
    if "annotations" not in content and isinstance(content.get("images"), list):
        return read_karpathy(path)
    with_keys(content, f"{path} is not a COCO captions file: it", ("images", "annotations"))
    entries: dict[str, tuple[str, list[str]]] = {}
    for n, image in enumerate(content["images"]):
        where = f"{path}: entry {n} of images"
        key = image_id(with_keys(image, where, ("id", "file_name"))["id"])
        if key is None or key in entries:
            raise UserError(f"{where} needs an id that no other image has, found {image['id']!r}")
        entries[key] = (words(image["file_name"], where, "file_name"), [])
    elsewhere = 0
    for n, annotation in enumerate(content["annotations"]):
        where = f"{path} (captions_*.json is wanted): entry {n} of annotations"
        key = image_id(with_keys(annotation, where, ("image_id", "caption"))["image_id"])
        text = words(annotation["caption"], where, "caption", may_be_empty=True)
        if key is None:
            raise UserError(f"{where} needs an image_id, found {annotation['image_id']!r}")
        if key in entries:
            entries[key][1].append(text)
        else:
            elsewhere += 1
    return Captions(path, entries, Counter({"annotations are of images that it does not list": elsewhere}))


def read_karpathy(path: Path, split: str = "") -> Captions:
    """The files dataset_coco.json, dataset_flickr30k.json and dataset_flickr8k.json of Karpathy and Fei-Fei (2015).

    split: train, restval, val or test, of which the images alone are read; empty for all. An image's id is COCO's where
    it has one, else its file's name.
    """
    entries: dict[str, tuple[str, list[str]]] = {}
    for n, image in enumerate(with_keys(read_json(path, dict), str(path), ("images",))["images"]):
        where = f"{path}: entry {n} of images"
        with_keys(image, where, ("filename", "split", "sentences"))
        if split and image["split"] != split:
            continue
        file = os.path.join(image.get("filepath", ""), words(image["filename"], where, "filename"))
        key = image_id(image.get("cocoid", image["filename"]))
        if key is None or key in entries:
            raise UserError(f"{where} needs an id that no other image has, found {key!r}")
        sentences = [with_keys(each, where, ("raw",))["raw"] for each in image["sentences"]]
        entries[key] = (file, [words(text, where, "raw", may_be_empty=True) for text in sentences])
    if not entries:
        raise UserError(f"{path} has no images of the split {split!r}; Karpathy's are train, restval, val and test")
    return Captions(path, entries, Counter())


def read_text_folder(folder: Path) -> Captions:
    """CUB's ten captions an image (Reed et al. 2016): text_c10/CLASS/IMAGE.txt, a caption a line.

    An image's id is its file below CUB's images/, CLASS/IMAGE.jpg, as the data set cub has it.
    """
    files = sorted(folder.glob("*/*.txt"))
    if not files:
        raise UserError(f"{folder} holds no captions; a folder of them is CUB's text_c10, with CLASS/IMAGE.txt in it")
    entries: dict[str, tuple[str, list[str]]] = {}
    for file in files:
        name = file.relative_to(folder).with_suffix(".jpg").as_posix()
        entries[name] = (name, [" ".join(line.split()) for line in read_text(file).splitlines() if line.strip()])
    return Captions(folder, entries, Counter())


def read_table(path: Path) -> Captions:
    """A table of pictures and captions, a row an image (SimCLIP's) or a row a caption (open_clip's), or Parquet.

    Columns, in any order and beside others: the picture, called one of IMAGE_COLUMNS; its captions, called caption,
    caption1, caption2, ..., title or text, or its class, one of LABEL_COLUMNS; its id, if it has another than its name.
    Columns are apart by tabs, commas or semicolons. An empty caption and "nan" are none.
    Raises UserError for absent columns, a row that does not fit, and two pictures of one id.
    """
    (_, head), *rows = _parquet(path) if path.suffix.lower() == ".parquet" else _rows(path)
    columns = [n for n, name in enumerate(head) if CAPTION_COLUMN.fullmatch(name)]
    image = next((head.index(name) for name in IMAGE_COLUMNS if name in head), None)
    label = next((head.index(name) for name in LABEL_COLUMNS if name in head), None)
    if image is None or not (columns or label is not None):
        raise UserError(
            f"{path} needs a column of pictures ({', '.join(IMAGE_COLUMNS)}) and columns of captions (caption, "
            f"caption1, ..., title, text) or one of classes ({', '.join(LABEL_COLUMNS)}); found {', '.join(head)}"
        )
    labels: dict[str, str] = {}
    named = head.index("id") if "id" in head else image
    entries: dict[str, tuple[str, list[str]]] = {}
    for line, row in rows:
        where = f"{path}, line {line}"
        if len(row) == 1 < len(head):
            raise UserError(f"{where}: one field only; is a quote before it not closed?")
        if any(field.strip() for field in row[len(head) :]):
            raise UserError(f"{where}: {len(row)} fields, but the first line names {len(head)} columns")
        row += [""] * (len(head) - len(row))
        file = image_name(row[image], where, "image")
        key = row[named] or file
        known, texts = entries.setdefault(key, (file, []))
        if known != file:
            raise UserError(f"{where}: the id {key!r} is that of another picture, {known}")
        texts_of_row = [words(row[n], where, head[n], may_be_empty=True) for n in columns]
        texts += [text for text in texts_of_row if text and text.lower() != "nan"]
        if label is not None and labels.setdefault(key, row[label]) != row[label]:
            raise UserError(f"{where}: {key!r} is of the class {row[label]!r} here and of {labels[key]!r} above")
    return Captions(path, entries, Counter(), labels)


def _parquet(path: Path) -> list[tuple[int, list[str]]]:
    """As `_rows`; other values are written as text, missing ones are empty."""
    try:
        table = pd.read_parquet(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is not a complete Parquet file ({error})") from error
    rows = table.astype(object).where(table.notna(), "").astype(str).values.tolist()
    return [(1, [str(name) for name in table.columns]), *enumerate(rows, start=2)]


def _rows(path: Path) -> list[tuple[int, list[str]]]:
    """The rows that hold anything, the head first, with the line each ends in.

    Fields in quotes are read as pandas writes them, line breaks and all. SimCLIP's own tables have captions with a lone
    quote, which would swallow the rows after it, tabs too: where that happens, quotes are read as characters.
    """
    text = read_text(path)
    first = text.lstrip("\ufeff").partition("\n")[0]
    separator = max("\t,;", key=first.count)
    rows = _csv(text, separator, csv.QUOTE_MINIMAL)
    swallows = separator == "\t" and any("\t" in field and "\n" in field for _, row in rows or () for field in row)
    if rows is None or swallows:
        quoted = re.compile(r'"(?:[^"]|"")*"')
        rows = [
            (line, [f[1:-1].replace('""', '"') if quoted.fullmatch(f) else f for f in row])
            for line, row in _csv(text, separator, csv.QUOTE_NONE) or ()
        ]
    if not rows:
        raise UserError(f"{path} is not a table separated by tabs, commas or semicolons, or it is empty")
    return rows


def _csv(text: str, separator: str, quoting: int) -> list[tuple[int, list[str]]] | None:
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, quoting=quoting, strict=True)
    try:
        return [(reader.line_num, row) for row in reader if any(map(str.strip, row))]
    except csv.Error:
        return None


def read_rewritten(path: Path) -> Captions:
    """Captions that generate_diffs.py --task rewrite wrote, a JSON a line with image and text; no file names."""
    entries: dict[str, tuple[str, list[str]]] = {}
    for where, entry in json_lines(path, ("image", "text")):
        texts = entries.setdefault(image_name(entry["image"], where, "image"), ("", []))[1]
        texts.append(words(entry["text"], where, "text", may_be_empty=True))
    return Captions(path, entries, Counter())


def open_coco(root: Path, split: str, missing: str = "error") -> Dataset:
    """COCO's layout: {root}/[annotations/]captions_{split}.json, pictures in {root}/{split}/.

    split: karpathy_test (_val, _train, _restval) is that of Karpathy's file, dataset_*.json in either folder, whose
    pictures are in {root}/val2014/ and {root}/train2014/. missing: as for `find_pictures`.
    """
    folders = (root / "annotations", root)
    if split.startswith("karpathy_"):
        files = [path for folder in folders for path in sorted(folder.glob("dataset_*.json"))]
        if len(files) != 1:
            raise NoSplit(f"{root} has {len(files)} of Karpathy's files dataset_*.json, and {split} takes one")
        captions = read_karpathy(files[0], split.removeprefix("karpathy_"))
        return _with_pictures("coco", split, split, files[0], captions, root, "", missing)
    path = next((p for folder in folders if (p := folder / f"captions_{split}.json").is_file()), None)
    if path is None:
        present = sorted(p.stem.removeprefix("captions_") for f in folders for p in f.glob("captions_*.json"))
        raise NoSplit(f"{root} has no captions_{split}.json; splits found there: {', '.join(present) or 'none'}")
    return _with_pictures("coco", split, split, path, read_coco_captions(path), root, split, missing)


def open_tsv(root: Path, split: str, missing: str = "error") -> Dataset:
    """A table of captions, and its pictures below {root}, in the folders where COCO's may be, or at whole paths.

    split: as for `find_list`; missing: as for `find_pictures`.
    """
    path, label = find_list(root, split, TABLES)
    return _with_pictures("tsv", label, split, path, read_table(path), root, path.stem, missing)


def _with_pictures(
    name: str, split: str, part: str, path: Path, captions: Captions, root: Path, inner: str, missing: str
) -> Dataset:
    """A data set of the captions in `path`, and of pictures that are looked for below `root`, in `inner` first."""
    folders = [str(folder) for folder in (root / inner, root / "images" / inner, root / "images", root)]
    pictures = find_pictures(
        captions, lambda key: [os.path.join(folder, captions[key][0]) for folder in folders], path, missing,
        f"Put them into {root / inner}, {OR_SKIP}",
    )  # fmt: skip
    ids = [key for key, file in pictures.files.items() if file is not None or missing == "keep"]
    kept = "" if missing == "keep" else " and left out"
    note = f"{pictures.absent} pictures named in {path.name} are absent{kept}" if pictures.absent else ""
    return Dataset(
        name=name,
        split=split,
        ids=ids,
        load=pictures.load(ids),
        fingerprint=digest(*pictures.stamps(ids)),
        captions=[captions[key][1] for key in ids] if any(texts for _, texts in captions.values()) else None,
        questions=_question(ids, captions.labels),
        note="; ".join(filter(None, (captions.note, note))),
        part=part,
        left_out=frozenset(captions) - frozenset(ids),
    )


def _question(ids: list[str], labels: dict[str, str]) -> tuple[Question, ...]:
    """Which class an image is of, where the file says so and there is more than one."""
    classes = sorted(set(labels.values()))
    if len(classes) < 2:
        return ()
    rows = np.array([row for row, key in enumerate(ids) if key in labels], dtype=np.int64)
    target = np.array([classes.index(labels[ids[row]]) for row in rows], dtype=np.int64)
    return (Question("class", tuple(name.replace("_", " ") for name in classes), rows, target),)
