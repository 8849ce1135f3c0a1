"""All benchmarks, into results.csv and RESULTS.md.

    python bench/run.py                      # about 25 minutes on two cores
    python bench/run.py --only step data     # some of them
    python bench/run.py --threads 8

Ratios are against bench/reference.py, the published loop restated; both take turns in one process. On a machine with
a GPU `gpu` is measured too. bench/writers.py, which needs a language model, and bench/peers.py, forty minutes of other
software's time, stand by themselves. Limits that were missed are named at the end, and the exit code is then 1.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from record import Missed, exit_if_missed, record

from pc_clip.core.errors import run_script

PARTS = ("step", "data", "evaluation", "scaling", "clusters", "preference", "change", "gpu")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    missed: list[Missed] = []
    for part in arguments.only:
        if part == "gpu" and not torch.cuda.is_available():
            print("gpu: left out, because torch finds none here")
            continue
        missed += record(importlib.import_module(part).figures(arguments.threads))
    exit_if_missed(missed)


if __name__ == "__main__":
    run_script(main)
