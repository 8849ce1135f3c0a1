"""A run's folder holds all that is needed to repeat it: config.yaml (resolved), environment.json (versions, commit,
hashes of data and start), metrics.jsonl, state.safetensors (to continue) and model.safetensors.

Here is whether a folder is this run's, another's or an unfinished one, and how it is begun and deleted.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from pc_clip.core.cli import dump
from pc_clip.core.config.settings import identity
from pc_clip.core.config.train import FinetuneConfig
from pc_clip.core.errors import UserError
from pc_clip.core.files import exclusive_lock, write_json, write_text
from pc_clip.core.paths import MODEL_FILE, STATE_FILE, checkpoint_file
from pc_clip.data import differences
from pc_clip.data.dataset import Dataset, digest
from pc_clip.data.download import file_digest
from pc_clip.data.embedding_shards import index_of
from pc_clip.data.statements import files_of

log = logging.getLogger(__name__)

LOCK = ".lock"  # in the run's folder while it is trained
ANEW = "Choose another --name, or --overwrite true to delete it."


@contextmanager
def locked(run: Path) -> Iterator[None]:
    """The folder for this process alone, without what killed writers left. Raises UserError while another has it."""
    busy = (
        f"another process is training {run}; let it finish or stop it, or choose another --name "
        f"(on a file system without locks, if there surely is none, delete {run / LOCK})"
    )
    with exclusive_lock(run / LOCK, busy):
        for partial in run.glob("*.partial"):
            shutil.rmtree(partial)
        yield


def already_done(run: Path, config: FinetuneConfig, learnt_from: dict[str, str]) -> bool:
    """Whether this very run is finished. Raises UserError when the folder holds another, or an unfinished one."""
    if config.overwrite and not config.resume:
        return False
    settings, model, state = (run / name for name in ("config.yaml", MODEL_FILE, STATE_FILE))
    if not settings.is_file():
        for path in (model, state):
            if path.exists():
                raise UserError(f"{run} holds a {path.name} that no config describes; choose another --name")
        return False
    changed = _changes(yaml.safe_load(settings.read_text()), json.loads(json.dumps(identity(config))))
    if changed:
        raise UserError(f"{run} holds a run with other settings ({', '.join(changed[:4])}). {ANEW}")
    check_data(run, learnt_from)
    if model.is_file():
        log.info("%s is finished already; --overwrite true runs it again", run)
    elif state.is_file() and not config.resume:
        raise UserError(f"{run} was interrupted. Continue it with --resume true, or --overwrite true to start again.")
    return model.is_file()


def check_data(run: Path, now: dict[str, str]) -> None:
    """Raise UserError where a run began with other data than these, by kind: what it learns from, or is chosen on."""
    before = json.loads((run / "environment.json").read_text())["data"]
    if others := [name for name, value in now.items() if before.get(name, value) != value]:
        raise UserError(f"{run} learnt from other data: its {' and '.join(others)} have changed since. {ANEW}")


def _changes(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    """Settings that differ among those of `new`, by dotted name."""
    changes = []
    for key, now in new.items():
        before = old.get(key)
        if isinstance(now, dict):
            changes += _changes(before if isinstance(before, dict) else {}, now, f"{prefix}{key}.")
        elif before != now:
            changes.append(f"{prefix}{key}: {before} there, {now} now")
    return changes


def hashes(data: Dataset, config: FinetuneConfig) -> dict[str, str]:
    """Content hashes of a run's data."""
    digests = {"images": data.fingerprint, "captions": hashlib.sha256(repr(data.captions).encode()).hexdigest()[:16]}
    files = {}
    if config.model.start:
        files["start"] = checkpoint_file(config.model.start)
    if (
        config.data.embeddings and index_of(config.data.embeddings).is_file()
    ):  # an absent one is told of when it is read
        files["embeddings"] = index_of(config.data.embeddings)  # the index has the checksum of every shard
    if config.data.differences:
        files["differences"] = differences.find(config.data.differences)
    options = getattr(config, config.method, None)
    for name in ("captions", "captioned_differences"):
        if path := getattr(options, name, ""):
            files[f"{config.method}.{name}"] = differences.find(path)
    digests |= {name: file_digest(path, "sha256")[:16] for name, path in files.items()}
    if config.data.statements:
        paths = [path for given in config.data.statements for path in files_of(Path(given))]
        digests["statements"] = digest([file_digest(path, "sha256") for path in paths])
    elif data.statements:
        digests["statements"] = digest(data.statements)
    return digests


def delete(run: Path) -> None:
    """Remove a run, in an order that leaves a sound run or none whenever it is killed. Its lock is held, and stays."""
    for name in (MODEL_FILE, STATE_FILE, "config.yaml"):
        (run / name).unlink(missing_ok=True)
    for path in run.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != LOCK:
            path.unlink()


def begin(run: Path, config: FinetuneConfig, about: dict[str, Any]) -> None:
    write_json(run / "environment.json", about)
    settings = yaml.safe_load(dump(config)) | {"resume": False, "overwrite": False}
    write_text(run / "config.yaml", yaml.safe_dump(settings, sort_keys=False))  # marks a run, so it comes last
