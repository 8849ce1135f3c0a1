"""Sentences as they come: append-only shards, one a process, merged into one file when all are there.

While NAME.jsonl is written, NAME.parts/ holds settings.json (what the sentences depend on), writer.json
(what wrote them) and, for each process K, K.jsonl (one line a sentence, in the order they were finished)
and K.lock (held by the process that writes K.jsonl; it vanishes with the process).

What can be lost: a killed process loses the line it is writing, if any. A power cut loses the lines since
the last sync to the disk, which is at most SYNC_EVERY seconds old. All of these are written again.
"""

from __future__ import annotations

import json
import logging
import mmap
import os
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout

from pc_clip.core.errors import UserError
from pc_clip.core.files import write_json
from pc_clip.write.writers import Job

log = logging.getLogger(__name__)

SYNC_EVERY = 2.0  # seconds

Item = tuple[str, str]


# -- who does what -------------------------------------------------------------------------------------


class Jobs(Sequence[Job]):
    """Jobs by their numbers, each made when it is asked for: half a million of them take no room."""

    def __init__(self, numbers: np.ndarray, make: Callable[[int], Job]) -> None:
        self.numbers, self._make = numbers, make

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, place: int | slice) -> Any:
        if isinstance(place, slice):
            return Jobs(self.numbers[place], self._make)
        return self._make(int(self.numbers[place]))


# -- one process's file --------------------------------------------------------------------------------


class Shard:
    """A file that lines are added to. When `add` returns, the operating system has the line; soon after, the disk."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> Shard:
        self._file = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        _sync(self.path.parent)
        self._unsynced, self._ended = False, threading.Event()
        self._error: OSError | None = None
        self._syncing = threading.Thread(target=self._sync_often, daemon=True)
        self._syncing.start()  # a thread, because after a batch it may be a minute to the next line
        return self

    def add(self, row: dict[str, Any]) -> None:
        """Raises UserError when the disk takes no more."""
        line = (json.dumps(row, ensure_ascii=False) + "\n").encode()
        try:
            if self._error:
                raise self._error
            while line:
                line = line[os.write(self._file, line) :]
        except OSError as error:
            raise self._stopped(error) from error
        self._unsynced = True

    def __exit__(self, kind: object, *_: object) -> None:
        self._ended.set()
        self._syncing.join()
        try:
            self._sync()
        finally:
            os.close(self._file)
        if self._error and kind is None:
            raise self._stopped(self._error) from self._error

    def _sync_often(self) -> None:
        while not self._ended.wait(SYNC_EVERY):
            self._sync()

    def _sync(self) -> None:
        if self._unsynced:
            self._unsynced = False  # before, so that a line that comes meanwhile is not taken for synced
            try:
                os.fsync(self._file)
            except OSError as error:
                self._error = error

    def _stopped(self, error: OSError) -> UserError:
        return UserError(
            f"cannot write {self.path} ({error.strerror}). The sentences in it are kept; mend that, "
            "and the same command continues"
        )


# -- the folder of them --------------------------------------------------------------------------------


class Parts:
    """The working folder of one file of sentences."""

    def __init__(self, out: Path) -> None:
        self.folder = out.with_suffix(".parts")
        self._settings, self._writer = self.folder / "settings.json", self.folder / "writer.json"
        self._rubbish = out.with_suffix(".parts.done")

    @contextmanager
    def lock(self, rank: int) -> Iterator[None]:
        """The right to write shard `rank`; the lock of rank 0 also guards the folder as a whole.

        Raises UserError when another process has it.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.folder / f"{rank}.lock", timeout=0)
        try:
            lock.acquire()
        except Timeout:
            raise UserError(
                f"another process is writing {self.folder}; let it finish or stop it, or choose another --name"
            ) from None
        try:
            yield
        finally:
            lock.release()

    def begin(self, settings: dict[str, Any], drop_others: bool) -> None:
        """Make the folder ready for these settings; the main process does it, under its lock, before any other starts.

        Sentences of other settings are dropped if `drop_others`. Raises UserError for them otherwise.
        """
        for lock in self.folder.glob("*.lock"):
            if lock.stem != "0":
                with self.lock(int(lock.stem)):  # a process that outlived its launcher would add lines unseen
                    pass
        if _read(self._settings) != settings:
            if self.size() and not drop_others:
                raise UserError(
                    f"{self.folder} was begun with other settings; choose another --name, "
                    "or --overwrite true to drop what it holds"
                )
            for path in (*self._shards().values(), self._writer, self._settings):
                path.unlink(missing_ok=True)
            write_json(self._settings, settings)
            _sync(self._settings, self.folder, self.folder.parent)
        for path in self._shards().values():
            _cut_torn_line(path)

    def shard(self, rank: int) -> Shard:
        return Shard(self.folder / f"{rank}.jsonl")

    def keep_writer(self, description: dict[str, Any]) -> None:
        """What the writer says of itself, so that it need not be loaded again where only the merging is left."""
        write_json(self._writer, description)

    def writer(self) -> dict[str, Any] | None:
        """What `keep_writer` kept; None before it did."""
        return _read(self._writer)

    def size(self) -> int:
        """Bytes of sentences."""
        return sum(path.stat().st_size for path in self._shards().values())

    def index(self, items: Sequence[Item]) -> np.ndarray:
        """Where each item's sentence is: shard and byte, both -1 while there is none.  -> [N, 2] int64

        Raises UserError, with file and line, for a line that is no sentence about one of the items.
        """
        where = np.full((len(items), 2), -1, dtype=np.int64)
        for rank, path in self._shards().items():
            at = 0
            with path.open("rb") as file:  # lines end at \n alone; in text mode, other characters would end them too
                for count, line in enumerate(file, 1):
                    n = _number(line, f"{path} line {count}", items)
                    if where[n, 0] < 0:
                        where[n] = rank, at
                    at += len(line)
        return where

    def rows(self, where: np.ndarray) -> Iterator[dict[str, Any]]:
        """The sentences in order of their items, read one by one from where `index` found them."""
        with ExitStack() as stack:
            files = {rank: stack.enter_context(path.open("rb")) for rank, path in self._shards().items()}
            for rank, at in where.tolist():
                files[rank].seek(at)
                yield json.loads(files[rank].readline())

    def remove(self) -> None:
        """All at once, as far as anyone can see: an interruption leaves the whole folder or rubbish, no part of it."""
        shutil.rmtree(self._rubbish, ignore_errors=True)
        os.rename(self.folder, self._rubbish)
        shutil.rmtree(self._rubbish, ignore_errors=True)

    def clear(self, sentences: int) -> None:
        """Remove what an interruption left beside a finished file of so many sentences, kept and rejected ones."""
        shutil.rmtree(self._rubbish, ignore_errors=True)
        if not self.folder.is_dir():
            return
        try:
            with self.lock(0):
                if sum(_lines(path) for path in self._shards().values()) in (0, sentences):
                    return self.remove()
            log.info("%s is left from writing it again, which --overwrite true continues", self.folder)
        except UserError as error:  # it is being written again right now
            log.info("%s", error)

    def _shards(self) -> dict[int, Path]:
        found = {int(path.stem): path for path in self.folder.glob("*.jsonl") if path.stem.isdecimal()}
        return dict(sorted(found.items()))


