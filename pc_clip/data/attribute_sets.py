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
from pc_clip.data.dataset import IMAGE_SUFFIXES, Dataset

Grades = dict[str, dict[str, float]]


def open_cub(folder: Path, split: str) -> Dataset:
    """The official split; `graded` says of each class in what share of answers people saw an attribute (0 to 1)."""
    classes = _numbered(folder / "classes.txt")
    files = {"file": "images.txt", "label": "image_class_labels.txt", "train": "train_test_split.txt"}
    images = pandas.DataFrame({column: _numbered(folder / name, column == "file") for column, name in files.items()})
    images["class"] = images["label"].map({str(number): name for number, name in classes.items()})
    images["fits"] = (images["class"] == images["file"].str.split("/").str[0]) & images["train"].isin(["0", "1"])
    for number, image in images[~images["fits"]].iterrows():
        raise UserError(
            f"{folder}: image {number} is {image['file']} in images.txt, has the label {image['label']} in "
            f"image_class_labels.txt, which classes.txt calls {image['class']}, and {image['train']} (0 or 1) in "
            "train_test_split.txt; its class must be its folder's"
        )
    if without := set(classes) - set(images["class"]):
        raise UserError(f"{folder / 'images.txt'} has no images of {min(without)}, which is in classes.txt")
    chosen = images[images["train"] == ("1" if split == "train" else "0")].sort_values("file")
    places = [folder / "attributes/attributes.txt", folder / "attributes.txt", folder.parent / "attributes.txt"]
    attributes = _numbered(next((path for path in places if path.is_file()), places[0]))
    graded = _grades(folder / "attributes/class_attribute_labels_continuous.txt", classes, attributes, 100)
    examples = ((folder / "images" / file, label) for file, label in zip(chosen["file"], chosen["class"]))
    return photographs("cub", split, folder / "images", examples, sorted(classes), graded)


def open_awa2(folder: Path, split: str) -> Dataset:
    """All images, or a part of our own 90/10 split; `graded` says of each class which predicates it has (0 or 1)."""
    classes = _numbered(folder / "classes.txt")
    graded = _grades(folder / "predicate-matrix-binary.txt", classes, _numbered(folder / "predicates.txt"), 1)
    images = folder / "JPEGImages"
    files = [path for path in images.glob("[!.]*/[!.]*") if path.suffix.lower() in IMAGE_SUFFIXES]
    if one_sided := {path.parent.name for path in files} ^ set(classes):
        raise UserError(f"images of {min(one_sided)!r} are in one alone of {images} and {folder / 'classes.txt'}")
    return photographs("awa2", split, images, ((path, path.parent.name) for path in files), sorted(classes), graded)


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
    if not (table.ge(0) & table.le(most) & (table.isin([0, 1]) if most == 1 else True)).all(axis=None):
        raise UserError(f"{path} has values that are not {'0 or 1' if most == 1 else f'from 0 to {most}'}")
    by_name = table.set_axis(classes.sort_index(), axis=0).set_axis(attributes.sort_index(), axis=1) / most
    return {attribute: by_name[attribute].sort_index().to_dict() for attribute in sorted(attributes)}
