"""Files of embeddings: one safetensors file, or shards behind an index. Damage is found; rows stay on the disk.

A file holds z [n, D] (float32 or float16) and the n ids, as tensors too (`ids.bytes`, UTF-8, and `ids.ends`), so that
they can be looked up where they lie, and there may be any number of them. Its header says what made it. There are two
CRC-32: `checksum` of the tensors, `head` of the rest of the header. Size and header are checked whenever a file is
opened, the tensors where there are at most VERIFY_UP_TO bytes of them, or where that is asked for. Older files, and
those of others, may have their ids in the header, as a JSON list, and no checksums.

An index, FOLDER/index.json, names the shards in its folder, in order, with rows, bytes and checksum of each. It is
written last; nothing is copied. It is what `--data.embeddings` takes.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pc_clip.core.errors import UserError
from pc_clip.core.files import write_tensors, write_text

INDEX = "index.json"
VERIFY_UP_TO = 2 << 30  # bytes that are read in full on opening: about a second
MAPPED = 30_000  # shards kept mapped at once, a mapping each; Linux allows a process 65,530 unless told otherwise

TENSORS = ("z", "ids.bytes", "ids.ends")  # in the order of the checksum
_FORMAT = "pc_clip embeddings 1"
_NAMES = ("utf-8", "surrogateescape")  # how ids are bytes: any name that a disk or a tar can hold comes back as it was


class Unsound(UserError):
    """A file that is damaged or something else. why: what is wrong, for those who make it again by themselves."""

    def __init__(self, why: str, then: str = "the command that made it makes it again") -> None:
        super().__init__(f"{why}; {then}")
        self.why = why


# -- one file ------------------------------------------------------------------------------------------


class Head(NamedTuple):
    """What a file's header says. rows, width: of z; made_by: all that was said of its making."""

    path: Path
    rows: int
    width: int
    dtype: str
    made_by: dict[str, str]

    @property
    def checksum(self) -> str | None:
        """Of the tensors; None in a file that is older than checksums."""
        return self.made_by.get("checksum")

    @property
    def is_checked(self) -> bool:
        """Whether the header has a checksum, so that what it says is what was written."""
        return "head" in self.made_by


def write(path: Path, z: Tensor, ids: Sequence[str], made_by: Mapping[str, str]) -> None:
    """One file, written atomically: a reader sees all of it or none. z: [n, D]; ids: n."""
    names = [name.encode(*_NAMES) for name in ids]
    tensors = {
        "z": z.detach().cpu().contiguous(),
        "ids.bytes": torch.from_numpy(np.frombuffer(bytearray(b"".join(names)), dtype=np.uint8)),
        "ids.ends": torch.tensor([len(name) for name in names], dtype=torch.int64).cumsum(0),
    }
    said = {name: printable(value) for name, value in made_by.items()} | {"checksum": _checksum(tensors.values())}
    said["head"] = _checksum_of_head(said, tensors["z"])
    write_tensors(path, tensors, said)


def printable(text: str) -> str:
    """A text that any file can hold: bytes of a name that are not UTF-8 are written out, as \\udce9."""
    return text.encode("utf-8", "backslashreplace").decode()


def read_head(path: Path) -> Head:
    """Size and header of a file, checked; no row is read. Raises Unsound for what is damaged or something else."""
    try:
        with safe_open(path, "pt") as file:
            made_by, tensors = file.metadata() or {}, _tensors(file)  # a mapping: nothing is read
    except (SafetensorError, OSError) as error:
        raise Unsound(f"{path} is not a whole safetensors file ({error})", "make it again") from error
    if "image_tower" not in made_by or "z" not in tensors or not ("ids" in made_by or len(tensors) == len(TENSORS)):
        raise Unsound(
            f"{path} is no file of embeddings made by pc_clip: it does not say which images or tower",
            "python -m pc_clip embeddings makes one",
        )
    z = tensors["z"]
    if z.ndim != 2 or not z.is_floating_point():
        raise Unsound(f"{path}: z is {list(z.shape)} of {z.dtype}", "[images, numbers] was expected")
    if "head" in made_by and made_by["head"] != _checksum_of_head(made_by, z):
        raise Unsound(f"{path} is damaged: its header has another checksum than the one it was written with")
    if "ids.ends" in tensors and not _are_ids(tensors):
        raise Unsound(f"{path} is damaged: its ids are not bytes and their ends")
    return Head(path, z.shape[0], z.shape[1], str(z.dtype).removeprefix("torch."), made_by)


