"""Evaluate a CLIP model: checkpoint -> results/*.json, tables.

    python run.py                                            # the embedded example, before and after finetuning
    python run.py --dataset cifar100 --checkpoint ckpt.pt
    python run.py --mode rank --images FOLDER --rank.attribute "a larger animal" --rank.against "a smaller animal"

The checkpoint is a run's folder, a .safetensors file, or anybody's state dict (.pt); without one the pretrained model
is evaluated (--model.name, --model.pretrained). Evaluations, for --mode:

{modes}

--mode NAME --help lists the settings of an evaluation, --help-all those of all.
"""

from __future__ import annotations

import dataclasses
import logging
import sys
from collections.abc import Sequence
from typing import Any

from pc_clip.core.cli import configure, given
from pc_clip.core.config.evaluate import EVALUATIONS, EvaluateConfig
from pc_clip.core.config.settings import is_group
from pc_clip.core.errors import UserError, check_choice, run_script
from pc_clip.core.paths import checkpoint_file

log = logging.getLogger(__name__)
EXAMPLE_RUN = "runs/example"


def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Read the settings, evaluate, print the tables; returns the results."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    argv = list(sys.argv[1:] if argv is None else argv)
    config = settings(argv)
    checkpoints = [config.checkpoint] if argv else _example_checkpoints()
    measured = [result for each in checkpoints for result in results(dataclasses.replace(config, checkpoint=each))]

    from pc_clip.report.results import show

    show(measured)
    return measured


def settings(argv: Sequence[str]) -> EvaluateConfig:
    """Settings from a command line. Raises UserError for what does not fit, and for a checkpoint that is not there."""
    modes = [mode.strip() for mode in str(given(argv).get("mode", "")).split(",") if mode.strip()]
    for mode in modes:
        check_choice("mode", mode, EVALUATIONS)
    description = __doc__.format(modes="\n".join(f"    {name:<18}{line}" for name, line in EVALUATIONS.items()))
    hidden = {f.name for f in dataclasses.fields(EvaluateConfig) if is_group(f)} - {"model"}
    if modes:
        description = f"Settings of --mode {','.join(modes)}; run.py --help lists those that all evaluations share."
        hidden = {f.name for f in dataclasses.fields(EvaluateConfig)} - set(modes)
    config = configure(EvaluateConfig, "run.py", description, argv, hidden=hidden)
    for group in {key.split(".")[0] for key in given(argv)} & set(EVALUATIONS):
        if modes and group not in modes and "average" not in modes:  # which measures differences, too
            raise UserError(f"--{group}.* has no effect with --mode {','.join(modes)}; leave it out")
    if config.checkpoint:
        checkpoint_file(config.checkpoint)
    return config


def results(config: EvaluateConfig) -> list[dict[str, Any]]:
    """The results of a model, computed or found in results/."""
    from pc_clip.evals.evaluate import evaluate

    return evaluate(config)


def _example_checkpoints() -> list[str | None]:
    """Checkpoints evaluated by default: the embedded model, and the example's run if it is finished."""
    try:
        checkpoint_file(EXAMPLE_RUN)
    except UserError:
        log.info("no finetuned example yet (python finetune.py makes one); evaluating the embedded model alone")
        return [None]
    return [None, EXAMPLE_RUN]


def command() -> None:
    run_script(main)


if __name__ == "__main__":
    command()
