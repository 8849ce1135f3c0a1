"""The text files of AwA2 and CUB, read strictly: every complaint names file and line."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np

from pc_clip.core.errors import UserError


class Entry(NamedTuple):
    """What a line says, and which line it is (from 1)."""

    value: str
    line: int


def numbered(path: Path) -> dict[int, Entry]:
    """Lines "NUMBER VALUE": number -> value, in the order of the file.

    Raises UserError for a file without lines, a line of another form and a number that comes twice.
    """
    found: dict[int, Entry] = {}
    for line, text in _lines(path):
        number, _, value = text.partition(" ")
        value = value.strip()
        if not number.isdecimal() or not value:
            raise UserError(f"{path} line {line}: expected a number and a name, found {text[:60]!r}")
        if int(number) in found:
            raise UserError(f"{path} line {line}: {number} stands already in line {found[int(number)].line}")
        found[int(number)] = Entry(value, line)
    return found


def names(path: Path) -> list[str]:
    """Lines "NUMBER NAME" that number a table's rows or columns: the names by number, from 1.

    Raises UserError as `numbered` does, for a name that comes twice, and where the numbers leave a gap.
    """
    found = numbered(path)
    seen: dict[str, int] = {}
    for entry in found.values():
        if entry.value in seen:
            raise UserError(f"{path} line {entry.line}: {entry.value} stands already in line {seen[entry.value]}")
        seen[entry.value] = entry.line
    if absent := [n for n in range(1, len(found) + 1) if n not in found]:
        raise UserError(f"{path} has {len(found)} names but none with the number {absent[0]}")
    return [found[n].value for n in range(1, len(found) + 1)]


def matrix(path: Path, rows: tuple[int, Path], columns: tuple[int, Path], least: float, most: float) -> np.ndarray:
    """A table of numbers, as many rows and columns as two other files have names.  [rows, columns] float64

    Raises UserError for another shape and for what is no number from `least` to `most`.
    """
    found = []
    for line, text in _lines(path):
        try:
            values = [float(word) for word in text.split()]
        except ValueError as error:
            raise UserError(f"{path} line {line}: {error}") from error
        if len(values) != columns[0]:
            raise UserError(f"{path} line {line} has {len(values)} numbers; {columns[1]} has {columns[0]} names")
        if wrong := [value for value in values if not least <= value <= most]:
            raise UserError(f"{path} line {line}: {wrong[0]:g} is not between {least:g} and {most:g}")
        found.append(values)
    if len(found) != rows[0]:
        raise UserError(f"{path} has {len(found)} lines; {rows[1]} has {rows[0]} names")
    return np.array(found)


def same_numbers(one: Path, entries: dict[int, Entry], other: Path, others: dict[int, Entry]) -> None:
    """Raise UserError for a number that stands in one of two files alone."""
    for path, mine, elsewhere, theirs in ((one, entries, other, others), (other, others, one, entries)):
        if alone := [n for n in mine if n not in theirs]:
            line = mine[alone[0]].line
            raise UserError(f"{path} line {line} has the number {alone[0]}, which is not in {elsewhere}")


def _lines(path: Path) -> list[tuple[int, str]]:
    """The lines that are not blank, by number from 1, runs of white space made one space."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise UserError(f"no file at {path}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is no text ({error})") from error
    found = [(n, " ".join(line.split())) for n, line in enumerate(text.splitlines(), 1) if line.strip()]
    if not found:
        raise UserError(f"{path} is empty; unpack the archive again")
    return found
