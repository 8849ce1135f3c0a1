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
from pc_clip.config import DataConfig, FinetuneConfig
from pc_clip.configure import configure, peek
from pc_clip.datasets import READERS
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
    print(f"the model is in {run}; evaluate it: {_how(config.data, run)}")
    return run


def _how(data: DataConfig, run: Path) -> str:
    """The command that measures a run on what was held out of its data."""
    words = ["--dataset", data.dataset, *(["--root", data.root] if data.root else [])]
    reader, split, told = READERS[data.dataset], data.split or "", ""
    kind, _, _ = split.rpartition("_")
    if data.dataset == "tsv" or (reader.is_table and reader.is_table(Path(split))):
        words, told = [*words, "--split", "HELD_OUT"], " (HELD_OUT: the name or path of the file held out)"
    elif f"{kind}_test" in reader.splits:  # of reformat_train
        words += ["--split", f"{kind}_test"]
    return f"python run.py {shlex.join([*words, '--checkpoint', str(run)])}{told}"


if __name__ == "__main__":
    run_script(main)
