"""Animals with Attributes 2: 50 animals, and which of 85 attributes each has.

classes.txt and predicates.txt number the names; row n of predicate-matrix-binary.txt belongs to the class with
number n, column n to the predicate with number n; JPEGImages/CLASS/ has the images of a class.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np

from pc_clip.core.errors import UserError
from pc_clip.data import hash_split, text_tables
from pc_clip.data.classnames import class_names
from pc_clip.data.dataset import Dataset, Question, digest, is_image_file, read_file, stat
from pc_clip.data.layout import Layout

LAYOUT = Layout(
    ("Animals_with_Attributes2",),
    ("classes.txt", "predicates.txt", "predicate-matrix-binary.txt", "JPEGImages"),
)


def open_awa2(root: Path, split: str) -> Dataset:
    """All images, or a part of our own 90/10 split; `graded` says of each class which predicates it has (0 or 1)."""
    folder = LAYOUT.folder(root)
    own, graded = read_predicates(folder)
    images = folder / "JPEGImages"
    files = _images(images, own, folder / "classes.txt")
    ids = [path.relative_to(images).as_posix() for path in files]
    rows = hash_split.split_rows(ids, split)
    kept = [files[row] for row in rows]
    names = class_names("awa2")
    target = [own.index(path.parent.name) for path in kept]
    question = Question(
        "class", names.say(own), np.arange(len(kept)), np.array(target, dtype=np.int64),
        graded={predicate: dict(zip(names.say(own), values)) for predicate, values in graded.items()},
        several=names.several,
    )  # fmt: skip
    return Dataset(
        name="awa2",
        split=hash_split.split_label(split),
        ids=[ids[row] for row in rows],
        load=partial(read_file, kept),
        fingerprint=digest(split, sorted(graded.items()), *[(ids[row], *stat(files[row])) for row in rows]),
        questions=(question,),
        note=hash_split.split_note(split),
        part=split,
    )


def read_predicates(folder: Path) -> tuple[list[str], dict[str, list[float]]]:
    """The classes in the order of the alphabet, and predicate -> its value for each of them.

    The order of the files does not show in it: permuting classes or predicates in all of them changes nothing.
    """
    classes, predicates = text_tables.names(folder / "classes.txt"), text_tables.names(folder / "predicates.txt")
    path = folder / "predicate-matrix-binary.txt"
    values = text_tables.matrix(
        path, (len(classes), folder / "classes.txt"), (len(predicates), folder / "predicates.txt"), 0, 1
    )
    if between := np.argwhere((values != 0) & (values != 1)).tolist():
        row, column = between[0]
        raise UserError(f"{path}: {classes[row]}, {predicates[column]} is {values[row, column]:g}, neither 0 nor 1")
    by_name = {name: values[row] for row, name in enumerate(classes)}
    own = sorted(classes)
    return own, {p: [float(by_name[name][n]) for name in own] for n, p in sorted(enumerate(predicates), key=_second)}


def _second(pair: tuple[int, str]) -> str:
    return pair[1]


def _images(folder: Path, own: list[str], listed_in: Path) -> list[Path]:
    """The images of all classes, by name. Raises UserError for a class without images and a folder without a class."""
    there = sorted(p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
    if extra := [name for name in there if name not in own]:
        raise UserError(f"{folder / extra[0]} is a folder of images, but {listed_in} has no class {extra[0]!r}")
    found = []
    for name in own:
        mine = sorted(p for p in (folder / name).glob("*") if is_image_file(p, folder))
        if not mine:
            line = next(e.line for e in text_tables.numbered(listed_in).values() if e.value == name)
            raise UserError(f"{listed_in} line {line} names {name}, but {folder / name} holds no images")
        found += mine
    return found