def read_file(head: Head, verify: bool = False) -> tuple[Tensor, Sequence[str]]:
    """z, memory-mapped, [n, D] as it is on the disk, and the ids.

    Raises Unsound where the tensors are not those that were written; verify: look, however large they are.
    """
    tensors = _map(head.path)
    size = sum(value.nbytes for value in tensors.values())
    if head.checksum and (verify or size <= VERIFY_UP_TO) and head.checksum != _checksum(tensors.values()):
        raise Unsound(f"{head.path} is damaged: its content has another checksum than the one it was written with")
    ids = _ids(head, tensors)
    if len(ids) != head.rows:
        raise Unsound(f"{head.path} is damaged: {head.rows} rows, but {len(ids)} ids")
    if isinstance(ids, _Names) and not ids.are_whole():
        raise Unsound(f"{head.path} is damaged: its ids do not end where they should")
    return tensors["z"], ids


def _map(path: Path) -> dict[str, Tensor]:
    with safe_open(path, "pt") as file:
        return _tensors(file)


def _tensors(file: safe_open) -> dict[str, Tensor]:
    there = file.keys()
    return {name: file.get_tensor(name) for name in TENSORS if name in there}


def _are_ids(tensors: Mapping[str, Tensor]) -> bool:
    content, ends = tensors.get("ids.bytes"), tensors["ids.ends"]
    whole = content is not None and (content.dtype, content.ndim) == (torch.uint8, 1)
    return whole and (ends.dtype, ends.ndim) == (torch.int64, 1)


def _ids(head: Head, tensors: Mapping[str, Tensor]) -> Sequence[str]:
    if "ids.ends" in tensors:
        return _Names(tensors)
    try:
        ids = json.loads(head.made_by["ids"])
    except (ValueError, RecursionError):
        ids = None
    if not isinstance(ids, list) or not all(isinstance(name, str) for name in ids):
        raise Unsound(f"{head.path} is damaged: the ids in its header are no list of names")
    return ids


def _checksum(tensors: Iterable[Tensor]) -> str:
    found = 0
    for value in tensors:
        if value.numel():
            found = zlib.crc32(value.reshape(-1).view(torch.uint8).numpy(), found)
    return f"{found:08x}"


def _checksum_of_head(made_by: dict[str, str], z: Tensor) -> str:
    said = sorted((name, value) for name, value in made_by.items() if name != "head")
    return f"{zlib.crc32(json.dumps([said, list(z.shape), str(z.dtype)]).encode()):08x}"


class _Names(Sequence[str]):
    """The ids of one file, each decoded when it is asked for."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._bytes, self._ends = tensors["ids.bytes"].numpy(), tensors["ids.ends"].numpy()

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, row: int) -> str:
        return self._bytes[self._ends[row - 1] if row else 0 : self._ends[row]].tobytes().decode(*_NAMES)

    def __iter__(self) -> Iterator[str]:
        start = 0
        content = self._bytes.tobytes()
        for end in self._ends.tolist():
            yield content[start:end].decode(*_NAMES)
            start = end

    def are_whole(self) -> bool:
        """Whether each begins where the one before it ends, and the last ends with the bytes."""
        ends = np.concatenate(([0], self._ends))
        return bool((ends[1:] >= ends[:-1]).all()) and int(ends[-1]) == len(self._bytes)


# -- many files ----------------------------------------------------------------------------------------


class Shards:
    """Which shard a row is in, and the shards themselves, mapped when they are first wanted.

    shards[k] -> z [n, D] and the n ids of the k-th. The MAPPED that were used last stay mapped; Rows and Ids of one
    index share one of these.
    """

    def __init__(self, heads: Sequence[Head]) -> None:
        self.heads = heads
        self.starts = np.cumsum([0, *(head.rows for head in heads)])
        self._open = lru_cache(MAPPED)(partial(_open, heads))

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitem__(self, k: int) -> tuple[Tensor, Sequence[str]]:
        return self._open(k)

    def find(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Of each row its shard, and its place there."""
        if len(rows) and not 0 <= rows.min() <= rows.max() < len(self):
            raise IndexError(f"rows {rows.min()} to {rows.max()} were asked for; there are {len(self)}")
        shard = np.searchsorted(self.starts, rows, side="right") - 1
        return shard, rows - self.starts[shard]


def _open(heads: Sequence[Head], k: int) -> tuple[Tensor, Sequence[str]]:
    tensors = _map(heads[k].path)
    return tensors["z"], _ids(heads[k], tensors)


