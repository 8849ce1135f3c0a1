"""The work of embedding a large image set, cut into units that any number of processes share.

A unit is a tar of a WebDataset, or a block of rows of any other data set; it becomes one shard, written atomically. A
unit whose shard is there and whole is done: so work continues after a kill, and processes that never met can share a
folder. When all are done, an index merges them (`data/embedding_shards.py`).
"""

from __future__ import annotations

import dataclasses
import json
import logging
import time
from collections.abc import Callable, Container
from functools import partial
from pathlib import Path
from typing import NamedTuple

from filelock import FileLock, Timeout
from PIL import Image
from tqdm import tqdm

from pc_clip.core.distributed import Processes
from pc_clip.core.errors import UserError
from pc_clip.core.files import NOT_SUPPORTED
from pc_clip.data.dataset import Dataset, digest, stat
from pc_clip.data.embedding_shards import (
    INDEX,
    Head,
    Unsound,
    printable,
    read_file,
    read_head,
    read_index,
    write,
    write_index,
)
from pc_clip.data.encoding import Options, encode
from pc_clip.data.webdataset import find_tars, fingerprint, open_tar
from pc_clip.models.clip import Clip

log = logging.getLogger(__name__)


class Unit(NamedTuple):
    """One shard's images. size: how much work it is, in rows or bytes; `open` reads what it holds."""

    name: str
    fingerprint: str
    size: int
    open: Callable[[], Dataset]


class Work(NamedTuple):
    """An image set in units. name: of its files, and apart from those of other data. opens: whether a reader does."""

    name: str
    label: str
    fingerprint: str
    units: list[Unit]
    opens: bool = True


def blocks(data: Dataset, shard_size: int) -> Work:
    """A data set in blocks of so many rows, the last one shorter."""
    units = [_block(data, start, min(start + shard_size, len(data))) for start in range(0, len(data), shard_size)]
    return Work(name_of(data), data.label, data.fingerprint, units)


def name_of(data: Dataset) -> str:
    """What its files begin with: apart from those of any other data, or of the same once it has changed."""
    return printable(f"{data.name}-{data.split or 'all'}-{data.fingerprint}")


def _block(data: Dataset, start: int, stop: int) -> Unit:
    known = digest(data.fingerprint, start, stop)
    return Unit(f"{start:09d}-{stop:09d}", known, stop - start, partial(_open_block, data, start, stop, known))


def _open_block(data: Dataset, start: int, stop: int, known: str) -> Dataset:
    return dataclasses.replace(
        data, ids=data.ids[start:stop], load=partial(_load, data.load, start), fingerprint=known,
        captions=None, questions=(), attributes=(),
    )  # fmt: skip


def _load(load: Callable[[int], Image.Image], start: int, row: int) -> Image.Image:
    return load(start + row)


def tars(root: Path, split: str | None) -> Work:
    """A WebDataset, a unit a tar. None of them is opened before its turn; labels and captions need not be there."""
    label, files = find_tars(root, split)
    known = fingerprint(root, files)
    units = [
        Unit(printable(path.stem), digest(path.name, *seen), seen[0], partial(open_tar, path))
        for path, seen in zip(files, map(stat, files))
    ]
    name, in_a_split = printable(f"webdataset-{label}-{known}"), files[0].parent != root
    return Work(name, f"webdataset/{label}", known, units, opens=in_a_split)


# -- doing it ------------------------------------------------------------------------------------------


class Part(NamedTuple):
    """Which of how many parts of the work this launch does, counted from 1."""

    number: int = 1
    of: int = 1

    @classmethod
    def parse(cls, text: str) -> Part:
        """ "3/16" -> (3, 16); nothing is all of it. Raises UserError for anything else."""
        if not text:
            return cls()
        number, _, of = text.partition("/")
        if not (number.isdecimal() and of.isdecimal() and 1 <= int(number) <= int(of)):
            raise UserError(f"part is {text!r}; write which of how many, as 3/16, counted from 1")
        return cls(int(number), int(of))


ALONE, WHOLE = Processes(), Part()


def embed_units(
    work: Work,
    clip: Clip,
    folder: Path,
    options: Options,
    *,
    part: Part = WHOLE,
    processes: Processes = ALONE,
    verify: bool = False,
) -> list[Head]:
    """Do this process's units of a part; the main process then writes the index, if all units are done.

    Returns what the index names; nothing where there is none yet, and nothing in processes other than the main one,
    which do not see it being written. An index that is there and whole already is left as it is, and nothing is done;
    verify: look at every byte of the shards first.
    Raises UserError for an image that cannot be read, and for a tar that is damaged.
    """
    desk = _Desk(work, clip, folder, options)
    own = work.units[part.number - 1 :: part.of]
    finished = [] if verify else desk.finished()
    if not finished:
        desk.do_all(own[processes.rank :: processes.size], processes.is_main)
    processes.wait()
    if not processes.is_main:
        return []
    if verify:
        finished = desk.finished()  # so that no part reads the shards of all others where an index is whole
    return finished or desk.merge({unit.name for unit in own})


