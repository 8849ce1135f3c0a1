"""Caltech-UCSD Birds 200 (2011): 200 birds, and how often people saw each of 312 attributes in each.

images.txt, image_class_labels.txt and train_test_split.txt share the numbers of the images; classes.txt numbers
the classes, and line n of attributes/class_attribute_labels_continuous.txt belongs to the class with number n;
attributes.txt (in attributes/, or beside the folder as the archive has it) numbers that table's columns.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np

from pc_clip.core.errors import UserError
from pc_clip.data import text_tables
from pc_clip.data.classnames import class_names
from pc_clip.data.dataset import Dataset, Question, digest, read_file, stat_images
from pc_clip.data.layout import Layout

CONTINUOUS = "attributes/class_attribute_labels_continuous.txt"
LAYOUT = Layout(
    ("CUB_200_2011",),
    (
        "images.txt", "classes.txt", "image_class_labels.txt", "train_test_split.txt", "images", CONTINUOUS,
        "attributes/attributes.txt|attributes.txt|../attributes.txt",
    ),
)  # fmt: skip


def open_cub(root: Path, split: str) -> Dataset:
    """The official split; `graded` says of each class in what share of answers people saw an attribute (0 to 1)."""
    folder = LAYOUT.folder(root)
    classes = text_tables.names(folder / "classes.txt")
    images = _labelled_images(folder, classes)
    is_train = text_tables.numbered(folder / "train_test_split.txt")
    text_tables.same_numbers(folder / "images.txt", images, folder / "train_test_split.txt", is_train)
    for entry in is_train.values():
        if entry.value not in ("0", "1"):
            raise UserError(f"{folder / 'train_test_split.txt'} line {entry.line}: {entry.value!r} is neither 0 nor 1")
    wanted = "1" if split == "train" else "0"
    ids = sorted(entry.value for n, entry in images.items() if is_train[n].value == wanted)
    if not ids:
        raise UserError(f"{folder / 'train_test_split.txt'} puts no image into {split}")
    files = [folder / "images" / name for name in ids]
    own = sorted(classes)
    names = class_names("cub")
    target = [own.index(name.split("/")[0]) for name in ids]
    graded = read_attributes(folder, classes)
    question = Question(
        "class", names.say(own), np.arange(len(ids)), np.array(target, dtype=np.int64),
        graded={a: dict(zip(names.say(values), values.values())) for a, values in graded.items()},
        several=names.several,
    )  # fmt: skip
    return Dataset(
        name="cub",
        split=split,
        ids=ids,
        load=partial(read_file, files),
        fingerprint=digest(split, graded, *zip(ids, stat_images(files, folder / "images.txt"))),
        questions=(question,),
        part=split,
    )


def _labelled_images(folder: Path, classes: list[str]) -> dict[int, text_tables.Entry]:
    """images.txt, checked against the classes: an image's folder must be the class its label says."""
    path, labels_path = folder / "images.txt", folder / "image_class_labels.txt"
    images, labels = text_tables.numbered(path), text_tables.numbered(labels_path)
    text_tables.same_numbers(path, images, labels_path, labels)
    seen: dict[str, int] = {}
    for number, image in images.items():
        label = labels[number]
        if not label.value.isdecimal() or not 1 <= int(label.value) <= len(classes):
            raise UserError(f"{labels_path} line {label.line}: {label.value} is no number of {folder / 'classes.txt'}")
        name = classes[int(label.value) - 1]
        if image.value.split("/")[0] != name:
            raise UserError(
                f"{path} line {image.line} puts {image.value} into another class than "
                f"{labels_path} line {label.line}, which says {name}"
            )
        if image.value in seen:
            raise UserError(f"{path} line {image.line}: {image.value} stands already in line {seen[image.value]}")
        seen[image.value] = image.line
    if empty := set(classes) - {name.split("/")[0] for name in seen}:
        entry = next(e for e in text_tables.numbered(folder / "classes.txt").values() if e.value in empty)
        raise UserError(f"{folder / 'classes.txt'} line {entry.line}: {entry.value} has no images in {path}")
    return images


def read_attributes(folder: Path, classes: list[str]) -> dict[str, dict[str, float]]:
    """attribute -> class -> the share, 0 to 1, of answers that saw it. classes: by number, from 1."""
    places = [folder / "attributes" / "attributes.txt", folder / "attributes.txt", folder.parent / "attributes.txt"]
    path = next((p for p in places if p.is_file()), places[0])
    attributes = text_tables.names(path)
    percent = text_tables.matrix(
        folder / CONTINUOUS, (len(classes), folder / "classes.txt"), (len(attributes), path), 0, 100
    )
    rows = {name: percent[row] / 100 for row, name in enumerate(classes)}
    columns = {name: column for column, name in enumerate(attributes)}
    return {a: {name: float(rows[name][columns[a]]) for name in sorted(rows)} for a in sorted(columns)}
