#!/usr/bin/env python
"""Evaluate a CLIP model: checkpoint -> results/*.json.

With no argument it evaluates the embedded example's model, before and after finetuning if that has been run.
    python run.py --dataset cifar100 --checkpoint ckpt.pt
    python run.py --mode rank --images FOLDER --attribute "a larger animal" --against "a smaller animal"
The checkpoint is a run's folder, a .safetensors file, or anybody's state dict (.pt); without one the
pretrained model is evaluated (--model.name, --model.pretrained).
"""

import dataclasses
import logging
import sys
from collections.abc import Sequence

import jsonargparse

from pc_clip.config import EvaluateConfig
from pc_clip.configure import configure
from pc_clip.errors import run_script
from pc_clip.evaluate import evaluate, example_checkpoints
from pc_clip.report import show


def main(argv: Sequence[str] | None = None) -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = jsonargparse.ArgumentParser(prog="run.py", description=__doc__)
    config = configure(EvaluateConfig, parser, argv)
    checkpoints = [config.checkpoint] if argv else example_checkpoints()
    results = [result for each in checkpoints for result in evaluate(dataclasses.replace(config, checkpoint=each))]
    show(results)


if __name__ == "__main__":
    run_script(main)
