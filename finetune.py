#!/usr/bin/env python
"""Finetune a CLIP model: images + sentences -> runs/NAME/.

With no argument it trains on the embedded example. The paper's run is
    python finetune.py --config configs/pc_clip_coco.yaml
Any setting can be given again as a flag: --train.lr 1e-8. On several GPUs: accelerate launch finetune.py ...
"""

import logging
import shlex
from collections.abc import Sequence
from pathlib import Path

import jsonargparse
from accelerate import PartialState

from pc_clip import methods
from pc_clip.config import FinetuneConfig
from pc_clip.configure import configure, peek
from pc_clip.errors import run_script
from pc_clip.generate import write_missing_example
from pc_clip.training import PATIENCE, finetune

CONFIGS = Path(__file__).parent / "configs"
DEFAULTS = {  # by --method, where no config is named
    "pairwise": "example.yaml",
    "contrastive": "example_captions.yaml",
    "preference": "example_dpo.yaml",
    "change": "example_change.yaml",
}


def main(argv: Sequence[str] | None = None) -> Path:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    parser = jsonargparse.ArgumentParser(prog="finetune.py", description=__doc__)
    method = peek(argv, "method", None, FinetuneConfig.method)
    options = {method: methods.find(method).Config}
    default = CONFIGS / DEFAULTS.get(method, "example.yaml")
    config = configure(FinetuneConfig, parser, argv, default=default, options=options)
    with PartialState(cpu=config.device == "cpu", **PATIENCE.to_kwargs()).main_process_first():
        write_missing_example(config.data)
    run = finetune(config)
    words = ["--dataset", config.data.dataset, *(["--root", config.data.root] if config.data.root else [])]
    table = config.data.dataset == "tsv"
    words += [*(["--split", "TABLE"] if table else []), "--checkpoint", str(run)]
    told = " (TABLE: the name or path of the table held out)" if table else ""
    print(f"the model is in {run}; evaluate it: python run.py {shlex.join(words)}{told}")
    return run


if __name__ == "__main__":
    run_script(main)