def put_in_place(files: dict[Path, Path]) -> None:
    """Move files (target: source) into place in this order, and see to it that a power cut cannot undo it."""
    for target, source in files.items():
        _sync(source)
        os.replace(source, target)
        _sync(target.parent)


def _number(line: bytes, where: str, items: Sequence[Item]) -> int:
    try:
        row = json.loads(line)
        n, keys = row["n"], (row["first"], row["second"])
        whole = {"text", "reason", "captions"} <= row.keys()
    except (ValueError, KeyError, TypeError, AttributeError):  # ValueError: neither JSON nor UTF-8
        whole = False
    if not whole or type(n) is not int or not 0 <= n < len(items):
        raise UserError(f"{where} is no sentence ({line[:60]!r}); delete the line, and the same command continues")
    if keys != tuple(items[n]):
        raise UserError(
            f"{where} is about {keys}, where {tuple(items[n])} was expected: other code chose these pairs. "
            "Choose another --name, or delete the folder"
        )
    return n


def _cut_torn_line(path: Path) -> None:
    """Cut off a last line that was never finished. What stands before it is not touched."""
    with path.open("r+b") as file:
        size = file.seek(0, os.SEEK_END)
        if not size:
            return
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            end = content.rfind(b"\n") + 1
        if end < size:
            file.truncate(end)
            os.fsync(file.fileno())
            log.info("%s: its last line was torn by an interruption and is cut off (%d bytes)", path, size - end)


def _lines(path: Path) -> int:
    with path.open("rb") as file:
        return sum(line.endswith(b"\n") for line in file)


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None


def _sync(*paths: Path) -> None:
    for path in paths:
        file = os.open(path, os.O_RDONLY)
        try:
            os.fsync(file)
        except OSError:
            if not path.is_dir():  # some network file systems sync no folders
                raise
        finally:
            os.close(file)