class Rows:
    """[N, D] embeddings that lie in the shards of an index, read where they are asked for.

    rows[of a LongTensor [B]] -> [B, D] float32.
    """

    def __init__(self, shards: Shards) -> None:
        self._shards = shards
        self.shape = torch.Size((len(shards), shards.heads[0].width))

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: Tensor | np.ndarray) -> Tensor:
        rows = torch.as_tensor(rows).numpy()
        if rows.ndim != 1 or rows.dtype.kind not in "iu":
            raise TypeError(f"rows are asked for by a tensor [B] of whole numbers, not {rows.dtype} {list(rows.shape)}")
        found = torch.empty(len(rows), self.shape[1])
        shard, place = self._shards.find(rows)
        order = np.argsort(shard, kind="stable")
        for here in np.split(order, np.flatnonzero(np.diff(shard[order])) + 1) if len(rows) else ():
            z, _ = self._shards[shard[here[0]]]
            found[torch.from_numpy(here)] = z[torch.from_numpy(place[here])].float()
        return found

    def whole(self) -> Tensor:
        """All of them in memory.  -> [N, D] float32"""
        found = torch.empty(self.shape)
        for k, start in enumerate(self._shards.starts[:-1].tolist()):
            z, _ = self._shards[k]
            found[start : start + len(z)] = z
        return found


class Ids(Sequence[str]):
    """The ids of all shards in order, each decoded when it is asked for."""

    def __init__(self, shards: Shards) -> None:
        self._shards = shards

    def __len__(self) -> int:
        return len(self._shards)

    def __getitem__(self, row: int) -> str:
        shard, place = self._shards.find(np.array([row]))
        return self._shards[shard[0]][1][int(place[0])]

    def __iter__(self) -> Iterator[str]:
        for k in range(len(self._shards.heads)):
            yield from self._shards[k][1]


# -- the index -----------------------------------------------------------------------------------------


def index_of(path: str | Path) -> Path:
    """The index of a folder of shards; of anything else, itself."""
    return Path(path) / INDEX if Path(path).is_dir() else Path(path)


def write_index(folder: Path, heads: Sequence[Head], made_by: dict[str, Any]) -> Path:
    """Merge shards that lie in one folder: say which they are, in which order. Written atomically."""
    shards = [
        {"name": head.path.name, "rows": head.rows, "bytes": head.path.stat().st_size, "checksum": head.checksum}
        for head in heads
    ]
    content = {"format": _FORMAT, "made_by": made_by, "shards": shards}
    content["checksum"] = _checksum_of_index(content)
    write_text(folder / INDEX, json.dumps(content, indent=1) + "\n")  # ASCII: a label may be no UTF-8
    return folder / INDEX


def read_index(path: Path, verify: bool = False) -> tuple[dict[str, Any], list[Head]]:
    """What an index says of the making, and its shards, whose sizes and headers have been looked at.

    The tensors too where there are few, or with `verify`. Raises Unsound for an index or a shard that is damaged,
    and for one that is absent, with its name.
    """
    content = _parse_index(path)
    entries = content["shards"]
    absent = [entry["name"] for entry in entries if not (path.parent / entry["name"]).is_file()]
    if absent:
        raise Unsound(
            f"{len(absent)} of the {len(entries)} shards of {path} are absent, first {absent[0]}",
            "bring them back, or run python -m pc_clip embeddings again to make them",
        )
    heads = [_check_shard(path.parent, entry) for entry in entries]
    if len({(head.width, head.dtype) for head in heads}) != 1:
        raise Unsound(f"the shards of {path} are of different models", f"delete {path.parent} and make them again")
    if verify or sum(entry["bytes"] for entry in entries) <= VERIFY_UP_TO:
        for head in heads:
            read_file(head, verify=True)
    return content["made_by"], heads


def _parse_index(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        said = content.pop("checksum")
        if said == _checksum_of_index(content) and content["format"] == _FORMAT and content["shards"]:
            return content
    except (ValueError, KeyError, TypeError, AttributeError):
        pass
    raise Unsound(
        f"{path} is damaged, or no index of embeddings",
        "run python -m pc_clip embeddings again: it keeps the shards and writes the index anew",
    )


def _check_shard(folder: Path, entry: dict[str, Any]) -> Head:
    path = folder / entry["name"]
    if (size := os.path.getsize(path)) != entry["bytes"]:
        raise Unsound(f"{path} is damaged: {size} bytes, where {folder / INDEX} says {entry['bytes']}")
    head = read_head(path)
    if (head.rows, head.checksum) != (entry["rows"], entry["checksum"]):
        raise Unsound(f"{path} is another one than {folder / INDEX} says", "run python -m pc_clip embeddings again")
    return head


def _checksum_of_index(content: dict[str, Any]) -> str:
    return f"{zlib.crc32(json.dumps(content, sort_keys=True).encode()):08x}"
