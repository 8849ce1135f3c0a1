"""EXIF orientation: apply it, and count the rotated images."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
from PIL import Image, ImageOps
from tqdm import tqdm

from pc_clip.core import cache
from pc_clip.core.errors import UserError
from pc_clip.data.dataset import Dataset, digest
from pc_clip.data.picture_files import read_file

ORIENTATION, AS_STORED = 0x112, (None, 0, 1)


def upright(data: Dataset) -> Dataset:
    """The same images, those turned that EXIF says are stored otherwise than shown; the note counts them.

    Only headers are read, once for as long as the files stay as they are. Raises UserError where pictures are in no
    files of their own.
    """
    if getattr(data.load, "func", None) is not read_file:
        raise UserError(f"data.upright (--upright for run.py) turns pictures in files, and {data.label} has none")
    files = data.load.args[0]

    def look() -> dict[str, np.ndarray]:
        bar = tqdm(files, f"reading EXIF of {data.label}", unit=" images", leave=False, disable=None)
        return {"rows": np.array([row for row, file in enumerate(bar) if _is_turned(file)], dtype=np.int64)}

    rows = cache.cached("turned", {"images": data.fingerprint}, look)["rows"]
    if not len(rows):
        return data
    note = f"{len(rows)} pictures are turned upright, as their EXIF says (--data.upright, --upright)"
    return dataclasses.replace(
        data,
        load=partial(_load, data.load, frozenset(rows.tolist())),
        fingerprint=digest(data.fingerprint, "upright"),
        note="; ".join(filter(None, (data.note, note))),
    )


def _is_turned(file: str) -> bool:
    try:
        with Image.open(file) as image:
            return image.getexif().get(ORIENTATION) not in AS_STORED
    except (OSError, ValueError, SyntaxError):  # decoding it gives the error
        return False


def _load(load: Callable[[int], Image.Image], turned: Sequence[int], row: int) -> Image.Image:
    image = load(row)
    return ImageOps.exif_transpose(image) if row in turned else image
