"""Finetune a CLIP model: images + sentences -> runs/NAME/.

    python finetune.py                                      # PC-CLIP on the embedded example
    python finetune.py --config configs/pc_clip_coco.yaml   # the paper's run
    accelerate launch finetune.py --config ...              # the same on several GPUs or machines

Any setting can be given again as a flag: --train.lr 1e-8. --method NAME --help lists the settings of a method.
"""

from __future__ import annotations

import logging
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from pc_clip.core.cli import configure, given
from pc_clip.core.config.train import METHODS, FinetuneConfig
from pc_clip.core.errors import check_choice, run_script
from pc_clip.core.paths import configs_folder

DEFAULTS = {  # by --method, where no config is named
    "pairwise": "example.yaml",
    "contrastive": "example_captions.yaml",
    "preference": "example_dpo.yaml",
    "change": "example_change.yaml",
}


def main(argv: Sequence[str] | None = None) -> Path:
    """Read the settings, then train; returns the run's folder."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    argv = list(sys.argv[1:] if argv is None else argv)
    method = str(given(argv).get("method", FinetuneConfig.method))
    check_choice("method", method, METHODS)
    default = configs_folder() / DEFAULTS[method]
    config = configure(FinetuneConfig, "finetune.py", __doc__, argv, default=default, options={method: METHODS[method]})
    run = train(config)
    words = ["--dataset", config.data.dataset, *(["--root", config.data.root] if config.data.root else [])]
    print(f"the model is in {run}; evaluate it: python run.py {shlex.join([*words, '--checkpoint', str(run)])}")
    return run


def train(config: FinetuneConfig) -> Path:
    """Train by settings that have been read; the example's sentences are written first where they are not there."""
    from accelerate import PartialState

    from pc_clip.train.loop import PATIENCE, finetune
    from pc_clip.write.generate import write_missing_example

    with PartialState(cpu=config.device == "cpu", **PATIENCE.to_kwargs()).main_process_first():
        write_missing_example(config.data)
    return finetune(config)


def command() -> None:
    run_script(main)


if __name__ == "__main__":
    command()
