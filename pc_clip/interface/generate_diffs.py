"""Write sentences on how one image, or class, differs from another: captions -> llm_diffs/NAME.jsonl.

    python generate_diffs.py                                               # the embedded example, by rule
    python generate_diffs.py --config configs/diffs_llama2_coco.yaml       # COCO's captions, a language model
    python generate_diffs.py --task describe --dataset awa2                # what classes look like, or how they differ
    python generate_diffs.py --config configs/rank_example.yaml            # which image fits a caption better
    python generate_diffs.py --writer change --change.checkpoint runs/example_change --dataset example_changes

Interrupted and started again, it continues where it stopped, with as many processes as it then has; on several GPUs:
accelerate launch generate_diffs.py ...
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from pc_clip.core.cli import configure, given
from pc_clip.core.config.write import GenerateConfig
from pc_clip.core.errors import run_script
from pc_clip.core.paths import configs_folder


def main(argv: Sequence[str] | None = None) -> Path:
    """Read the settings, then write; returns the finished file."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    argv = list(sys.argv[1:] if argv is None else argv)
    settings = {"task": "pairs", "captions": None, "writer": "rules"} | given(argv)
    of_the_example = settings["task"] == "pairs" and not settings["captions"] and settings["writer"] != "change"
    of_the_example &= settings.get("dataset", "example") == "example"
    default = configs_folder() / "diffs_example.yaml" if of_the_example else None
    config = configure(GenerateConfig, "generate_diffs.py", __doc__, argv, default=default)

    from pc_clip.write.generate import generate

    return generate(config)


def command() -> None:
    run_script(main)


if __name__ == "__main__":
    command()
