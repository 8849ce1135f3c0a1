"""Hugging Face data sets on disk: folders of `save_to_disk`, and Parquet files with the images' bytes."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pc_clip.core.errors import UserError
from pc_clip.data.dataset import CAPTION_COLUMN, LABEL_COLUMNS, Dataset, NoSplit, Question, decode_image, digest

SAVED = ("dataset_dict.json", "dataset_info.json", "state.json")
PART = re.compile(r"(-\d+-of-\d+.*)?\.parquet$")  # what follows the split in a Parquet file's name


def open_huggingface(root: Path, split: str) -> Dataset:
    """One split of a data set on disk. Ids are row numbers.

    Its only column of images is read; captions are the columns caption, caption1, ..., title and text, of strings or
    lists of them; classes the column label, class or category. The note says which columns are not read, and counts
    images without caption or class. split: of a saved DatasetDict, or of Parquet files (SPLIT-00000-of-00001.parquet);
    empty where there is one. Raises UserError for other folders, a split that is absent or not named, and where
    nothing has a caption or class.
    """
    table = _saved(root, split) if any((root / name).is_file() for name in SAVED) else _parquet(root, split)
    columns = {name: type(feature).__name__ for name, feature in table.features.items()}
    pictures = [name for name, kind in columns.items() if kind == "Image"]
    texts = [name for name, f in table.features.items() if CAPTION_COLUMN.fullmatch(name) and _is_text(f)]
    label = next((name for name in LABEL_COLUMNS if columns.get(name) in ("ClassLabel", "Value")), None)
    if len(pictures) != 1 or not (texts or label):
        raise UserError(
            f"{root} needs one column of images, and columns of captions (caption, caption1, ..., title, text) or one "
            f"of classes ({', '.join(LABEL_COLUMNS)}); found {', '.join(f'{k} ({v})' for k, v in columns.items())}"
        )
    unread = [name for name in columns if name not in {*pictures, *texts, label}]
    captions = [_texts(row) for row in table.select_columns(texts)] if texts else None
    notes = [f"columns that are not read: {', '.join(unread)}"] if unread else []
    if captions and (empty := sum(not each for each in captions)):
        notes.append(f"{empty} images have no caption")
        if empty == len(captions):
            raise UserError(f"{root} has no caption in its columns {', '.join(texts)}")
    questions = _question(table, label) if label else ()
    if questions and (unlabelled := len(table) - len(questions[0].rows)):
        notes.append(f"{unlabelled} images have no class")
    files = [
        (str(f.relative_to(root)), *_stamp(f)) for f in sorted(root.rglob("*")) if f.suffix in (".arrow", ".parquet")
    ]
    return Dataset(
        name="huggingface",
        split=f"{root.resolve().name}-{split}" if split else root.resolve().name,
        part=split,
        ids=[str(row) for row in range(len(table))],
        load=partial(_load, table.select_columns(pictures), pictures[0], root),
        fingerprint=digest(files, split),
        captions=captions,
        questions=questions,
        note="; ".join(notes),
    )


def _stamp(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_size, status.st_mtime_ns


def _is_text(feature: Any) -> bool:
    """Strings, or lists of them."""
    return getattr(getattr(feature, "feature", feature), "dtype", "") in ("string", "large_string")


def _library() -> Any:
    try:
        import datasets
    except ImportError as error:
        raise UserError("data set huggingface needs the package datasets: pip install datasets") from error
    return datasets


def _undecoded(table: Any) -> Any:
    """The table with images as bytes: decoding is ours, whose errors name the row."""
    library = _library()
    for name, feature in table.features.items():
        if isinstance(feature, library.Image):
            table = table.cast_column(name, library.Image(decode=False))
    return table


def _saved(root: Path, split: str) -> Any:
    try:
        saved = _library().load_from_disk(str(root))
    except (OSError, ValueError) as error:
        raise UserError(f"{root} is not a complete folder of save_to_disk ({error})") from error
    if isinstance(saved, dict):
        if split not in saved:
            raise NoSplit(f"{root} has no split {split!r}; it has {', '.join(saved)}")
        return _undecoded(saved[split])
    if split:
        raise NoSplit(f"{root} is one split; leave --split (--data.split) empty: --split null")
    return _undecoded(saved)


def _parquet(root: Path, split: str) -> Any:
    splits: dict[str, list[str]] = {}
    for path in sorted(root.rglob("*.parquet")):
        splits.setdefault(PART.sub("", path.name), []).append(str(path))
    if not splits:
        raise NoSplit(f"{root} has no Parquet files, and is not a folder of save_to_disk")
    if split not in splits and (split or len(splits) > 1):
        raise NoSplit(f"{root} has no split {split!r}; it has {', '.join(splits)}")
    library, files = _library(), splits.get(split) or next(iter(splits.values()))
    try:
        return _undecoded(library.Dataset.from_parquet(files, cache_dir="data/cache/huggingface"))
    except (OSError, ValueError, library.exceptions.DatasetsError) as error:
        raise UserError(f"{files[0]} or another file of its split is not complete Parquet ({error})") from error


def _texts(row: dict[str, Any]) -> tuple[str, ...]:
    fields = [each for value in row.values() for each in (value if isinstance(value, list) else [value])]
    return tuple(" ".join(text.split()) for text in fields if isinstance(text, str) and text.strip())


def _question(table: Any, label: str) -> tuple[Question, ...]:
    """The class of each image, by the feature's own names or by the column's values."""
    values, names = table[label], getattr(table.features[label], "names", None)
    classes = list(names or sorted({str(value) for value in values if value is not None}))
    number = {name: n for n, name in enumerate(classes)}
    target = [value if names else number.get(str(value), -1) for value in values]
    rows = np.array([row for row, n in enumerate(target) if n is not None and n >= 0], dtype=np.int64)
    if len(classes) < 2 or not len(rows):
        return ()
    shown = tuple(name.replace("_", " ") for name in classes)
    return (Question("class", shown, rows, np.array([target[row] for row in rows], dtype=np.int64)),)


def _load(table: Any, column: str, root: Path, row: int) -> Image.Image:
    picture = table[row][column]
    if picture is None or picture["bytes"] is None:
        raise UserError(f"row {row} of {root} has no image bytes; save the data set with its images in it")
    return decode_image(picture["bytes"], f"row {row} of {root}")
