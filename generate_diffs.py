#!/usr/bin/env python
"""Write sentences on how one image, or class, differs from another: captions -> llm_diffs/NAME.jsonl.

With no argument it writes those of the embedded example, by rule. From COCO's captions, by a language model:
    python generate_diffs.py --config configs/diffs_llama2_coco.yaml
What classes look like, or how they differ:
    python generate_diffs.py --task describe --dataset awa2
Which of two similar images fits a caption better: captions and images -> llm_diffs/NAME.parquet:
    python generate_diffs.py --config configs/rank_example.yaml
By a captioner of changes, which looks at the pictures (finetune.py --method change --change.stage caption):
    python generate_diffs.py --writer change --change.checkpoint runs/example_change --dataset example_changes
Interrupted and started again, it continues where it stopped, with as many processes as it then has; on several
GPUs: accelerate launch generate_diffs.py ...
"""

import logging
from collections.abc import Sequence
from pathlib import Path

import jsonargparse

from pc_clip.config import GenerateConfig
from pc_clip.configure import configure, peek
from pc_clip.errors import run_script
from pc_clip.generate import generate

DEFAULT = Path(__file__).parent / "configs" / "diffs_example.yaml"


def main(argv: Sequence[str] | None = None) -> Path:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    parser = jsonargparse.ArgumentParser(prog="generate_diffs.py", description=__doc__)
    of_the_example = peek(argv, "task", None, "pairs") == "pairs" and not peek(argv, "captions", None, "")
    of_the_example &= peek(argv, "writer", None, "rules") != "change"
    default = DEFAULT if of_the_example else None
    config = configure(GenerateConfig, parser, argv, default=default)
    return generate(config)


if __name__ == "__main__":
    run_script(main)