class _Desk:
    """What all units of one work have in common: model, folder, options."""

    def __init__(self, work: Work, clip: Clip, folder: Path, options: Options) -> None:
        self.work, self.clip, self.folder, self.options = work, clip, folder, options
        self.made_by = {
            "model": clip.describe(), "image_tower": clip.image_tower_hash(), "data": work.label,
            "precision": options.precision,
        }  # fmt: skip

    def finished(self) -> list[Head]:
        """What a whole index names; nothing where there is none. What is damaged is said, and made again."""
        path = self.folder / INDEX
        if not path.is_file():
            return []
        try:
            made_by, heads = read_index(path)
        except Unsound as error:
            log.warning("%s; looking at all shards", error.why)
            return []
        here = {**self.made_by, "fingerprint": self.work.fingerprint}
        if {name: made_by.get(name) for name in here} != here or heads[0].dtype != self.options.dtype:
            log.warning("%s is of another model or of other images; looking at all shards", path)
            return []
        return heads if self.options.broken == "skip" or not any(left_out(head) for head in heads) else []

    def look(self, unit: Unit, verify: bool) -> tuple[Head | None, str]:
        """What a unit's shard says of itself if it is whole and of this model and data; otherwise why it is not."""
        path = self._path(unit)
        if not path.is_file():
            return None, ""
        try:
            head = read_head(path)
            if verify:
                read_file(head, verify=True)
        except Unsound as error:
            return None, error.why
        here = {"image_tower": self.made_by["image_tower"], "fingerprint": unit.fingerprint}
        here["precision"] = self.options.precision
        said = {name: head.made_by.get(name) for name in here}
        if said != here or head.dtype != self.options.dtype or not head.is_checked:
            return None, f"{path} is of another model or of other images"
        if self.options.broken == "error" and left_out(head):
            return None, f"{path} leaves out {len(left_out(head))} broken images"
        return head, ""

    def do_all(self, units: list[Unit], show_bar: bool) -> None:
        """Embed those of some units that are not done. Those that another run is at come last, and may be done then."""
        left = []
        if units:
            self.folder.mkdir(parents=True, exist_ok=True)
        for unit in units:
            head, why = self.look(unit, verify=True)
            left += [unit] if head is None else []
            if why:
                log.warning("%s; computing it again", why)
        if len(left) < len(units):
            log.info("%d of %d units are there already", len(units) - len(left), len(units))
        with _Progress(self.work.label, left, show_bar) as progress:
            left = [unit for unit in left if not self.do(unit, progress, wait=False)]
            if left:
                log.info("%d units are being embedded by another run; waiting for them", len(left))
            for unit in left:
                self.do(unit, progress, wait=True)

    def do(self, unit: Unit, progress: _Progress, wait: bool) -> bool:
        """Embed a unit and write its shard; False where another process is at it, unless it is waited for."""
        lock = FileLock(self.folder / f"{unit.name}.lock", timeout=-1 if wait else 0)
        try:
            lock.acquire()
        except Timeout:
            return False
        except OSError as error:
            if error.errno not in NOT_SUPPORTED:
                raise
            log.debug("%s cannot be locked", lock.lock_file)  # by this file system; locks only save work
        try:
            if self.look(unit, verify=True)[0] is None:
                self._embed(unit, progress)
            Path(lock.lock_file).unlink(missing_ok=True)
        finally:
            lock.release()
        return True

    def _embed(self, unit: Unit, progress: _Progress) -> None:
        data, then = unit.open(), time.perf_counter()
        found = encode(self.clip, data, self.options, progress.of(unit, len(data)))
        made_by = {**self.made_by, "fingerprint": unit.fingerprint}
        if found.left_out:
            made_by["left_out"] = json.dumps(found.left_out)
            log.warning("%s: %d broken images left out, first %s", unit.name, len(found.left_out), found.left_out[0])
        write(self._path(unit), found.z, found.ids, made_by)
        rate = len(data) / (time.perf_counter() - then)
        log.info("%s: %d images, %.0f images/s", unit.name, len(found.ids), rate)

    def merge(self, own: Container[str]) -> list[Head]:
        """Write the index, if all units are done; otherwise say how many are, and what is wrong with the others.

        own: the units that this launch made, or looked at. Shards of others are read first, once all are there.
        """
        looked = [self.look(unit, verify=False) for unit in self.work.units]
        if all(head is not None for head, _ in looked):
            looked = [
                found if unit.name in own else self.look(unit, verify=True)
                for unit, found in zip(self.work.units, looked)
            ]
        for _, why in looked:
            if why:
                log.warning("%s; the same command makes it again, or that of the part it belongs to", why)
        done = [head for head, _ in looked if head is not None]
        if len(done) < len(looked):
            log.info(
                "%d of %d units are done. When the others are, the last of them writes the index; "
                "the same command does it too.", len(done), len(looked),
            )  # fmt: skip
            return []
        if not any(head.rows for head in done):
            raise UserError(f"{self.work.label} holds no image that can be read")
        if lost := sum(len(left_out(head)) for head in done):
            log.warning("%d broken images were left out in all", lost)
        write_index(self.folder, done, {**self.made_by, "fingerprint": self.work.fingerprint})
        return done

    def _path(self, unit: Unit) -> Path:
        return self.folder / f"{unit.name}.safetensors"


def left_out(head: Head) -> list[str]:
    """The images of a unit that did not decode."""
    return json.loads(head.made_by.get("left_out", "[]"))


class _Progress:
    """A bar over this process's units: how much is done, how long it will take, images a second."""

    def __init__(self, label: str, units: list[Unit], shown: bool) -> None:
        self.images, self.begun = 0, time.perf_counter()
        shape = "{desc}: {percentage:3.0f}%|{bar}| {elapsed} gone, {remaining} left{postfix}"
        self.bar = tqdm(
            desc=f"embedding {label}", total=sum(unit.size for unit in units), bar_format=shape,
            disable=None if shown and units else True,
        )  # fmt: skip

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()

    def of(self, unit: Unit, images: int) -> Callable[[int], None]:
        """What `encode` is to call with the number of images it has done."""

        def seen(n: int) -> None:
            self.images += n
            rate = self.images / (time.perf_counter() - self.begun)
            self.bar.set_postfix_str(f"{rate:.0f} images/s", refresh=False)
            self.bar.update(unit.size * n / images)

        return seen
