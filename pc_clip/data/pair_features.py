"""What a frozen pair encoder sees of all pairs, found once and kept in a file that is mapped into memory."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock
from torch import Tensor

from pc_clip.core.files import write_json
from pc_clip.data.dataset import Dataset, digest
from pc_clip.data.pairs import seen_by_encoder
from pc_clip.models.clip import Clip, hash_tensors

log = logging.getLogger(__name__)

CACHE = Path("data/cache/pairs")


class Features:
    """The encoder's tokens of data.changes, float16 on the disk: [N, S, V], row n of data.changes[n].

    They are looked for under a key of the encoder's weights, the images and the pairs; a file is used once its JSON,
    which is written last, says that it is whole. All of data/cache may be deleted at any time.
    """

    def __init__(self, clip: Clip, data: Dataset, batch_size: int = 64, workers: int = 0) -> None:
        """Finds what is not there yet. Raises UserError for an image that cannot be read."""
        pairs = [(change.before, change.after) for change in data.changes]
        encoder = clip.change.encoder
        weights = (
            clip.image_tower_hash(),
            hash_tensors(encoder.state_dict(), extra=f"{clip.name} {encoder.intra_layers}"),
        )
        key = digest(weights, data.fingerprint, pairs, clip.device.type)  # the decoder and the text tower have no part
        path, mark = CACHE / f"{key}.npy", CACHE / f"{key}.json"
        shape = len(pairs), 2 * (encoder.patches + 1), encoder.width
        CACHE.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_suffix(".lock")):  # so that what a killed run has left is written over, not left
            if not _whole(path, mark, shape):
                log.info("%s: %.1f GB of what the frozen encoder sees", path, 2 * np.prod(shape) / 1e9)
                part = path.with_suffix(".part")
                _write(part, clip, data, shape, batch_size, workers)
                part.replace(path)
                write_json(mark, {"shape": list(shape), "data": data.label, "model": clip.describe()})
        self.tokens = np.load(path, mmap_mode="r")

    def __getitem__(self, rows: np.ndarray) -> Tensor:
        """[B] rows -> [B, S, V] float32"""
        return torch.from_numpy(self.tokens[rows].astype(np.float32))


def _whole(path: Path, mark: Path, shape: tuple[int, ...]) -> bool:
    try:
        return path.is_file() and json.loads(mark.read_text())["shape"] == list(shape)
    except (OSError, ValueError, KeyError):
        return False


@torch.no_grad()
def _write(part: Path, clip: Clip, data: Dataset, shape: tuple[int, ...], batch_size: int, workers: int) -> None:
    tokens = np.lib.format.open_memmap(part, mode="w+", dtype=np.float16, shape=shape)
    _reserve(part)
    row = 0
    for seen in seen_by_encoder(clip, data, batch_size, workers, "encoding pairs"):
        tokens[row : row + len(seen)] = seen.float().cpu().numpy()
        row += len(seen)
    tokens.flush()


def _reserve(path: Path) -> None:
    """Have the disk's blocks of a file at once: where they run out under a mapped one, the process is killed (SIGBUS).

    Raises OSError, and the file is deleted.
    """
    if not hasattr(os, "posix_fallocate"):  # macOS
        return
    try:
        with path.open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    except OSError as error:
        path.unlink()
        raise OSError(error.errno, error.strerror, str(path)) from error
