"""Data sets of labelled photographs: those that torchvision reads and downloads, and what their readers share.

The classes are named by `classnames/`, joined by the set's own names.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pc_clip.core.errors import UserError
from pc_clip.data import hash_split
from pc_clip.data.class_text import class_names
from pc_clip.data.dataset import Dataset, Question, digest, first_file, read_file

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
SPLIT_BY_US = ("eurosat", "sun397")


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
    pairs = [data[row] for row in range(len(data))]  # files and labels, since they are not loaded
    own = data.classes
    if name == "sun397":  # torchvision takes the letter before each away
        own = [f"/{class_name[0]}/{class_name}" for class_name in own]
    if name in SPLIT_BY_US and (empty := set(range(len(own))) - {label for _, label in pairs}):
        raise UserError(f"{folder} has no images of {own[min(empty)]!r}; unpack the archive again")
    return photographs(name, split, folder, [Path(p) for p, _ in pairs], [own[k] for _, k in pairs], own)


def _read(name: str, folder: Path, split: str) -> Any:
    """torchvision's data set, with paths for images."""
    from pc_clip.models.torchvision_compat import torchvision

    kind, inner = KINDS[name]
    depth = len(Path(inner).parts)
    if name != "eurosat" and folder.resolve().parts[-depth:] != Path(inner).parts:
        raise UserError(f"{folder} must be called {inner}, as the archive has it; rename it")
    try:
        if name == "eurosat":  # two layouts more than torchvision's own
            return torchvision.datasets.ImageFolder(folder, loader=Path)
        make, root = getattr(torchvision.datasets, kind), folder.resolve().parents[depth - 1]
        if name in ARRAYS:
            return make(root, train=split == "train")
        return make(root, loader=Path) if name in SPLIT_BY_US else make(root, split, loader=Path)
    except (RuntimeError, ValueError, LookupError, TypeError, AssertionError, OSError) as error:
        what = str(error).split(". You can use")[0].split(". Supp")[0]
        raise UserError(f"{name} at {folder} is damaged, or not as it is published ({what}); fetch it again") from error


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
    name: str, part: str, folder: Path, files: Sequence[Path], labels: Sequence[str], own: Sequence[str],
    graded: Mapping[str, Mapping[str, float]] | None = None, split_by_us: bool = False,
) -> Dataset:  # fmt: skip
    """A data set of image files with a class each; an id is a file's path below `folder`.

    labels: of each file, the set's own name of its class, one of `own`. graded: attribute -> own name of a class ->
    how much of it. split_by_us: whether `part` is of our own 90/10 split of all the files.
    Raises UserError for files that are not there, counted, and for a part without images.
    """
    ours = split_by_us or name in SPLIT_BY_US
    rows = list(range(len(files)))
    ids = [path.relative_to(folder).as_posix() for path in map(Path, files)]
    if ours:
        rows.sort(key=ids.__getitem__)
        rows = [rows[n] for n in hash_split.split_rows([ids[row] for row in rows], part)]
    if not rows:
        raise UserError(f"{name} at {folder} has no image in its part {part!r}; unpack the archive again")
    there = [first_file([files[row]]) for row in rows]
    if absent := [files[row] for row, file in zip(rows, there) if file is None]:
        raise UserError(
            f"{len(absent)} of the {len(rows)} images that {name} lists are absent, first {absent[0]}; "
            "unpack the archive again"
        )
    names, ids = class_names(name), [ids[row] for row in rows]
    said = dict(zip(own, names.say(own)))
    number = {class_name: n for n, class_name in enumerate(own)}
    target = np.array([number[labels[row]] for row in rows], dtype=np.int64)
    grades = {a: {said[c]: amount for c, amount in of_class.items()} for a, of_class in (graded or {}).items()}
    question = Question(
        "class", tuple(said.values()), np.arange(len(rows)), target, graded=grades, several=names.several
    )
    return Dataset(
        name=name,
        split=hash_split.split_label(part) if ours else part,
        ids=ids,
        load=partial(read_file, [files[row] for row in rows]),
        fingerprint=digest(part, list(own), target.tolist(), grades, [(key, *f[1:]) for key, f in zip(ids, there)]),
        questions=(question,),
        note=hash_split.split_note(part) if ours else "",
        part=part,
    )
