"""What a result was made with: versions, commit, machine, command."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

import pc_clip
from pc_clip.core.errors import UserError, check_choice

PACKAGES = (
    "torch", "open_clip_torch", "transformers", "accelerate", "numpy", "safetensors", "tokenizers", "pillow", "timm",
    "pandas", "pyarrow",
)  # fmt: skip


def describe() -> dict[str, Any]:
    """Everything about here and now that a result may depend on. No host name and no user but in the command."""
    return {
        "pc_clip": pc_clip.__version__,
        "commit": commit(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in PACKAGES},
        "machine": f"{platform.system()} {platform.machine()}",
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "threads": torch.get_num_threads(),
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
    }


def commit() -> str | None:
    """The git commit of the code, with + when it had changes; None outside a checkout of its own."""
    root = Path(__file__).parents[2]

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=root, capture_output=True, text=True, check=True).stdout.strip()

    if not (root / ".git").exists():  # installed, perhaps inside another project's checkout
        return None
    try:
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def resolve_device(asked: str, setting: str = "device") -> str:
    """cpu or cuda: what was asked for, else the GPU if there is one. Raises UserError for a GPU that is not there."""
    check_choice(setting, asked or "cpu", ("cpu", "cuda"))
    if asked == "cuda" and not torch.cuda.is_available():
        raise UserError(
            f"{setting} is cuda, but torch finds no GPU here; leave it out, or install a CUDA build of torch"
        )
    return asked or ("cuda" if torch.cuda.is_available() else "cpu")
