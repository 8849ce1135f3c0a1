"""Files of pictures: which are there, and the files that list them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from stat import S_ISREG
from typing import NamedTuple

from PIL import Image

from pc_clip.core.errors import UserError
from pc_clip.data.dataset import NoSplit, digest, read_image

OR_SKIP = "or use only those that are there with --data.missing skip (--missing for run.py)"


class FoundFile(NamedTuple):
    path: str
    size: int
    modified: int  # ns


def first_file(places: Iterable[str | Path]) -> FoundFile | None:
    """The first file that is there."""
    for path in places:
        try:
            status = os.stat(path)
        except PermissionError:
            raise
        except (OSError, ValueError):  # ValueError: a name with a zero byte
            continue
        if S_ISREG(status.st_mode):
            return FoundFile(str(path), status.st_size, status.st_mtime_ns)
    return None


def read_file(files: Sequence[str | Path], row: int) -> Image.Image:
    """At module level, because worker processes get it pickled."""
    return read_image(files[row])


@dataclass(frozen=True)
class Pictures:
    """The files of some images, by id; None for one that is absent."""

    files: dict[str, FoundFile | None]
    places: Callable[[str], Sequence[str | Path]]

    @property
    def absent(self) -> int:
        return sum(file is None for file in self.files.values())

    def load(self, ids: Sequence[str]) -> Callable[[int], Image.Image]:
        """A loader of images by row. An absent one is an error that names its first expected path."""
        return partial(read_file, [file.path if (file := self.files[key]) else self.places(key)[0] for key in ids])

    def stamps(self, ids: Sequence[str]) -> list[tuple]:
        """Id, size and time of change of each file, for a fingerprint; of an absent one its id alone."""
        return [(key, *(self.files[key] or ())[1:]) for key in ids]


def find_pictures(
    ids: Iterable[str], places: Callable[[str], Sequence[str | Path]], source: Path, missing: str, get: str
) -> Pictures:
    """The pictures that the file `source` names.

    places: where the picture of an id may be; the first file that is there counts. missing: absent ones are an "error",
    or left out ("skip"), or kept until they are looked at ("keep", for embeddings that were made elsewhere); all of
    them absent are an error too, unless they are kept. get: how they are had.
    """
    pictures = Pictures({key: first_file(places(key)) for key in ids}, places)
    count = pictures.absent
    if count and (missing == "error" or (missing == "skip" and count == len(pictures.files))):
        first = next(key for key, file in pictures.files.items() if file is None)
        raise UserError(
            f"{count} of the {len(pictures.files)} pictures named in {source} are absent, first {places(first)[0]}. "
            f"{get}"
        )
    return pictures


def find_list(root: Path, split: str, endings: Sequence[str]) -> tuple[Path, str]:
    """A file that lists images, and how results call it.

    split: NAME for {root}/NAME with one of the endings, or the path of a file that lies anywhere. Such a one has six
    digits of its path in the label, so that results of two files of one name are kept apart.
    """
    usual = [root / f"{split}{ending}" for ending in endings]
    path = next((p for p in (*usual, Path(split), root / split) if is_list(p, endings)), None)
    if path is None:
        present = sorted({p.stem for p in root.glob("*") if is_list(p, endings)})
        file = split if split.lower().endswith(tuple(endings)) else f"{split}{endings[0]}"
        raise NoSplit(
            f"{root} has no {file}; found there: {', '.join(present) or 'none'}. One that lies elsewhere is named by "
            f"its path: --data.split FILE{endings[0]} (--split for run.py)."
        )
    named = next((p for ending in endings if (p := root / f"{path.stem}{ending}").is_file()), None)
    if named and named.samefile(path):
        return path, path.stem
    return path, f"{path.stem}-{digest(str(path.resolve()))[:6]}"


def is_list(path: Path, endings: Sequence[str]) -> bool:
    """Whether there is a file whose name has one of the endings."""
    return path.suffix.lower() in endings and path.is_file()
