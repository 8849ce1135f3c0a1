"""Files of embeddings: one safetensors file, or shards behind an index. Damage is found; rows stay on the disk.

A file holds z [n, D] (float32 or float16), and its header says what made it. The n ids are in the header too; in a
shard, which may be one of thousands, they are tensors (`ids.bytes`, UTF-8, and `ids.ends`), so that they can be looked
up where they lie. There are two CRC-32: `checksum` of the tensors, `head` of the rest of the header. Size and header
are checked whenever a file is opened, the tensors where there are at most VERIFY_UP_TO bytes of them, or where that is
asked for.

An index, FOLDER/index.json, names the shards in its folder, in order, with rows, bytes and checksum of each. It is
written last; nothing is copied. It is what `--data.embeddings` takes.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pc_clip.errors import UserError
from pc_clip.files import write_json, write_tensors

INDEX = "index.json"
VERIFY_UP_TO = 2 << 30  # bytes that are read in full on opening: about a second

TENSORS = ("z", "ids.bytes", "ids.ends")  # in the order of the checksum
_FORMAT = "pc_clip embeddings 1"
_OLDER = {"model", "image_tower", "data", "fingerprint", "ids"}  # all that a cache file's header had before checksums


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
    def is_as_we_wrote_it(self) -> bool:
        """Whether it has checksums, or is of the time before them. Otherwise a byte of a name may be another."""
        return "head" in self.made_by or self.made_by.keys() == _OLDER


def write_file(path: Path, z: Tensor, ids: Sequence[str], made_by: dict[str, str]) -> None:
    """One file for a whole data set, written atomically: a reader sees all of it or none. z: [n, D]; ids: n."""
    _write(path, {"z": z.detach().cpu().contiguous()}, {**made_by, "ids": json.dumps(list(ids))})


def write_shard(path: Path, z: Tensor, ids: Sequence[str], made_by: dict[str, str]) -> None:
    """One of many files, whose ids can be looked up where they lie; written atomically. z: [n, D]; ids: n."""
    names = [name.encode() for name in ids]
    tensors = {
        "z": z.detach().cpu().contiguous(),
        "ids.bytes": torch.frombuffer(bytearray(b"".join(names)), dtype=torch.uint8)
        if names
        else torch.empty(0).byte(),
        "ids.ends": torch.tensor([len(name) for name in names], dtype=torch.int64).cumsum(0),
    }
    _write(path, tensors, made_by)


def _write(path: Path, tensors: dict[str, Tensor], made_by: dict[str, str]) -> None:
    said = {**made_by, "checksum": _checksum(tensors.values())}
    said["head"] = _checksum_of_head(said, tensors["z"])
    write_tensors(path, tensors, said)


def read_head(path: Path) -> Head:
    """Size and header of a file, checked; no row is read. Raises UserError for what is damaged or something else."""
    try:
        with safe_open(path, "pt") as file:
            made_by, names = file.metadata() or {}, set(file.keys())
            if (
                "image_tower" not in made_by
                or "z" not in names
                or not ({"ids"} & made_by.keys() or names >= {*TENSORS})
            ):
                raise UserError(
                    f"{path} is no file of embeddings made by pc_clip: it does not say which images or tower"
                )
            z = file.get_tensor("z")  # a mapping: nothing is read
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is not a whole safetensors file ({error}); make it again") from error
    if z.ndim != 2 or not z.is_floating_point():
        raise UserError(f"{path}: z is {list(z.shape)} of {z.dtype}; [images, numbers] was expected")
    if "head" in made_by and made_by["head"] != _checksum_of_head(made_by, z):
        raise UserError(f"{path} is damaged: its header has another checksum than the one it was written with")
    return Head(path, z.shape[0], z.shape[1], str(z.dtype).removeprefix("torch."), made_by)


def read_file(head: Head, verify: bool = False) -> tuple[Tensor, Sequence[str]]:
    """z, memory-mapped, [n, D] as it is on the disk, and the ids.

    Raises UserError where the tensors are not those that were written; verify: look, however large they are.
    """
    tensors = _map(head.path)
    size = sum(value.nbytes for value in tensors.values())
    if head.checksum and (verify or size <= VERIFY_UP_TO) and head.checksum != _checksum(tensors.values()):
        raise UserError(f"{head.path} is damaged: its content has another checksum than the one it was written with")
    ids = _ids(head, tensors)
    if len(ids) != head.rows:
        raise UserError(f"{head.path} is damaged: {head.rows} rows, but {len(ids)} ids")
    return tensors["z"], ids


def _map(path: Path) -> dict[str, Tensor]:
    with safe_open(path, "pt") as file:
        there = file.keys()
        return {name: file.get_tensor(name) for name in TENSORS if name in there}


def _ids(head: Head, tensors: dict[str, Tensor]) -> Sequence[str]:
    return _Names(tensors) if "ids.ends" in tensors else json.loads(head.made_by["ids"])


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

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self._bytes, self._ends = tensors["ids.bytes"].numpy(), tensors["ids.ends"].numpy()

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, row: int) -> str:
        return self._bytes[self._ends[row - 1] if row else 0 : self._ends[row]].tobytes().decode()

    def __iter__(self) -> Iterator[str]:
        start = 0
        content = self._bytes.tobytes()
        for end in self._ends.tolist():
            yield content[start:end].decode()
            start = end


# -- many files ----------------------------------------------------------------------------------------


class Rows:
    """[N, D] embeddings that lie in the shards of an index, read where they are asked for.

    rows[of a LongTensor [B]] -> [B, D] float32. Shards are mapped when a row of theirs is first wanted.
    """

    def __init__(self, heads: Sequence[Head]) -> None:
        self._shards = _Shards(heads)
        self.shape = torch.Size((len(self._shards), heads[0].width))

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

    def __init__(self, heads: Sequence[Head]) -> None:
        self._shards = _Shards(heads)

    def __len__(self) -> int:
        return len(self._shards)

    def __getitem__(self, row: int) -> str:
        shard, place = self._shards.find(np.array([row]))
        return self._shards[shard[0]][1][int(place[0])]

    def __iter__(self) -> Iterator[str]:
        for k in range(len(self._shards.heads)):
            yield from self._shards[k][1]


class _Shards:
    """Which shard a row is in, and the shards that were looked at, mapped."""

    def __init__(self, heads: Sequence[Head]) -> None:
        self.heads, self._mapped = heads, {}
        self.starts = np.cumsum([0, *(head.rows for head in heads)])

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitem__(self, k: int) -> tuple[Tensor, Sequence[str]]:
        if k not in self._mapped:
            tensors = _map(self.heads[k].path)
            self._mapped[k] = tensors["z"], _ids(self.heads[k], tensors)
        return self._mapped[k]

    def find(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Of each row its shard, and its place there."""
        if len(rows) and not 0 <= rows.min() <= rows.max() < len(self):
            raise IndexError(f"rows {rows.min()} to {rows.max()} were asked for; there are {len(self)}")
        shard = np.searchsorted(self.starts, rows, side="right") - 1
        return shard, rows - self.starts[shard]


