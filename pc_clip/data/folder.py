"""Any folder of images; sub-folders are classes."""

from __future__ import annotations

import os
from collections import Counter
from functools import partial
from pathlib import Path
from stat import S_ISREG
from typing import NoReturn

import numpy as np
from PIL import Image

from pc_clip.core.errors import UserError
from pc_clip.data.dataset import Dataset, Question, digest, image_suffixes, read_image, unreadable

SPLITS = {"train", "test", "val", "valid", "validation"}
IGNORED = {"lost+found", "__MACOSX"}  # what systems put into folders, beside what is hidden


def open_folder(root: Path, split: str) -> Dataset:
    """Any folder of images. Sub-folders are classes, named by the folder; without them there are none.

    Where images lie beside the sub-folders there are no classes either, and the note says so. Where all lies in one
    folder of folders, that one is read. split: a folder in it whose sub-folders are the classes, in any case.
    Raises UserError for a split that is not there or not named, a class without images, and two classes of one name.
    """
    label = f"{root.name}-{split}" if split else root.name
    root = _split_folder(_unwrapped(root), split)
    files, others = _find_images(root)
    if not files:
        raise UserError(f"{root} holds no images ({', '.join(sorted(image_suffixes()))})")
    ids = [key for key, _ in files]
    notes = [f"{sum(others.values())} other files are not read ({', '.join(sorted(others))})"] if others else []
    folders = [key.split(os.sep)[0] if os.sep in key else None for key in ids]
    questions: tuple[Question, ...] = ()
    if any(folders) and not all(folders):
        notes.insert(
            0, f"{root} has images in folders and beside them ({ids[folders.index(None)]}), so no classes; "
            "to have them, move those into a folder",
        )  # fmt: skip
    elif any(folders):
        classes = sorted(path.name for path in _folders(root))
        if empty := sorted(set(classes) - set(folders)):
            raise UserError(f"{root} has no images in the class folders {', '.join(empty)}; fill or remove them")
        names = [name.replace("_", " ") for name in classes]
        if twice := [name for name, count in Counter(names).items() if count > 1]:
            raise UserError(f"two folders of {root} are both the class {twice[0]!r}; rename or join them")
        target = np.array([classes.index(folder) for folder in folders], dtype=np.int64)
        questions = (Question("class", tuple(names), np.arange(len(ids)), target),)
    return Dataset(
        name="folder",
        split=label,
        part=split,
        ids=ids,
        load=partial(_load, root, ids),
        fingerprint=digest(*[(key, status.st_size, status.st_mtime_ns) for key, status in files]),
        questions=questions,
        note="; ".join(notes),
    )


def _folders(root: Path) -> list[Path]:
    return sorted(p for p in root.iterdir() if p.is_dir() and not p.name.startswith(".") and p.name not in IGNORED)


def _unwrapped(root: Path) -> Path:
    """The one folder in `root` that holds folders, where there are no images beside it; else `root`."""
    inner = _folders(root)
    if len(inner) != 1 or inner[0].name.lower() in SPLITS or not _folders(inner[0]):
        return root
    return root if any(path.suffix.lower() in image_suffixes() for path in root.iterdir()) else inner[0]


def _split_folder(root: Path, split: str) -> Path:
    """The folder of a split, in any case, or `root` where none is asked for and none is there."""
    splits = {path.name.lower(): path for path in _folders(root) if path.name.lower() in SPLITS}
    if split:
        folder = root / split if (root / split).is_dir() else splits.get(split.lower())
        if folder is None:
            raise UserError(
                f"there is no folder {root / split} for the split {split!r}; for none, --split null (--data.split null)"
            )
        return folder
    if splits:
        names = [path.name for path in splits.values()]
        raise UserError(
            f"{root} has a folder a split ({', '.join(names)}); say which with --split (--data.split), as {names[0]}"
        )
    return root


def _find_images(root: Path) -> tuple[list[tuple[str, os.stat_result]], Counter[str]]:
    """Every image below a folder that is not hidden, by its path from there, in order; and other files by ending.

    Links to folders are followed. Each file is looked at once: there may be millions of them, on a disk far away.
    """
    images, others = [], Counter()
    for folder, inner, names in os.walk(root, onerror=_refuse, followlinks=True):
        inner[:] = [name for name in inner if not name.startswith(".") and name not in IGNORED]
        for path in (os.path.join(folder, name) for name in inner if os.path.islink(os.path.join(folder, name))):
            if f"{os.path.realpath(folder)}{os.sep}".startswith(f"{os.path.realpath(path)}{os.sep}"):
                raise UserError(f"the link {path} leads back to a folder that it lies in; remove it")
        below = os.path.relpath(folder, root)
        for name in (name for name in names if not name.startswith(".")):
            ending = os.path.splitext(name)[1].lower()
            path = os.path.join(folder, name)
            status = os.stat(path) if ending in image_suffixes() and os.path.exists(path) else None
            if status and S_ISREG(status.st_mode):
                images.append((name if below == os.curdir else os.path.join(below, name), status))
            else:
                others[ending or "without ending"] += 1
    return sorted(images, key=lambda each: each[0].split(os.sep)), others


def _refuse(error: OSError) -> NoReturn:
    raise unreadable(error.filename, error) from error


def _load(root: Path, ids: list[str], row: int) -> Image.Image:
    return read_image(root / ids[row])
