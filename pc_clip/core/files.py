"""Files that are whole or not there, and folders that one process has to itself.

A file is written in a folder beside its place, NAME.XXX.partial, and moved into it once it is on the disk. A writer
that is killed leaves that folder; the next write beside it clears it away, and the lock in it says whether its
writer is gone. Process numbers would not say: they are used again, and mean nothing on another machine.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import platform
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from hashlib import sha256
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from safetensors.torch import save_file
from torch import Tensor

from pc_clip.core.errors import UserError

log = logging.getLogger(__name__)

LOCK = "lock"
DAY = 24 * 3600  # seconds
NOT_SUPPORTED = {errno.ENOSYS, errno.ENOTSUP, errno.EINVAL, errno.ENOLCK}  # by this file system


def write_text(path: Path, text: str) -> None:
    _whole(path, lambda new: new.write_text(text, encoding="utf-8"))


def write_json(path: Path, content: Any) -> None:
    write_text(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    """A safetensors file. Tensors are brought to the CPU."""
    plain = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    _whole(path, lambda new: save_file(plain, new, metadata))


@contextmanager
def alone(lock: Path, busy: str) -> Iterator[None]:
    """Hold a lock file while the block runs. The system lets go of it when the process dies, however it dies.

    What killed writers left in its folder is cleared away. The file, and the folders made for it, are removed at
    the end, the folders if nothing else came into them.
    Raises UserError(busy) when another process holds it.
    """
    made = [folder for folder in lock.parents if not folder.exists()]
    lock.parent.mkdir(parents=True, exist_ok=True)
    held = FileLock(lock, timeout=0)
    try:
        held.acquire()
    except Timeout:
        raise UserError(busy) from None
    except OSError as error:
        if error.errno not in NOT_SUPPORTED:
            raise
        log.warning("%s cannot be locked (%s): see to it yourself that no two processes write there", lock, error)
    try:
        _clear(lock.parent)
        yield
    finally:
        lock.unlink(missing_ok=True)  # while it is held: who opened it meanwhile finds that it is gone
        held.release()
        with suppress(OSError):
            for folder in made:  # the innermost comes first
                folder.rmdir()


def _whole(path: Path, write: Callable[[Path], Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    _clear(path.parent)
    with _workplace(path) as folder:
        new = folder / "content"  # no name that somebody looks for
        write(new)
        os.chmod(new, 0o666 & ~_UMASK)  # safetensors would leave it readable by its owner alone
        _sync(new)
        os.replace(new, path)


def _sync(path: Path) -> None:
    """Bring a file to the disk, so that a power cut after the move cannot leave an empty one in its place.

    It costs little: 0.3 s for 1 GiB that took 2.2 s to write, and 0.2 ms for a small file. The folder is not
    synced: a power cut may bring back the file that stood there before, which was whole as well.
    """
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    except OSError as error:
        if error.errno not in NOT_SUPPORTED:
            raise
    finally:
        os.close(file)


# -- where a file is written ---------------------------------------------------------------------------


@contextmanager
def _workplace(path: Path) -> Iterator[Path]:
    """A folder for one write. A folder, because safetensors writes to a temporary file of its own beside its target."""
    folder, lock = _locked_folder(path)
    try:
        yield folder
    finally:
        lock.release()  # first, because a network file system does not remove a folder with an open file in it
        _remove(folder)


def _locked_folder(path: Path) -> tuple[Path, FileLock]:
    while True:
        folder = Path(tempfile.mkdtemp(".partial", f"{path.name}.{_MACHINE}-", path.parent))
        lock = FileLock(folder / LOCK, timeout=0)
        try:
            lock.acquire()
            if (folder / LOCK).exists():
                return folder, lock
            lock.release()
        except (Timeout, FileNotFoundError, FileExistsError):  # the last where it vanishes while it is looked at
            pass  # before it was locked another process took it for one that a killed writer left; make a new one
        except OSError as error:
            if error.errno not in NOT_SUPPORTED:
                raise
            return folder, lock  # unlocked; but where this cannot be locked, nobody who clears up can lock it either


def _clear(parent: Path) -> None:
    """Remove what killed writers left in a folder.

    Some network file systems lock within one machine only, so what another machine wrote is left alone for a day.
    """
    for left in parent.glob("*.partial"):
        with suppress(OSError):
            if left.is_dir() and (f".{_MACHINE}-" in left.name or time.time() - left.stat().st_mtime > DAY):
                _remove(left)


def _remove(folder: Path) -> None:
    """Remove a folder of `_workplace`, unless its writer lives."""
    with suppress(OSError, Timeout):
        names = os.listdir(folder)  # once: what comes later is of a writer that has only just begun
        if LOCK in names:
            with FileLock(folder / LOCK, timeout=0):
                (folder / LOCK).unlink()
        for name in names:
            (folder / name).unlink(missing_ok=True)
        folder.rmdir()


def _machine() -> str:
    """Ten digits for this machine since it was started; containers on it are the same machine."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    return sha256((boot.read_text() if boot.is_file() else platform.node()).encode()).hexdigest()[:10]


def _umask() -> int:
    """The process's umask, which can only be read by setting it."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


_MACHINE = _machine()
_UMASK = _umask()