# -- the index -----------------------------------------------------------------------------------------


def write_index(folder: Path, heads: Sequence[Head], made_by: dict[str, Any]) -> Path:
    """Merge shards that lie in one folder: say which they are, in which order. Written atomically."""
    shards = [
        {"name": head.path.name, "rows": head.rows, "bytes": head.path.stat().st_size, "checksum": head.checksum}
        for head in heads
    ]
    content = {"format": _FORMAT, "made_by": made_by, "shards": shards}
    write_json(folder / INDEX, {**content, "checksum": _checksum_of_index(content)})
    return folder / INDEX


def read_index(path: Path, verify: bool = False) -> tuple[dict[str, Any], list[Head]]:
    """What an index says of the making, and its shards, whose sizes and headers have been looked at.

    The tensors too where there are few, or with `verify`. Raises UserError for an index or a shard that is damaged,
    and for one that is absent, with its name.
    """
    content = _parse_index(path)
    entries = content["shards"]
    absent = [entry["name"] for entry in entries if not (path.parent / entry["name"]).is_file()]
    if absent:
        raise UserError(
            f"{len(absent)} of the {len(entries)} shards of {path} are absent, first {absent[0]}; "
            "bring them back, or run python -m pc_clip.embeddings again to make them"
        )
    heads = [_check_shard(path.parent, entry) for entry in entries]
    if len({(head.width, head.dtype) for head in heads}) != 1:
        raise UserError(f"the shards of {path} are of different models; delete {path.parent} and make them again")
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
    raise UserError(
        f"{path} is damaged, or no index of embeddings; run python -m pc_clip.embeddings again: "
        "it keeps the shards and writes the index anew"
    )


def _check_shard(folder: Path, entry: dict[str, Any]) -> Head:
    path = folder / entry["name"]
    if (size := os.path.getsize(path)) != entry["bytes"]:
        raise UserError(f"{path} is damaged: {size} bytes, where {folder / INDEX} says {entry['bytes']}; make it again")
    head = read_head(path)
    if (head.rows, head.checksum) != (entry["rows"], entry["checksum"]):
        raise UserError(f"{path} is another one than {folder / INDEX} says; run python -m pc_clip.embeddings again")
    return head


def _checksum_of_index(content: dict[str, Any]) -> str:
    return f"{zlib.crc32(json.dumps(content, sort_keys=True).encode()):08x}"
