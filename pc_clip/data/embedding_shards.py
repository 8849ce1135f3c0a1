"""Image embeddings on the disk: one safetensors file, or a folder of such shards behind an index.

A file holds z [n, D] (float32 or float16) and the n ids (JSON, as bytes); its header says what made it. The images of
a large set are embedded in units, a shard each, which the processes of one launch share. A unit whose shard is there
and opens is done, so a killed run continues. FOLDER/index.json, written last, lists the shards with rows and bytes.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from pc_clip.core.cache import VERIFY_UP_TO, CorruptFileError, read_checked, write_checked
from pc_clip.core.distributed import Processes
from pc_clip.core.errors import UserError
from pc_clip.core.files import write_text
from pc_clip.data.dataset import Dataset, digest, stat, subset
from pc_clip.data.webdataset import find_tars, fingerprint, open_tar

log = logging.getLogger(__name__)

INDEX = "index.json"
IDENTITY = ("image_tower", "fingerprint", "precision", "dtype")  # of what made a file, these must be as expected


class Shard(NamedTuple):
    path: Path
    z: Tensor  # [n, D], memory-mapped
    ids: list[str]  # n
    made_by: dict[str, str]

    @property
    def left_out(self) -> list[str]:
        """Ids of the images that did not decode."""
        return json.loads(self.made_by.get("left_out", "[]"))


def write_shard(path: Path, z: Tensor, ids: Sequence[str], made_by: Mapping[str, str]) -> None:
    """One file, written atomically. z: [n, D]; ids: n. JSON keeps names that are not UTF-8 (lone surrogates)."""
    names = torch.from_numpy(np.frombuffer(bytearray(json.dumps(list(ids)).encode()), dtype=np.uint8))
    write_checked(path, {"z": z, "ids": names}, {name: printable(value) for name, value in made_by.items()})


def read_shard(path: Path, verify: bool | None = None) -> Shard:
    """Raises CorruptFileError for what is damaged or no file of embeddings. verify: as `read_checked`."""
    tensors, made_by = read_checked(path, verify)
    z, names = tensors.get("z"), tensors.get("ids")
    if z is None or names is None or "image_tower" not in made_by:
        raise CorruptFileError(
            f"{path} is no file of embeddings made by pc_clip: it does not say which images or tower"
        )
    try:
        ids = json.loads(names.numpy().tobytes())
    except ValueError as error:
        raise CorruptFileError(f"{path} is damaged: its ids are no JSON ({error})") from error
    if z.ndim != 2 or not z.is_floating_point() or not isinstance(ids, list) or len(ids) != len(z):
        raise CorruptFileError(f"{path} is damaged: z is {list(z.shape)} of {z.dtype}, with {len(ids)} ids")
    return Shard(path, z, ids, made_by)


def printable(text: str) -> str:
    """A text that any file can hold: bytes of a name that are not UTF-8 are written out, as \\udce9."""
    return text.encode("utf-8", "backslashreplace").decode()


class Rows:
    """[N, D] embeddings that lie in shards, read where they are asked for: rows[LongTensor [B]] -> [B, D] float32."""

    def __init__(self, parts: Sequence[Tensor]) -> None:
        self.parts = parts
        self.starts = torch.tensor([0, *map(len, parts)]).cumsum(0)
        self.shape = torch.Size((int(self.starts[-1]), parts[0].shape[1]))

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: Tensor) -> Tensor:
        if len(rows) and not 0 <= int(rows.min()) <= int(rows.max()) < len(self):
            raise IndexError(f"rows {rows.min()} to {rows.max()} were asked for; there are {len(self)}")
        z, shard = torch.empty(len(rows), self.shape[1]), torch.searchsorted(self.starts, rows, right=True) - 1
        for k in shard.unique().tolist():
            here = shard == k
            z[here] = self.parts[k][rows[here] - self.starts[k]].float()
        return z

    def whole(self) -> Tensor:
        """All of them in memory.  -> [N, D] float32"""
        z = torch.empty(self.shape)
        for start, part in zip(self.starts.tolist(), self.parts):
            z[start : start + len(part)] = part
        return z


# -- the index -----------------------------------------------------------------------------------------


def index_of(path: str | Path) -> Path:
    """The index of a folder of shards; of anything else, itself."""
    return Path(path) / INDEX if Path(path).is_dir() else Path(path)


def write_index(folder: Path, shards: Sequence[Shard], made_by: dict[str, str]) -> None:
    content = {"made_by": made_by, "shards": [_entry(shard) for shard in shards]}
    write_text(folder / INDEX, json.dumps(content, indent=1) + "\n")


def _entry(shard: Shard) -> dict[str, Any]:
    return {
        "name": shard.path.name, "rows": len(shard.z), "bytes": shard.path.stat().st_size,
        "fingerprint": shard.made_by.get("fingerprint"),
    }  # fmt: skip


def read_index(path: Path) -> tuple[dict[str, str], list[Shard]]:
    """What made the shards of an index, and the shards. Raises CorruptFileError, with the shard that is absent."""
    again = "run python -m pc_clip embeddings again: it keeps the shards that are whole"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        made_by, entries = dict(content["made_by"]), content["shards"]
        paths = [path.parent / Path(entry["name"]).name for entry in entries]
        verify = sum(entry["bytes"] for entry in entries) <= VERIFY_UP_TO
    except (ValueError, KeyError, TypeError) as error:
        raise CorruptFileError(f"{path} is damaged, or no index of embeddings; {again}") from error
    try:
        shards = [read_shard(path, verify) for path in paths]
    except CorruptFileError as error:
        raise CorruptFileError(f"{error}; {again}") from error
    for shard, entry in zip(shards, entries):
        if _entry(shard) != entry:
            raise CorruptFileError(f"{shard.path} is another one than {path} says; {again}")
    if len({(shard.z.shape[1], shard.z.dtype) for shard in shards}) != 1:
        raise CorruptFileError(f"the shards of {path} are of different models, or there are none; {again}")
    return made_by, shards


def read(path: Path, verify: bool | None = None) -> tuple[dict[str, str], list[Shard]]:
    """What made a file or the shards of an index, and the shards. Raises CorruptFileError."""
    if path.suffix == ".json":
        return read_index(path)
    shard = read_shard(path, verify)
    return shard.made_by, [shard]


def read_if_made_by(path: Path, expected: Mapping[str, str], verify: bool | None = None) -> list[Shard]:
    """The shards of a file or an index; none, with a warning, where it is damaged or something else was expected."""
    if not path.is_file():
        return []
    try:
        made_by, shards = read(path, verify)
    except CorruptFileError as error:
        log.warning("%s; computing it again", error)
        return []
    if any(made_by.get(name) != expected[name] for name in IDENTITY):
        log.warning("%s is of another model or of other images than its name says; computing it again", path)
        return []
    return shards


# -- units of work -------------------------------------------------------------------------------------


class Unit(NamedTuple):
    """One shard's images, which `open` reads."""

    name: str
    fingerprint: str
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
    pictures = dataclasses.replace(data, captions=None, questions=(), attributes=(), statements=(), changes=())
    units = []
    for start in range(0, len(data), shard_size):
        rows = np.arange(start, min(start + shard_size, len(data)))
        name = f"{start:09d}-{rows[-1] + 1:09d}"
        units.append(Unit(name, digest(data.fingerprint, name), partial(subset, pictures, rows)))
    return Work(name_of(data), data.label, data.fingerprint, units)


