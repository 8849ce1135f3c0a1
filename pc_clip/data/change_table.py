"""What the readers of changes have in common: files of JSON read strictly, and the data set of the pairs they name."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from pc_clip.core.errors import UserError
from pc_clip.data.dataset import Change, Dataset, FoundFile, digest, first_file, read_image


class NoSplit(UserError):
    """The data set is there, and a split of it is not."""


class Source(NamedTuple):
    """Where changes were read. split: as results name it; part: as it was asked for. path: the file that lists them.

    get: how its pictures are had, for the error where some are absent.
    """

    name: str
    split: str
    part: str
    path: Path
    get: str


# -- files ---------------------------------------------------------------------------------------------


def find(folders: Iterable[Path], names: Iterable[str], splits: Iterable[str]) -> Path:
    """The first of some files in the first folder that has one.

    Raises NoSplit that says which of `splits` have a file there.
    """
    folders, names = list(folders), list(names)
    path = next((folder / name for folder in folders for name in names if (folder / name).is_file()), None)
    if path is None:
        present = [split for split in splits if any((folder / f"{split}.json").is_file() for folder in folders)]
        raise NoSplit(f"{folders[0]} has no {names[0]}; splits found there: {', '.join(present) or 'none'}")
    return path


def read_json(path: Path, kind: type) -> Any:
    """The content of a file, a list or a dict as `kind` says. Raises UserError for another and for what is no JSON."""
    if not path.is_file():
        raise UserError(f"no file at {path}; unpack the archive again")
    try:
        content = json.loads(path.read_bytes().decode("utf-8-sig"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not JSON ({error}); fetch it again, it may have been cut short") from error
    if not isinstance(content, kind):
        wanted = "a list" if kind is list else "an object"
        raise UserError(f"{path} must hold {wanted}, found {json.dumps(content)[:60]}; fetch it again")
    if not content:
        raise UserError(f"{path} is empty; fetch it again")
    return content


def read_entries(path: Path, keys: tuple[str, ...]) -> list[tuple[str, dict[str, Any]]]:
    """A list of objects that have `keys`, each with where it stands. Raises UserError that counts from 1."""
    found = [(f"{path}, entry {n}", entry) for n, entry in enumerate(read_json(path, list), 1)]
    for where, entry in found:
        if not isinstance(entry, dict):
            raise UserError(f"{where} must be an object with {', '.join(keys)}, found {str(entry)[:60]!r}")
        if lacking := [key for key in keys if key not in entry]:
            raise UserError(f"{where} has no {', '.join(lacking)}: {json.dumps(entry)[:80]}")
    return found


def image_name(value: object, where: str, key: str) -> str:
    """The name of an image, or its number. Raises UserError for anything else."""
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str) or not value.strip():
        raise UserError(f"{where}: {key} must name an image, found {str(value)[:60]!r}")
    return value.strip()


def sentences(value: object, where: str, key: str) -> tuple[str, ...]:
    """Texts with single spaces. Those without a word are left out, so that none may be left.

    Raises UserError for anything but a list of texts, and for an empty one.
    """
    if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
        raise UserError(f"{where}: {key} must be a list of texts, found {str(value)[:60]!r}")
    if not value:
        raise UserError(f"{where}: {key} is empty; say what changed, or remove it")
    whole = (text.encode("utf-8", "replace").decode() for text in value)  # JSON may hold half a surrogate pair
    return tuple(text for text in (" ".join(text.split()) for text in whole) if text)


# -- the data set --------------------------------------------------------------------------------------


def data_set(
    source: Source, changes: list[Change], places: Callable[[str], list[str]], missing: str, *notes: str
) -> Dataset:
    """Changes, and the images that they name, each once.

    places: where the picture of an id may be, the first that is there counts. missing: an absent picture is an "error",
    or the changes that name it are left out ("skip"), or it is kept until it is looked at ("keep"). notes: what the
    reader found; a change without words and one that was there before, word for word, are left out and counted.
    Raises UserError where no change is left.
    """
    told, counted = _told(source.path, changes)
    files = {key: first_file(places(key)) for change in told for key in (change.before, change.after)}
    absent = [key for key, file in files.items() if file is None]
    kept = [c for c in told if files[c.before] and files[c.after]] if missing == "skip" else told
    if absent and missing != "keep" and (missing == "error" or not kept):
        raise _absent(source, absent, files, told, places)
    ids = list(dict.fromkeys(key for change in kept for key in (change.before, change.after)))
    if absent:
        without = f", and {len(told) - len(kept)} of {len(told)} changes left out" if missing == "skip" else ""
        counted.append(f"{len(absent)} pictures named in {source.path.name} are absent{without}")
    return Dataset(
        name=source.name,
        split=source.split,
        ids=ids,
        load=partial(_read, [file.path if (file := files[key]) else places(key)[0] for key in ids]),
        fingerprint=digest([(key, *(files[key] or ())[1:]) for key in ids], kept),
        note="; ".join(filter(None, (*notes, *counted))),
        part=source.part,
        changes=tuple(kept),
    )


def _told(path: Path, changes: list[Change]) -> tuple[list[Change], list[str]]:
    """The changes that have words, each once, and what is to be said of the others."""
    worded = [change for change in changes if change.sentences]
    distinct = list(dict.fromkeys(worded))
    if not distinct:
        raise UserError(f"{path} tells of no change: {len(changes)} entries, none with a word")
    counted = []
    if wordless := len(changes) - len(worded):
        counted.append(f"{wordless} of {len(changes)} changes in {path.name} have no words and are left out")
    if again := len(worded) - len(distinct):
        counted.append(f"{again} of {len(changes)} changes in {path.name} are there twice and taken once")
    return distinct, counted


def _absent(
    source: Source, absent: list[str], files: dict[str, FoundFile | None], changes: list[Change],
    places: Callable[[str], list[str]],
) -> UserError:  # fmt: skip
    """Counts the pictures that are not there, and says which one is left without its pair."""
    pairs = ((c.before, c.after) if files[c.after] is None else (c.after, c.before) for c in changes)
    alone = next(((here, gone) for here, gone in pairs if files[here] and files[gone] is None), None)
    first = alone[1] if alone else absent[0]
    lone = f", so that {alone[0]} has no pair" if alone else ""
    return UserError(
        f"{len(absent)} of the {len(files)} pictures named in {source.path} are absent, "
        f"first {places(first)[0]}{lone}. "
        f"{source.get}, or use only those that are there with --data.missing skip (--missing for run.py)."
    )


def _read(files: list[str], row: int) -> Image.Image:
    return read_image(Path(files[row]))
