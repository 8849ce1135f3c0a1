"""Files that are whole or not there: written beside their place, then moved into it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor


def write_text(path: Path, text: str) -> None:
    _whole(path, lambda new: new.write_text(text, encoding="utf-8"))


def write_json(path: Path, content: Any) -> None:
    write_text(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    """A safetensors file. Tensors are brought to the CPU."""
    plain = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    _whole(path, lambda new: save_file(plain, new, metadata))


def _whole(path: Path, write: Callable[[Path], Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        write(new)
        os.chmod(new, 0o666 & ~_UMASK)  # safetensors would leave it readable by its owner alone
        os.replace(new, path)
    finally:
        new.unlink(missing_ok=True)


def _umask() -> int:
    """The process's umask, which can only be read by setting it."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


_UMASK = _umask()
