"""Data sets of labelled photographs: those that torchvision reads and downloads, CUB (2011), Animals with Attributes 2.

The classes are named by `classnames/`, joined by the set's own names.
CUB_200_2011: images.txt, image_class_labels.txt and train_test_split.txt share the numbers of the images; row n of
attributes/class_attribute_labels_continuous.txt is of the class that classes.txt numbers n, column n of the attribute
that attributes.txt (in attributes/, or beside the folder, as the archive has it) numbers n.
AwA2: row n of predicate-matrix-binary.txt is of the class that classes.txt numbers n, column n of the predicate that
predicates.txt numbers n; JPEGImages/CLASS/ has the images of a class.
"""

from __future__ import annotations

import csv
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas
from PIL import Image

from pc_clip.core.errors import UserError, nearest
from pc_clip.data.class_names import class_names
from pc_clip.data.dataset import IMAGE_SUFFIXES, Dataset, NoSplit, Question, digest
from pc_clip.data.picture_files import find_pictures
from pc_clip.data.text_files import read_text

# torchvision's class, and where it looks for the set below its root
KINDS = {
    "cifar10": ("CIFAR10", "cifar-10-batches-py"),
    "cifar100": ("CIFAR100", "cifar-100-python"),
    "mnist": ("MNIST", "MNIST/raw"),
    "eurosat": ("EuroSAT", "eurosat/2750"),
    "sun397": ("SUN397", "SUN397"),
    "flowers102": ("Flowers102", "flowers-102"),
    "food101": ("Food101", "food-101"),
}
ARRAYS = ("cifar10", "cifar100", "mnist")
SPLIT_BY_US = {"eurosat", "sun397", "awa2"}
SHARES = {"train": ("train-90pct", "nine tenths"), "test": ("test-10pct", "a tenth")}


def download_classified(name: str, root: Path) -> None:
    """Fetch and unpack a set, checked by torchvision's MD5. Raises UserError where that fails."""
    from pc_clip.models.torchvision_compat import torchvision

    try:
        getattr(torchvision.datasets, KINDS[name][0])(root, download=True)
    except (OSError, RuntimeError) as error:  # URLError is an OSError; RuntimeError: another checksum
        raise UserError(f"{name} was not fetched ({error}); give the same command again") from error


def open_classified(name: str, folder: Path, split: str) -> Dataset:
    """A set of KINDS in the folder of its files: the official split, or our own 90/10 split where it has none."""
    data = _read(name, folder, split)
    if name in ARRAYS:
        return _of_arrays(name, data, split)
    examples = [data[row] for row in range(len(data))]  # files and labels, since they are not loaded
    own = data.classes
    if name == "sun397":  # torchvision takes the letter before each away
        own = [f"/{class_name[0]}/{class_name}" for class_name in own]
    if name in SPLIT_BY_US and (empty := set(range(len(own))) - {label for _, label in examples}):
        raise UserError(f"{folder} has no images of {own[min(empty)]!r}; unpack the archive again")
    return photographs(name, split, folder, ((path, own[label]) for path, label in examples), own)


def _read(name: str, folder: Path, split: str) -> Any:
    """torchvision's data set, with paths for images."""
    from pc_clip.models.torchvision_compat import torchvision

    kind, inner = KINDS[name]
    depth = len(Path(inner).parts)
    try:
        if name == "eurosat":  # two layouts more than torchvision's own
            return torchvision.datasets.ImageFolder(folder, loader=Path)
        make, root = getattr(torchvision.datasets, kind), folder.resolve().parents[depth - 1]
        if name in ARRAYS:
            return make(root, train=split == "train")
        return make(root, loader=Path) if name == "sun397" else make(root, split, loader=Path)
    except (RuntimeError, ValueError, LookupError, TypeError, AssertionError, OSError) as error:
        raise UserError(
            f"{name} at {folder} is damaged, or not as it is published ({error}); fetch it again"
        ) from error


def _of_arrays(name: str, data: Any, split: str) -> Dataset:
    names, target = class_names(name), np.asarray(data.targets, dtype=np.int64)
    if len(data.data) != len(target):
        raise UserError(f"{name} has {len(data.data)} images and {len(target)} labels; fetch it again")
    pixels = hashlib.sha256(np.ascontiguousarray(data.data).tobytes()).hexdigest()
    question = Question("class", names.say(data.classes), np.arange(len(target)), target, several=names.several)
    return Dataset(
        name=name,
        split=split,
        ids=[str(row) for row in range(len(target))],
        load=partial(_load, data),
        fingerprint=digest(KINDS[name][0], split, len(target), pixels, target.tolist()),
        questions=(question,),
        part=split,
    )


def _load(data: Any, row: int) -> Image.Image:
    return data[row][0].convert("RGB")


