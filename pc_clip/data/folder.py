"""Any folder of images; sub-folders are classes."""

from __future__ import annotations

import os
from collections import Counter
from functools import partial
from pathlib import Path
from stat import S_ISREG
from typing import NoReturn

import numpy as np

from pc_clip.core.errors import UserError
from pc_clip.data.dataset import IMAGE_SUFFIXES, Dataset, Question, digest, unreadable
from pc_clip.data.picture_files import read_file

SPLITS = {"train", "test", "val", "valid", "validation"}
IGNORED = {"lost+found", "__MACOSX"}  # folders that systems make, besides hidden ones


def open_folder(root: Path, split: str) -> Dataset:
    """Any folder of images. Sub-folders are classes, named by the folder; there are none where there is no choice.

    Where images lie beside the sub-folders there are no classes either, and the note says so. split: a folder in it
    whose sub-folders are the classes.
    Raises UserError for a split that is not there or not named, a class without images, and two classes of one name.
    """
    label = f"{root.name}-{split}" if split else root.name
    root = root / split
    if not root.is_dir():
        raise UserError(
            f"there is no folder {root} for the split {split!r}; for none, --split null (--data.split null)"
        )
    folders = sorted(p.name for p in root.iterdir() if p.is_dir() and not _is_ignored(p.name))
    if splits := [name for name in folders if name.lower() in SPLITS]:
        raise UserError(
            f"{root} has a folder a split ({', '.join(splits)}); say which with --split (--data.split), as {splits[0]}"
        )
    files, others = _find_images(root)
    if not files:
        raise UserError(f"{root} holds no images ({', '.join(sorted(IMAGE_SUFFIXES))})")
    paths = [os.path.join(root, key) for key, _ in files]
    ids = [os.fsencode(key).decode("utf-8", "backslashreplace") for key, _ in files]  # a name may be no UTF-8
    notes = [f"{sum(others.values())} other files are not read ({', '.join(sorted(others))})"] if others else []
    classes = [key.split(os.sep)[0] if os.sep in key else None for key in ids]
    questions: tuple[Question, ...] = ()
    if any(classes) and (None in classes or len(folders) == 1):
        what = f"and beside them ({ids[classes.index(None)]})" if None in classes else f"of {folders[0]} alone"
        notes.insert(0, f"{root} has images in folders {what}, so no classes; to have them, put each into a folder")
    elif any(classes):
        folders = [name for name in folders if name in classes or name != "annotations"]  # COCO's, beside its images
        if empty := sorted(set(folders) - set(classes)):
            raise UserError(f"{root} has no images in the class folders {', '.join(empty)}; fill or remove them")
        names = [name.replace("_", " ") for name in folders]
        if len(set(names)) < len(names):
            twice = Counter(names).most_common(1)[0][0]
            raise UserError(f"two folders of {root} are both the class {twice!r}; rename or join them")
        target = np.array([folders.index(name) for name in classes], dtype=np.int64)
        questions = (Question("class", tuple(names), np.arange(len(ids)), target),)
    return Dataset(
        name="folder",
        split=label,
        part=split,
        ids=ids,
        load=partial(read_file, paths),
        fingerprint=digest(*[(key, status.st_size, status.st_mtime_ns) for key, status in files]),
        questions=questions,
        note="; ".join(notes),
    )


def _is_ignored(name: str) -> bool:
    return name.startswith(".") or name in IGNORED


def _find_images(root: Path) -> tuple[list[tuple[str, os.stat_result]], Counter[str]]:
    """Every image below a folder that is not hidden, by its path from there, in order; and other files by ending.

    Links to folders are followed. Each file is looked at once: there may be millions of them, on a disk far away.
    """
    images, others, seen = [], Counter(), set()
    for folder, inner, names in os.walk(root, onerror=_refuse, followlinks=True):
        inner[:] = [name for name in inner if not _is_ignored(name)]
        if (real := os.path.realpath(folder)) in seen:
            raise UserError(f"{folder} leads to {real}, which is read already; remove the link")
        seen.add(real)
        below = "" if folder == str(root) else os.path.relpath(folder, root) + os.sep
        for name in (name for name in names if not name.startswith(".")):
            ending = os.path.splitext(name)[1].lower()
            path = os.path.join(folder, name)
            status = os.stat(path) if ending in IMAGE_SUFFIXES and os.path.exists(path) else None
            if status and S_ISREG(status.st_mode):
                images.append((below + name, status))
            else:
                others[ending or "without ending"] += 1
    return sorted(images, key=lambda each: each[0].split(os.sep)), others


def _refuse(error: OSError) -> NoReturn:
    raise unreadable(error.filename, error) from error