def name_of(data: Dataset) -> str:
    """What its files begin with: apart from those of any other data, or of the same once it has changed."""
    return printable(f"{data.name}-{data.split or 'all'}-{data.fingerprint}")


def tars(root: Path, split: str | None) -> Work:
    """A WebDataset, a unit a tar. None of them is opened before its turn; labels and captions need not be there."""
    label, files = find_tars(root, split)
    units = []
    for path in files:
        units.append(Unit(printable(path.stem), digest(path.name, *stat(path)), partial(open_tar, path)))
    known = fingerprint(root, files)
    in_a_split = files[0].parent != root
    return Work(printable(f"webdataset-{label}-{known}"), f"webdataset/{label}", known, units, opens=in_a_split)


def embed_units(
    work: Work,
    folder: Path,
    made_by: dict[str, str],
    encode: Callable[[Dataset, Callable[[int], object]], tuple[Tensor, list[str], list[str]]],
    processes: Processes,
    may_leave_out: bool = False,
) -> list[Shard]:
    """Do this process's units; the main process then writes the index.

    encode: a unit's images -> z, ids, ids of images that do not decode. made_by: what a shard must say of its making.
    Returns the shards; nothing in processes other than the main one, which do not see the index being written.
    """
    index = {**made_by, "fingerprint": work.fingerprint}
    shards = _done(folder / INDEX, index, may_leave_out)
    mine = [] if shards else work.units[processes.rank :: processes.size]
    for number, unit in enumerate(mine, 1):
        expected = {**made_by, "fingerprint": unit.fingerprint}
        path = folder / f"{unit.name}.safetensors"
        if _done(path, expected, may_leave_out):
            continue
        data = unit.open()
        what = f"embedding {work.label}, {number} of {len(mine)}"
        shown = None if processes.is_main else True
        with tqdm(desc=what, total=len(data), unit=" images", leave=False, disable=shown) as bar:
            z, ids, left_out = encode(data, bar.update)
        if left_out:
            first = left_out[0].encode(errors="backslashreplace").decode()  # names need not be UTF-8
            log.warning("%s: %d broken images left out, first %s", unit.name, len(left_out), first)
        write_shard(path, z, ids, {**expected, "left_out": json.dumps(left_out)})
    processes.wait()
    if not processes.is_main:
        return []
    if shards:
        return shards
    paths = [folder / f"{unit.name}.safetensors" for unit in work.units]
    if absent := [path for path in paths if not path.is_file()]:
        raise UserError(f"{absent[0]} of another process is not seen here; all processes need one shared folder")
    shards = [read_shard(path) for path in paths]
    if not any(len(shard.z) for shard in shards):
        raise UserError(f"{work.label} holds no image that can be read")
    if lost := sum(len(shard.left_out) for shard in shards):
        log.warning("%d broken images were left out in all", lost)
    write_index(folder, shards, index)
    return shards


def _done(path: Path, made_by: dict[str, str], may_leave_out: bool) -> list[Shard]:
    shards = read_if_made_by(path, made_by, verify=True)
    return shards if may_leave_out or not any(shard.left_out for shard in shards) else []
