"""Any folder of images; sub-folders are classes."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from stat import S_ISREG
from typing import NoReturn

import numpy as np
from PIL import Image

from pc_clip.core.errors import UserError
from pc_clip.data.dataset import IMAGE_SUFFIXES, Dataset, Question, digest, read_image, unreadable

SPLITS = {"train", "test", "val", "valid", "validation"}


def open_folder(root: Path, split: str) -> Dataset:
    """Any folder of images. Sub-folders are classes, named by the folder; without them there are none.

    Where images lie beside the sub-folders there are no classes either, and the note says so. split: a folder in it
    whose sub-folders are the classes, as ImageFolder trees often have.
    Raises UserError for a split that is not there or not named, for a folder without images or that may not be read.
    """
    label = f"{root.name}-{split}" if split else root.name
    if split:
        root = root / split
        if not root.is_dir():
            raise UserError(
                f"there is no folder {root} for the split {split!r}; for none, --split null (--data.split null)"
            )
    elif found := sorted(p.name for p in root.iterdir() if p.is_dir() and p.name in SPLITS):
        raise UserError(
            f"{root} has a folder a split ({', '.join(found)}); say which with --split (--data.split), as {found[0]}"
        )
    found = _find_images(root)
    if not found:
        raise UserError(f"{root} holds no images ({', '.join(sorted(IMAGE_SUFFIXES))})")
    ids = [key for key, _ in found]
    folders = [key.split(os.sep)[0] if os.sep in key else None for key in ids]
    questions: tuple[Question, ...] = ()
    note = ""
    if any(folders) and not all(folders):
        note = (
            f"{root} has images in folders and beside them ({ids[folders.index(None)]}), so no classes; "
            "to have them, move those into a folder"
        )
    elif any(folders):
        classes = sorted(set(folders))
        number = {name: n for n, name in enumerate(classes)}
        target = np.array([number[folder] for folder in folders], dtype=np.int64)
        names = tuple(c.replace("_", " ") for c in classes)
        questions = (Question("class", names, np.arange(len(ids)), target),)
    return Dataset(
        name="folder",
        split=label,
        part=split,
        ids=ids,
        load=partial(_load, root, ids),
        fingerprint=digest(*[(key, state.st_size, state.st_mtime_ns) for key, state in found]),
        questions=questions,
        note=note,
    )


def _find_images(root: Path) -> list[tuple[str, os.stat_result]]:
    """Every image below a folder that is not hidden, by its path from there, in order of the path's parts.

    Each file is looked at once: there may be millions of them, on a disk far away.
    """
    found = []
    for folder, names in _walk(root):
        below = os.path.relpath(folder, root)
        for name in names:
            if os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES and not name.startswith("."):
                path = os.path.join(folder, name)
                with contextlib.suppress(FileNotFoundError):  # a link to nowhere
                    if S_ISREG((state := os.stat(path)).st_mode):
                        found.append((name if below == os.curdir else os.path.join(below, name), state))
    return sorted(found, key=lambda each: each[0].split(os.sep))


def _walk(root: Path) -> Iterator[tuple[str, list[str]]]:
    """Folders that are not hidden, and what is in each. Links to folders are followed, but not back to where one is.

    Raises UserError for a folder that may not be read.
    """
    above = {str(root): {_place(root)}}  # folder -> what it and the folders it was reached through are on the disk
    for folder, inner, names in os.walk(root, onerror=_refuse, followlinks=True):
        here, kept = above.pop(folder), []
        for name in inner:
            if name.startswith(".") or name == "lost+found":  # the latter is root's alone, on a disk of its own
                continue
            path = os.path.join(folder, name)
            if (place := _place(path)) not in here:
                above[path] = here | {place}
                kept.append(name)
        inner[:] = kept
        yield folder, names


def _place(folder: str | Path) -> tuple[int, int]:
    try:
        state = os.stat(folder)
    except OSError as error:
        _refuse(error)
    return state.st_dev, state.st_ino


def _refuse(error: OSError) -> NoReturn:
    raise unreadable(Path(error.filename), error) from error


def _load(root: Path, ids: list[str], row: int) -> Image.Image:
    return read_image(root / ids[row])
