"""All benchmarks, into results.csv and RESULTS.md.

    python bench/run.py                      # about 20 minutes on two cores
    python bench/run.py --only step data     # some of them
    python bench/run.py --threads 8

Ratios are against bench/reference.py, the published loop restated; both take turns in one process. On a machine with
a GPU `gpu` is measured too. bench/writers.py, which needs a language model, stands by itself.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from record import record

PARTS = ("step", "data", "evaluation", "scaling", "gpu")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    for part in arguments.only:
        if part == "gpu" and not torch.cuda.is_available():
            print("gpu: left out, because torch finds none here")
            continue
        record(importlib.import_module(part).figures(arguments.threads))


if __name__ == "__main__":
    main()
