"""Any folder of images; sub-folders are classes."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np

from pc_clip.datasets.dataset import IMAGE_SUFFIXES, Dataset, Question, digest, is_image_file, read_file, stat
from pc_clip.errors import UserError

SPLITS = {"train", "test", "val", "valid", "validation"}


def open_folder(root: Path, split: str) -> Dataset:
    """Any folder of images. Sub-folders are classes, named by the folder; without them there are none.

    split: a folder in it whose sub-folders are the classes, as ImageFolder trees often have.
    """
    label = f"{root.name}-{split}" if split else root.name
    if split:
        root = root / split
        if not root.is_dir():
            raise UserError(f"there is no folder {root} for the split {split!r}")
    elif found := sorted(p.name for p in root.iterdir() if p.is_dir() and p.name in SPLITS):
        raise UserError(f"{root} has a folder a split ({', '.join(found)}); say which with --split, as {found[0]}")
    files = sorted(p for p in root.rglob("*") if is_image_file(p, root))
    if not files:
        raise UserError(f"{root} holds no images ({', '.join(sorted(IMAGE_SUFFIXES))})")
    folders = [p.relative_to(root).parts[0] if p.parent != root else None for p in files]
    questions: tuple[Question, ...] = ()
    if any(folders):
        if not all(folders):
            loose = next(p for p, folder in zip(files, folders) if folder is None)
            raise UserError(
                f"{root} has images in class folders and beside them ({loose.name}); move those into a folder"
            )
        classes = sorted(set(folders))
        target = np.array([classes.index(folder) for folder in folders], dtype=np.int64)
        names = tuple(c.replace("_", " ") for c in classes)
        questions = (Question("class", names, np.arange(len(files)), target),)
    return Dataset(
        name="folder",
        split=label,
        part=split,
        ids=[str(p.relative_to(root)) for p in files],
        load=partial(read_file, files),
        fingerprint=digest(*[(str(p.relative_to(root)), *stat(p)) for p in files]),
        questions=questions,
    )
