"""Text files, read strictly: UTF-8, JSON, and a JSON object a line. Every error names the file and the place in it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pc_clip.core.errors import UserError

Entries = Iterator[tuple[str, dict[str, Any]]]  # where each stands, and its fields


def read_text(path: Path, content: bytes | None = None) -> str:
    """The UTF-8 text of a file, or of bytes known by that name, without a byte order mark."""
    try:
        return (path.read_bytes() if content is None else content).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start})") from error
    except FileNotFoundError as error:
        raise UserError(f"there is no file {path}") from error


def read_json(path: Path, kind: type | tuple[type, ...] = (list, dict)) -> Any:
    """The content of a JSON file, a list or an object as `kind` says."""
    try:
        content = json.loads(read_text(path))
    except json.JSONDecodeError as error:
        lines = " (for a JSON in each line, the name must end in .jsonl)" if error.msg == "Extra data" else ""
        raise UserError(f"{path} is not JSON ({error}){lines}; it may have been cut short") from error
    if not isinstance(content, kind):
        wanted = "a list" if kind is list else "an object" if kind is dict else "a list or an object"
        raise UserError(f"{path} must hold {wanted}, found {str(content)[:60]!r}")
    return content


def json_lines(path: Path, keys: Sequence[str] = (), content: bytes | None = None) -> Entries:
    """The JSON object of each line that is not blank. Each must have `keys`. content: as for `read_text`."""
    for number, line in enumerate(read_text(path, content).split("\n"), 1):  # splitlines() would split at U+2028 too
        if line.strip():
            where = f"{path} line {number}"
            try:
                entry = json.loads(line)
            except json.JSONDecodeError as error:
                raise UserError(
                    f"{where} is not JSON ({error.msg} at column {error.colno}); fix or delete the line"
                ) from error
            yield where, with_keys(entry, where, keys)


def with_keys(entry: object, where: str, keys: Sequence[str]) -> dict[str, Any]:
    """An entry of a file that is an object and has some keys. Raises UserError for any other."""
    if not isinstance(entry, dict) or not set(keys) <= entry.keys():
        raise UserError(f"{where} must be an object with {', '.join(keys) or 'columns'}, found {str(entry)[:80]}")
    return entry


def words(value: object, where: str, what: str, may_be_empty: bool = False) -> str:
    """A text with single spaces. Raises UserError for other types, and for a text without a word unless it may be.

    JSON may hold half a surrogate pair, which cannot be written again; it becomes "?".
    """
    text = " ".join(value.encode("utf-8", "replace").decode().split()) if isinstance(value, str) else None
    if text is None or not (text or may_be_empty):
        raise UserError(f"{where}: {what} must be a text with a word in it, found {str(value)[:60]!r}")
    return text


def image_name(value: object, where: str, what: str) -> str:
    """The name of an image; a number too, as COCO's ids are. Raises UserError for anything else."""
    if type(value) is int:
        return str(value)
    if not isinstance(value, str) or not value.strip():
        raise UserError(f"{where}: {what} must name an image, found {str(value)[:60]!r}")
    return value.strip()
