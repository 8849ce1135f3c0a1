"""Atomic file writes, and a lock between processes."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from safetensors.torch import save_file
from torch import Tensor

from pc_clip.core.errors import UserError

DAY = 24 * 3600  # seconds


def write_text(path: Path, text: str) -> None:
    with _replacing(path) as part:
        part.write_text(text, encoding="utf-8")


def write_json(path: Path, content: Any) -> None:
    write_text(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    """A safetensors file. Tensors on a GPU are copied to the CPU."""
    on_cpu = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    with _replacing(path) as part:
        save_file(on_cpu, part, metadata)


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A file to write, which then replaces `path` at once: a reader sees the old content or all of the new.

    It lies in a folder of its own beside `path`, NAME.RANDOM.partial, because safetensors has a temporary file too.
    What killed writers left is removed after a day.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    for stale in path.parent.glob("[!.]*.partial"):
        with suppress(OSError):  # another process may be removing it
            if stale.is_dir() and max(entry.stat().st_mtime for entry in (stale, *stale.iterdir())) < time.time() - DAY:
                shutil.rmtree(stale)
    with tempfile.TemporaryDirectory(".partial", f"{path.name}.", path.parent) as folder:
        part = Path(folder) / "content"
        part.touch()
        mode = part.stat().st_mode
        yield part
        part.chmod(mode)  # safetensors leaves it readable by its owner alone
        with part.open("rb+") as file:
            os.fsync(file.fileno())  # else a power cut after the move may leave an empty file
        os.replace(part, path)


@contextmanager
def exclusive_lock(path: Path, busy: str) -> Iterator[None]:
    """Hold a lock file while the block runs; the system releases it when the process dies.

    The file is removed at the end, and so are the folders made for it if they are empty.
    Raises UserError(busy) while another process holds it.
    """
    made = [folder for folder in path.parents if not folder.exists()]
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise UserError(busy) from None
    try:
        yield
    finally:
        path.unlink(missing_ok=True)  # while locked: a process that opened it meanwhile sees that it is gone
        lock.release()
        with suppress(OSError):  # a folder that is not empty stays
            for folder in made:  # the innermost comes first
                folder.rmdir()
