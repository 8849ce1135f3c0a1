"""Sets whose own files grade their classes by attributes, joined by name: CUB (2011), and Animals with Attributes 2.

CUB_200_2011: images.txt, image_class_labels.txt and train_test_split.txt share the numbers of the images; row n of
attributes/class_attribute_labels_continuous.txt is of the class that classes.txt numbers n, column n of the attribute
that attributes.txt (in attributes/, or beside the folder, as the archive has it) numbers n.
AwA2: row n of predicate-matrix-binary.txt is of the class that classes.txt numbers n, column n of the predicate that
predicates.txt numbers n; JPEGImages/CLASS/ has the images of a class.
"""

from __future__ import annotations

import csv
from pathlib import Path

import pandas

from pc_clip.core.errors import UserError
from pc_clip.data.classification import photographs
from pc_clip.data.dataset import Dataset, image_suffixes

CONTINUOUS = "attributes/class_attribute_labels_continuous.txt"
Grades = dict[str, dict[str, float]]


def open_cub(folder: Path, split: str) -> Dataset:
    """The official split; `graded` says of each class in what share of answers people saw an attribute (0 to 1)."""
    classes = _numbered(folder / "classes.txt")
    images = _joined(folder, classes)
    chosen = images[images["train"] == ("1" if split == "train" else "0")].sort_values("file")
    places = [folder / "attributes/attributes.txt", folder / "attributes.txt", folder.parent / "attributes.txt"]
    attributes = _numbered(next((path for path in places if path.is_file()), places[0]))
    graded = _grades(folder / CONTINUOUS, classes, attributes, 100)
    files = [folder / "images" / name for name in chosen["file"]]
    data = photographs("cub", split, folder / "images", files, list(chosen["class"]), sorted(classes), graded)
    return data


def _joined(folder: Path, classes: pandas.Series) -> pandas.DataFrame:
    """file, class and train ("0" or "1") of each image, by its number."""
    names = {"file": "images.txt", "label": "image_class_labels.txt", "train": "train_test_split.txt"}
    columns = {column: _numbered(folder / name, column == "file") for column, name in names.items()}
    images = pandas.DataFrame(columns)
    if images.isna().any(axis=None):
        number, column = images.isna().stack().idxmax()
        raise UserError(f"{folder / names[column]} has no line for image {number}, which another of its files has")
    images["class"] = images["label"].map(lambda label: classes.get(int(label) if label.isdecimal() else 0))
    if (wrong := images[images["class"] != images["file"].str.split("/").str[0]]).size:
        row = wrong.iloc[0]
        raise UserError(
            f"{folder / names['label']} gives {row['file']} the label {row['label']}, which classes.txt calls "
            f"{row['class']}: another class than its folder's"
        )
    if (wrong := images[~images["train"].isin(["0", "1"])]).size:
        row = wrong.iloc[0]
        raise UserError(f"{folder / names['train']}: {row['file']} has {row['train']!r}, which is neither 0 nor 1")
    if without := set(classes) - set(images["class"]):
        raise UserError(f"{folder / 'images.txt'} has no images of {min(without)}, which is in classes.txt")
    return images


def open_awa2(folder: Path, split: str) -> Dataset:
    """All images, or a part of our own 90/10 split; `graded` says of each class which predicates it has (0 or 1)."""
    classes = _numbered(folder / "classes.txt")
    graded = _grades(folder / "predicate-matrix-binary.txt", classes, _numbered(folder / "predicates.txt"), 1)
    images, own = folder / "JPEGImages", sorted(classes)
    folders = {path.name for path in images.iterdir() if path.is_dir() and not path.name.startswith(".")}
    files = [
        path
        for name in own
        for path in sorted((images / name).glob("*"))
        if path.suffix.lower() in image_suffixes() and not path.name.startswith(".")
    ]
    if one_sided := folders ^ set(own) or set(own) - {path.parent.name for path in files}:
        raise UserError(f"images of {min(one_sided)!r} are in one alone of {images} and {folder / 'classes.txt'}")
    return photographs("awa2", split, images, files, [p.parent.name for p in files], own, graded, split_by_us=True)


def _table(path: Path, kind: type) -> pandas.DataFrame:
    try:
        return pandas.read_csv(
            path, sep=r"\s+", header=None, dtype=kind, keep_default_na=False, quoting=csv.QUOTE_NONE, encoding="utf-8"
        )
    except (OSError, ValueError) as error:  # pandas' own errors and that of another encoding are ValueErrors
        raise UserError(f"{path} cannot be read ({error}); unpack the archive again") from error


def _numbered(path: Path, distinct: bool = True) -> pandas.Series:
    """Lines "NUMBER VALUE": the values by their numbers. distinct: whether no value may come twice."""
    table = _table(path, str)
    if table.shape[1] != 2 or table.isna().any(axis=None) or not table[0].str.isdecimal().all():
        raise UserError(f"{path} must have a number and a name in each line")
    table[0] = table[0].astype(int)
    for column in (0, 1) if distinct else (0,):
        if (again := table[column][table[column].duplicated()]).size:
            raise UserError(f"{path} has {again.iloc[0]} in two lines")
    return table.set_index(0)[1]


def _grades(path: Path, classes: pandas.Series, attributes: pandas.Series, most: int) -> Grades:
    """attribute -> class -> its share, 0 to 1, of a table whose rows and columns go by the numbers of the names."""
    table = _table(path, float)
    for names, count, what in ((classes, len(table), "rows"), (attributes, table.shape[1], "columns")):
        if sorted(names.index) != list(range(1, count + 1)):
            raise UserError(f"{path} has {count} {what}, which do not go with the numbers of {len(names)} names")
    if not table.map(lambda value: 0 <= value <= most and (most > 1 or value in (0, 1))).all(axis=None):
        raise UserError(f"{path} has values that are not {'0 or 1' if most == 1 else f'from 0 to {most}'}")
    by_name = table.set_axis(classes.sort_index(), axis=0).set_axis(attributes.sort_index(), axis=1) / most
    return {attribute: by_name[attribute].sort_index().to_dict() for attribute in sorted(attributes)}