def photographs(
    name: str, part: str, folder: Path, examples: Iterable[tuple[Path, str]], own: Sequence[str],
    graded: Mapping[str, Mapping[str, float]] | None = None,
) -> Dataset:  # fmt: skip
    """A data set of image files with a class each; an id is a file's path below `folder`.

    examples: files, each with the set's own name of its class, one of `own`. graded: attribute -> own name of a class
    -> how much of it. Of the sets in SPLIT_BY_US `part` is of our own split of all the files.
    Raises UserError for files that are not there, counted, and for a part without images.
    """
    labels = {path.relative_to(folder).as_posix(): label for path, label in examples}
    ours = name in SPLIT_BY_US
    ids = list(labels)
    if ours:
        ids.sort()
        ids = [ids[row] for row in split_rows(ids, part)]
    if not ids:
        raise UserError(f"{name} at {folder} has no image in its part {part!r}; unpack the archive again")
    pictures = find_pictures(ids, lambda key: [folder / key], folder, "error", "Unpack the archive again")
    names = class_names(name)
    display_name = dict(zip(own, names.say(own)))
    number = {class_name: n for n, class_name in enumerate(own)}
    target = np.array([number[labels[key]] for key in ids], dtype=np.int64)
    grades = {a: {display_name[c]: amount for c, amount in of_class.items()} for a, of_class in (graded or {}).items()}
    question = Question(
        "class", tuple(display_name.values()), np.arange(len(ids)), target, graded=grades, several=names.several
    )
    label, note = part, ""
    if ours and part in SHARES:
        label = f"{SHARES[part][0]}-seed0"
        note = f"{part} is {SHARES[part][1]} of the images, drawn by us with seed 0: not anyone else's split"
    return Dataset(
        name=name,
        split=label,
        ids=ids,
        load=pictures.load(ids),
        fingerprint=digest(part, list(own), target.tolist(), grades, pictures.stamps(ids)),
        questions=(question,),
        note=note,
        part=part,
    )


def split_rows(ids: Sequence[str], part: str) -> list[int]:
    """The rows of one part of a 90/10 split, in their order: part is "train", "test" or "all".

    Images are ordered by the SHA-256 of "0 {id}" (0 is the seed), and the first tenth of them (rounded, at least one)
    is test. So nothing depends on a random generator's version or on the order in which a file system lists files.
    """
    if part == "all":
        return list(range(len(ids)))
    order = sorted(range(len(ids)), key=lambda row: hashlib.sha256(f"0 {ids[row]}".encode()).digest())
    n_test = max(1, (len(ids) + 5) // 10)
    return sorted(order[:n_test] if part == "test" else order[n_test:])


# -- sets whose own files grade their classes by attributes, joined by name -----------------------------


def open_cub(folder: Path, split: str) -> Dataset:
    """The official split, or Reed's by class; `graded`: by class, in what share of answers people saw an attribute.

    split: train or test; trainvalclasses or testclasses for all images of the classes that the file of that name lists,
    which comes with the captions of Reed et al. (2016) and lies beside images.txt or in the folder above it.
    """
    if split not in (known := ("train", "test", "trainvalclasses", "testclasses")):
        raise NoSplit(f"cub has no split {split!r}. {nearest(split, known)}")
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
    if split.endswith("classes"):
        places = [folder / f"{split}.txt", folder.parent / f"{split}.txt"]
        listed = set(read_text(next((path for path in places if path.is_file()), places[0])).split())
        if unknown := listed - set(classes):
            raise UserError(f"{split}.txt lists {min(unknown)}, which classes.txt does not have")
        chosen = images[images["class"].isin(listed)].sort_values("file")
    else:
        chosen = images[images["train"] == ("1" if split == "train" else "0")].sort_values("file")
    places = [folder / "attributes/attributes.txt", folder / "attributes.txt", folder.parent / "attributes.txt"]
    attributes = _numbered(next((path for path in places if path.is_file()), places[0]))
    graded = _grades(folder / "attributes/class_attribute_labels_continuous.txt", classes, attributes, 100)
    examples = ((folder / "images" / file, label) for file, label in zip(chosen["file"], chosen["class"]))
    own = sorted(set(chosen["class"])) if split.endswith("classes") else sorted(classes)
    graded = {attribute: {name: of_class[name] for name in own} for attribute, of_class in graded.items()}
    return photographs("cub", split, folder / "images", examples, own, graded)


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


def _grades(path: Path, classes: pandas.Series, attributes: pandas.Series, most: int) -> dict[str, dict[str, float]]:
    """attribute -> class -> its share, 0 to 1, of a table whose rows and columns go by the numbers of the names."""
    table = _table(path, float)
    for names, count, what in ((classes, len(table), "rows"), (attributes, table.shape[1], "columns")):
        if sorted(names.index) != list(range(1, count + 1)):
            raise UserError(f"{path} has {count} {what}, which do not go with the numbers of {len(names)} names")
    if not (table.ge(0) & table.le(most) & (table.isin([0, 1]) if most == 1 else True)).all(axis=None):
        raise UserError(f"{path} has values that are not {'0 or 1' if most == 1 else f'from 0 to {most}'}")
    by_name = table.set_axis(classes.sort_index(), axis=0).set_axis(attributes.sort_index(), axis=1) / most
    return {attribute: by_name[attribute].sort_index().to_dict() for attribute in sorted(attributes)}
