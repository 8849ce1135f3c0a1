"""Image embeddings on the disk: one safetensors file, or a folder of such shards behind an index.

A file holds z [n, D] (float32 or float16) and the n ids (JSON, as bytes); its header says what made it. The images of
a large set are embedded in units, a shard each, which the processes of one launch share. A unit whose shard is there
and opens is done, so a killed run continues. FOLDER/index.json, written last, lists the shards with rows and bytes.
"""

from __future__ import annotations

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
from pc_clip.core.files import write_json
from pc_clip.data.dataset import Dataset, images_alone, subset
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
    try:
        z, ids = tensors["z"], json.loads(tensors["ids"].numpy().tobytes())
        if "image_tower" not in made_by or z.ndim != 2 or len(ids) != len(z):
            raise ValueError(f"z is {list(z.shape)}, with {len(ids)} ids")
    except (KeyError, ValueError, TypeError) as error:
        raise CorruptFileError(f"{path} is damaged, or no file of embeddings made by pc_clip ({error})") from error
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


def _entry(shard: Shard) -> dict[str, Any]:
    return {"name": shard.path.name, "rows": len(shard.z), "bytes": shard.path.stat().st_size}


def read(path: Path) -> tuple[dict[str, str], list[Shard]]:
    """The metadata of a file or index, and its shards. Raises CorruptFileError, with the shard at fault."""
    if path.suffix != ".json":
        shard = read_shard(path)
        return shard.made_by, [shard]
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        made_by, entries = dict(content["made_by"]), content["shards"]
        verify = sum(entry["bytes"] for entry in entries) <= VERIFY_UP_TO
        shards = [read_shard(path.parent / Path(entry["name"]).name, verify) for entry in entries]
        for shard, entry in zip(shards, entries):
            if _entry(shard) != entry or any(shard.made_by[name] != made_by[name] for name in IDENTITY):
                raise CorruptFileError(f"{shard.path} is another one than {path} says")
    except (ValueError, KeyError, TypeError, CorruptFileError) as error:
        what = error if isinstance(error, CorruptFileError) else f"{path} is not a whole embedding index ({error})"
        raise CorruptFileError(f"{what}; run python -m pc_clip embeddings again: it keeps whole shards") from error
    return made_by, shards


def read_if_made_by(path: Path, expected: Mapping[str, str]) -> list[Shard]:
    """The shards of a file or an index; none, with a warning, where it is damaged or something else was expected."""
    if not path.is_file():
        return []
    try:
        made_by, shards = read(path)
    except CorruptFileError as error:
        log.warning("%s; computing it again", error)
        return []
    if any(made_by.get(name) != expected[name] for name in IDENTITY):
        log.warning("%s is of another model or of other images than its name says; computing it again", path)
        return []
    return shards


# -- units of work -------------------------------------------------------------------------------------


class Work(NamedTuple):
    """An image set in units, a shard each. name: of its folder, apart from those of other data, or of the same once it
    has changed. units: name -> what opens its images. images: how many there are in all, where that is known."""

    name: str
    label: str
    fingerprint: str
    units: dict[str, Callable[[], Dataset]]
    images: int | None = None


def blocks(data: Dataset, shard_size: int = 65536) -> Work:
    """A data set in blocks of so many rows, the last one shorter."""
    pictures = images_alone(data)
    parts = [np.arange(start, min(start + shard_size, len(data))) for start in range(0, len(data), shard_size)]
    units = {f"{rows[0]:09d}-{rows[-1] + 1:09d}": partial(subset, pictures, rows) for rows in parts}
    name = printable(f"{data.name}-{data.split or 'all'}-{data.fingerprint}")
    return Work(name, data.label, data.fingerprint, units, len(data))


def tars(root: Path, split: str | None) -> Work:
    """A WebDataset, a unit a tar. None of them is opened before its turn; labels and captions need not be there."""
    label, files = find_tars(root, split)
    known = fingerprint(root, files)
    units = {printable(path.stem): partial(open_tar, path) for path in files}
    return Work(printable(f"webdataset-{label}-{known}"), f"webdataset/{label}", known, units)


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
    A unit whose shard is there and opens is done. Returns the shards; nothing in processes other than the main one,
    which do not see the index being written.
    """
    made_by = {**made_by, "fingerprint": work.fingerprint}

    def done(path: Path) -> list[Shard]:
        shards = read_if_made_by(path, made_by)
        return shards if may_leave_out or not any(shard.left_out for shard in shards) else []

    shards = done(folder / INDEX)
    units = {} if shards else {folder / f"{name}.safetensors": images for name, images in work.units.items()}
    mine = list(units.items())[processes.rank :: processes.size]
    total, hidden = work.images if processes.size == 1 else None, None if processes.is_main else True
    with tqdm(desc=f"embedding {work.label}", total=total, unit=" images", leave=False, disable=hidden) as bar:
        for number, (path, images) in enumerate(mine, 1):
            bar.set_postfix_str(f"shard {number} of {len(mine)}", refresh=False)
            if done(path):
                continue
            z, ids, left_out = encode(images(), bar.update)
            if left_out:
                log.warning("%s: %d broken images left out, first %s", path.stem, len(left_out), printable(left_out[0]))
            write_shard(path, z, ids, {**made_by, "left_out": json.dumps(left_out)})
    processes.wait()
    if shards or not processes.is_main:
        return shards if processes.is_main else []
    if absent := [path for path in units if not path.is_file()]:
        raise UserError(f"{absent[0]} of another process is not seen here; all processes need one shared folder")
    shards = [read_shard(path) for path in units]
    if not any(len(shard.z) for shard in shards):
        raise UserError(f"{work.label} holds no image that can be read")
    if lost := sum(len(shard.left_out) for shard in shards):
        log.warning("%d broken images were left out in all", lost)
    write_json(folder / INDEX, {"made_by": made_by, "shards": [_entry(shard) for shard in shards]})
    return shards
