"""Run the package clip-benchmark on our models: `python -m pc_clip benchmark eval --model local-dir:FOLDER ...`.

Its own command line, with two fixes: torchvision is imported so that a CPU build of torch does not trip over
it, and numpy 2.4 no longer turns an array of one element into a number, which clip-benchmark 1.6.2 asks for
(its issue 147). Exact figures need --no_amp; --num_workers must not exceed the number of shards.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from pc_clip.core.errors import UserError
from pc_clip.models import torchvision_compat  # noqa: F401  (before clip_benchmark)


def scalar(value) -> float:
    """float(), also of an array with one element."""
    return value.item() if hasattr(value, "item") else float(value)


def main(argv: Sequence[str] | None = None) -> None:
    try:
        from clip_benchmark import cli
        from clip_benchmark.metrics import zeroshot_classification
    except ImportError as error:
        raise UserError(f"clip-benchmark is not installed ({error}); pip install clip-benchmark==1.6.2") from error
    zeroshot_classification.float = scalar
    before, sys.argv = sys.argv, ["clip_benchmark", *(sys.argv[1:] if argv is None else argv)]
    try:
        cli.main()
    finally:
        sys.argv = before
