"""Arrays that take long to make, kept in files: checked when opened, mapped into memory, made again if damaged.

What is kept: tokens, compiled differences, the anchor's embeddings. All of data/cache may be deleted at any time.
"""

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

from pc_clip.core.files import write_tensors

log = logging.getLogger(__name__)

CACHE = Path("data/cache/tokens")
FORMAT = 1  # of the files in the cache; a file of another is made again


class _Damaged(Exception):
    """A file of the cache that is not what it should be."""


def cached(
    name: str, key: Mapping[str, str], make: Callable[[], Mapping[str, np.ndarray]], cache: Path | None = None
) -> Mapping[str, np.ndarray]:
    """Arrays by name: from the cache's file of this key, mapped into memory, or made and put there.

    A file is checked when it is opened: its key, its format, and a checksum over all arrays with their shapes (13 ms
    for 86 MB). One that fails is made again with a warning. Several processes may do this at once. Where the cache
    cannot be written the arrays are used all the same, and a warning says why.
    """
    whole = json.dumps({"format": FORMAT, **key}, sort_keys=True)
    path = (cache or CACHE) / f"{name}-{hashlib.sha256(whole.encode()).hexdigest()[:32]}.safetensors"
    if path.is_file():
        try:
            return _open(path, whole)
        except (_Damaged, SafetensorError, OSError) as error:
            log.warning("%s is damaged (%s); making it again", path, error)
    arrays = {name: np.ascontiguousarray(array) for name, array in make().items()}
    try:
        tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
        write_tensors(path, tensors, {"key": whole, "checksum": _checksum(arrays)})
    except (SafetensorError, OSError) as error:
        log.warning("%s cannot be written (%s); the next run will make it again", path, error)
    return arrays


def _open(path: Path, key: str) -> dict[str, np.ndarray]:
    with safe_open(path, "pt") as file:
        about = file.metadata() or {}
        if about.get("key") != key:
            raise _Damaged("it was made from something else")
        arrays = {name: file.get_tensor(name).numpy() for name in file.keys()}  # noqa: SIM118  (mapped, not read)
    if about.get("checksum") != _checksum(arrays):
        raise _Damaged("its checksum is wrong")
    return arrays


def _checksum(arrays: Mapping[str, np.ndarray]) -> str:
    total = 0
    for name in sorted(arrays):
        total = zlib.crc32(f"{name} {arrays[name].dtype.str} {arrays[name].shape}".encode(), total)
        total = zlib.crc32(arrays[name].reshape(-1).view(np.uint8), total)
    return f"{total:08x}"
