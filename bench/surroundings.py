"""Where a benchmark runs: so many threads, a folder of its own. Both are as before afterwards."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch


@contextlib.contextmanager
def threads(n: int) -> Iterator[None]:
    """Compute with n threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def temporary_folder() -> Iterator[None]:
    """Work in a folder that is gone afterwards: data/cache/ and results/ are found from the working directory."""
    before = Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            yield
        finally:
            os.chdir(before)
