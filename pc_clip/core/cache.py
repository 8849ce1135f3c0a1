"""On-disk cache of arrays: safetensors files, memory-mapped and checksummed. All of data/cache may be deleted."""

from __future__ import annotations

import hashlib
import json
import logging
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pc_clip.core.errors import UserError
from pc_clip.core.files import write_tensors

log = logging.getLogger(__name__)

CACHE = Path("data/cache/arrays")
VERIFY_UP_TO = 2 << 30  # bytes that are read in full when a file is opened: about a second


class CorruptFileError(UserError):
    """A file that is damaged, or something else than what was written there."""


def cached(
    name: str, key: Mapping[str, str], make: Callable[[], Mapping[str, np.ndarray]], cache: Path | None = None
) -> Mapping[str, np.ndarray]:
    """Arrays by name: memory-mapped from the cache's file of this key, or made and put there.

    A file that is damaged or of another key is made again with a warning. Several processes may do this at once.
    Where the cache cannot be written the arrays are used all the same, and a warning says why.
    """
    key = {name: str(value) for name, value in key.items()}
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32]
    path = (cache or CACHE) / f"{name}-{digest}.safetensors"
    if path.is_file():
        try:
            tensors, made_by = read_checked(path)
            if {name: made_by.get(name) for name in key} == key:
                return {name: tensor.numpy() for name, tensor in tensors.items()}
            log.warning("%s was made from something else; making it again", path)
        except CorruptFileError as error:
            log.warning("%s; making it again", error)
    arrays = {name: np.ascontiguousarray(array) for name, array in make().items()}
    try:
        write_checked(path, {name: torch.from_numpy(array) for name, array in arrays.items()}, key)
        tensors, _ = read_checked(path, verify=False)
        return {name: tensor.numpy() for name, tensor in tensors.items()}  # mapped, so that the made ones can be freed
    except (SafetensorError, OSError, CorruptFileError) as error:
        log.warning("%s cannot be written (%s); the next run will make it again", path, error)
    return arrays


def write_checked(path: Path, tensors: Mapping[str, Tensor], made_by: Mapping[str, str]) -> None:
    """A safetensors file with a checksum, written atomically and without a copy of tensors that are on the CPU."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_tensors(path, tensors, {**made_by, "checksum": tensor_checksum(tensors, made_by)})


def read_checked(path: Path, verify: bool | None = None) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The memory-mapped tensors of a safetensors file, and what made it. Raises CorruptFileError.

    verify: read all of it to compare the checksum; if None, only up to VERIFY_UP_TO bytes. The size is checked always.
    """
    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (mapped, not read)
            made_by = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise CorruptFileError(f"{path} is not a whole safetensors file ({error})") from error
    checksum = made_by.pop("checksum", None)
    if verify is None:
        verify = path.stat().st_size <= VERIFY_UP_TO
    if verify and checksum and checksum != tensor_checksum(tensors, made_by):
        raise CorruptFileError(f"{path} is damaged: its checksum is wrong")
    return tensors, made_by


def tensor_checksum(tensors: Mapping[str, Tensor], made_by: Mapping[str, str]) -> str:
    """CRC-32 of the metadata and of names, types, shapes and values; a GiB takes 0.16 s."""
    total = zlib.crc32(json.dumps(sorted(made_by.items())).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        total = zlib.crc32(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode(), total)
        if tensor.numel():
            total = zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy(), total)
    return f"{total:08x}"
