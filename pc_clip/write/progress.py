"""What is written so far: a folder beside the file, into which each process appends lines to a file of its own.

While NAME.jsonl is written, NAME.parts/ holds settings.json (what the sentences depend on), writer.json (what wrote
them) and a file of JSON lines for each process of each run. A killed process loses the line that it was writing, a
power cut loses lines that the disk did not have yet; they are written again. NAME.lock keeps a second launch out.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, suppress
from io import FileIO
from pathlib import Path
from typing import Any

from pc_clip.core.errors import UserError
from pc_clip.core.files import exclusive_lock, write_json

Item = tuple[str, str]
UNUSABLE = b'"text": null'  # in the line of a rejected answer; within a text the quotes would be escaped


class Progress:
    """The working folder of the file `out`."""

    def __init__(self, out: Path, suffix: str = ".parts") -> None:
        self.out, self.folder = out, out.with_suffix(suffix)
        self._settings, self.writer = self.folder / "settings.json", self.folder / "writer.json"
        self._merging = self.folder / "merging"

    def lock(self) -> AbstractContextManager[None]:
        """The right to write `out`, for the main process of a launch. Raises UserError when another launch has it."""
        busy = f"another process is writing {self.out}; let it finish or stop it, or choose another --name"
        return exclusive_lock(self.folder.with_suffix(".lock"), busy)

    def begin(self, settings: dict[str, Any], overwrite: bool, work: str = "[0-9]*.jsonl") -> None:
        """Make the folder ready for these settings; the main process calls it before any other starts.

        Answers of which none could be used are dropped, so that they are asked for again. work: pattern of the files
        that are worth keeping. Raises UserError for work of other settings, which `overwrite` drops.
        """
        self.clear()
        lines = (line for path in self._files() for line in path.read_bytes().splitlines(keepends=True))
        if all(UNUSABLE in line or not line.endswith(b"\n") for line in lines):
            for path in (*self._files(), self.writer):
                path.unlink(missing_ok=True)
        if read_json(self._settings) == settings:
            return
        if not overwrite and any(path.stat().st_size for path in self.folder.glob(work)):
            raise UserError(
                f"{self.folder} was begun with other settings; choose another --name, "
                "or --overwrite true to drop what it holds"
            )
        shutil.rmtree(self.folder, ignore_errors=True)
        write_json(self._settings, settings)

    def open(self, rank: int) -> FileIO:
        """A new file for this process, unbuffered; the name sorts by time."""
        return (self.folder / f"{time.time_ns()}-{rank}.jsonl").open("xb", buffering=0)

    def lines(self, items: Sequence[Item]) -> dict[int, bytes]:
        """The finished lines by the number of their item; a last line that was cut is none.

        Raises UserError, with file and line, for a line that is not about one of the items.
        """
        lines: dict[int, bytes] = {}
        for path in self._files():
            with path.open("rb") as file:  # in text mode, other characters than \n would end a line too
                for count, line in enumerate(file, 1):
                    if line.endswith(b"\n"):
                        lines.setdefault(_number(line, f"{path} line {count}", items), line)
        return lines

    def merging(self) -> None:
        """To be called when everything is there, before the finished file is put in place."""
        self.out.unlink(missing_ok=True)  # of an earlier writing; first, so that an interruption mixes nothing
        self._merging.touch()

    def clear(self) -> None:
        """Remove a folder whose file was finished, where an interruption left it."""
        if self.folder.is_dir() and self.out.is_file() and (self._merging.exists() or not self._settings.exists()):
            self.remove()

    def remove(self) -> None:
        self._settings.unlink(missing_ok=True)  # first: a folder without it is known to be one that was to go
        shutil.rmtree(self.folder, ignore_errors=True)

    def _files(self) -> list[Path]:
        return sorted(self.folder.glob("[0-9]*.jsonl"))


def append(file: FileIO, row: dict[str, Any]) -> None:
    """Add a line; when this returns, the operating system has it. Raises UserError when the disk takes no more."""
    line = (json.dumps(row, ensure_ascii=False) + "\n").encode()
    try:
        while line:
            line = line[file.write(line) :]
    except OSError as error:
        raise UserError(
            f"cannot write {file.name} ({error.strerror}). The sentences in it are kept; mend that, "
            "and the same command continues"
        ) from error


def _number(line: bytes, where: str, items: Sequence[Item]) -> int:
    with suppress(ValueError, KeyError, TypeError):  # ValueError: neither JSON nor UTF-8
        row = json.loads(line)
        n, keys = row["n"], (row["first"], row["second"])
        if type(n) is int and 0 <= n < len(items) and keys == tuple(items[n]) and "text" in row and "reason" in row:
            return n
    raise UserError(
        f"{where} is no sentence about one of these pairs ({line[:60]!r}); delete the line, and the same command "
        "continues, or choose another --name"
    )


def read_json(path: Path) -> dict[str, Any]:
    """The object in a file; an empty one where the file is absent or damaged."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}
