"""Resumable progress: each process appends lines to a file of its own in NAME.parts/.

While NAME.jsonl is written, NAME.parts/ holds settings.json (what the sentences depend on), writer.json (what wrote
them) and a file of JSON lines for each process of each run. A killed process loses the line that it was writing, a
power cut loses lines that the disk did not have yet; they are written again. NAME.lock keeps a second launch out.
"""

from __future__ import annotations

import json
import logging
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any, BinaryIO

from pc_clip.core import environment
from pc_clip.core.distributed import Processes
from pc_clip.core.errors import UserError
from pc_clip.core.files import exclusive_lock, write_json, write_text

log = logging.getLogger(__name__)

Item = tuple[str, str]


class Progress:
    """The working folder of the file `out`."""

    def __init__(self, out: Path, suffix: str = ".parts") -> None:
        self.out, self.folder = out, out.with_suffix(suffix)
        self.settings, self.writer = self.folder / "settings.json", self.folder / "writer.json"

    @contextmanager
    def working(self, settings: dict[str, Any], overwrite: bool, processes: Processes) -> Iterator[bool]:
        """Whether something is to be written. In the block no other launch writes; all processes enter it alike.

        Raises UserError where another launch writes the file, for a file or a folder of other settings, and for a
        file of another kind and the same name: both would have the one .meta.json.
        """
        for other in {".jsonl", ".parquet"} - {self.out.suffix}:
            if self.out.with_suffix(other).is_file():
                raise UserError(f"{self.out.with_suffix(other)} has the same name as {self.out}; choose another --name")
        settings = json.loads(json.dumps(settings))  # as a file of them reads: tuples are lists
        busy = f"another process is writing {self.out}; let it finish or stop it, or choose another --name"
        lock = exclusive_lock(self.folder.with_suffix(".lock"), busy) if processes.is_main else nullcontext()
        with lock:
            processes.wait()  # from here the main process has the lock
            wanted = overwrite or not self._is_finished(settings, processes)
            if wanted and processes.is_main:
                self._begin(settings, overwrite)
            processes.wait()
            yield wanted
            processes.wait()

    def _is_finished(self, settings: dict[str, Any], processes: Processes) -> bool:
        if not self.out.is_file():
            return False
        if read_meta(self.out).get("settings") != settings:
            raise UserError(
                f"{self.out} exists and was written with other settings; choose another --name or --overwrite true"
            )
        if processes.is_main:
            log.info("%s is complete; --overwrite true writes it again", self.out)
            if self.folder.is_dir():
                log.info("%s is left of another writing; delete it, or --overwrite true continues", self.folder)
        return True

    def _begin(self, settings: dict[str, Any], overwrite: bool) -> None:
        if read_json(self.settings) == settings:
            return
        work = (path for path in self.folder.glob("*") if path not in (self.settings, self.writer))
        if not overwrite and any(path.stat().st_size for path in work):
            raise UserError(
                f"{self.folder} was begun with other settings; choose another --name, "
                "or --overwrite true to drop what it holds"
            )
        shutil.rmtree(self.folder, ignore_errors=True)
        write_json(self.settings, settings)

    def open(self, rank: int) -> BinaryIO:
        """A new file for this process; the name sorts by time."""
        return (self.folder / f"{time.time_ns()}-{rank}.jsonl").open("xb")

    def lines(self, items: Sequence[Item]) -> dict[int, bytes]:
        """The finished lines by the number of their item; a last line that was cut is none.

        Raises UserError, with file and line, for a line that is not about one of the items.
        """
        lines: dict[int, bytes] = {}
        for path in sorted(self.folder.glob("[0-9]*.jsonl")):
            with path.open("rb") as file:  # in text mode, other characters than \n would end a line too
                for count, line in enumerate(file, 1):
                    if not line.endswith(b"\n"):
                        break
                    try:
                        row = json.loads(line)
                        if tuple(items[row["n"]]) != (row["first"], row["second"]):
                            raise ValueError("these keys are not the item's")
                    except (ValueError, LookupError, TypeError) as error:  # ValueError: neither JSON nor UTF-8 too
                        raise UserError(
                            f"{path} line {count} is not a sentence on one of these pairs ({line[:60]!r}); delete the "
                            "line, and the same command continues, or choose another --name"
                        ) from error
                    lines.setdefault(row["n"], line)
        return lines

    def finish(self, made: Path, meta: dict[str, Any], rejected: Sequence[dict[str, Any]]) -> None:
        """Put the file `made` and what is known of it into place; then the working folder goes."""
        self.out.unlink(missing_ok=True)  # of an earlier writing; first, so that an interruption mixes nothing
        aside = self.out.with_suffix(".rejected.jsonl")
        aside.unlink(missing_ok=True)
        if rejected:
            write_text(aside, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rejected))
        write_json(self.out.with_suffix(".meta.json"), meta | environment.describe())
        made.replace(self.out)  # last: where the sentences are, the rest is
        self.remove()

    def remove(self) -> None:
        self.settings.unlink(missing_ok=True)  # first: without it, what may be left is not continued
        shutil.rmtree(self.folder, ignore_errors=True)


def read_meta(out: Path) -> dict[str, Any]:
    return read_json(out.with_suffix(".meta.json"))


def read_json(path: Path) -> dict[str, Any]:
    """The object in a file; an empty one where the file is absent or damaged."""
    with suppress(OSError, ValueError):
        content = json.loads(path.read_text(encoding="utf-8"))
        return content if isinstance(content, dict) else {}
    return {}
