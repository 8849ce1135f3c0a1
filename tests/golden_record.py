"""What the program computes on the embedded example, recorded in tests/golden/*.json.

    python tests/golden_record.py [NAME ...]     # write the files again, after a change that is meant to alter figures

The recipes use the scripts' own `main(argv)` alone, so a change of the package's structure does not touch them.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ["HF_HUB_OFFLINE"] = "1"

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np
import pandas as pd
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

from pc_clip.data import example_sets
from pc_clip.interface import finetune, generate_diffs, run

FOLDER = Path(__file__).parent / "golden"
CONFIGS = ROOT / "configs"
STEPS = 20
SIZES = {"train": 1200, "val": 300, "test": 400}  # scenes: a fifth of the example, so that all takes two minutes
PAIRS = {"train": 400, "val": 100, "test": 200}
RELATIONS = "relations,zeroshot,probe,geometry"  # without average, which makes nine image towers
FEW = ("--n_images", "1000", "--n_pairs", "4000")
OLD_WORDINGS = ("--wording.families", "plain", "--wording.schemes", "first_image", "--wording.order", "first")
RUNS = {  # name -> flags; 20 steps each, every loss logged
    "pairwise": ["--config", "example_mirror.yaml"],
    "pairwise_paper_loss": ["--config", "example_pc.yaml"],
    "contrastive": ["--config", "example_captions.yaml"],
    "contrastive_clusters": ["--config", "example_simclip.yaml"],
    "preference": ["--config", "example_dpo.yaml", "--train.batch_size", "32"],
    "change_retrieve": ["--config", "example_change_retrieve.yaml", "--change.validate_on", "100"],
    "change_caption": ["--config", "example_change.yaml", "--change.validate_on", "100"],
}


def machine() -> str:
    """The kind of machine that a hash of float32 weights holds on."""
    about = Path("/proc/cpuinfo")
    text = about.read_text() if about.is_file() else "model: unknown"
    processor = " ".join(re.findall(r"^(?:vendor_id|cpu family|model)\s*: (\S+)", text, re.MULTILINE)[:3])
    return f"torch {torch.__version__.partition('+')[0]}, {torch.backends.cpu.get_cpu_capability()}, {processor}"


def train(name: str, *flags: str) -> Path:
    """A finetuning run in float32 on one thread.  -> its folder"""
    AcceleratorState._reset_state(reset_partial_state=True)
    argv = [str(CONFIGS / word) if word.endswith(".yaml") else word for word in flags]
    return finetune.main([*argv, "--name", name, "--train.precision", "no", "--train.threads", "1"])


def twenty_steps(name: str) -> dict[str, Any]:
    """First losses, and the final weights as a hash and as four projections on fixed directions."""
    write_example()
    folder = train(name, *RUNS[name], "--train.steps", str(STEPS), "--train.log_every", "1")
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    weights = load_file(folder / "model.safetensors")
    digest, flat = hashlib.sha256(), []
    for key in sorted(weights):
        values = weights[key].float().numpy().ravel()
        digest.update(key.encode() + values.tobytes())
        flat.append(values.astype(np.float64))
    values = np.concatenate(flat)
    index = np.arange(len(values))
    unit = math.sqrt(2 / len(values))  # of directions of length 1
    projections = [float(values @ np.cos(0.1 * k * index)) * unit for k in range(1, 5)]
    return {"losses": [row["loss"] for row in rows[:5]], "hash": digest.hexdigest(), "projections": projections}


def figures(argv: list[str]) -> dict[str, dict[str, float]]:
    """{evaluation: {metric: value}} of run.py with these flags."""
    before = set(Path().glob("results/**/*.json"))
    run.main(argv)
    results = [json.loads(path.read_text()) for path in sorted(set(Path().glob("results/**/*.json")) - before)]
    return {f"{r['evaluation']} {r['dataset']} {r['about']}".strip(): r["metrics"] for r in results}


def written() -> dict[str, list[str]]:
    """The first 50 lines of each task that rules can write."""
    tasks = {
        "pairs": ["--config", str(CONFIGS / "diffs_example_plain.yaml"), *FEW],
        "compare": [
            "--task",
            "compare",
            "--dataset",
            "example",
            "--question",
            "shape",
            "--both_orders",
            "true",
            *OLD_WORDINGS,
        ],
        "describe": ["--task", "describe", "--dataset", "example", "--question", "shape", "--n_each", "9"],
    }
    lines = {
        name: generate_diffs.main(["--name", name, *argv]).read_text().splitlines()[:50] for name, argv in tasks.items()
    }
    ranked = generate_diffs.main(["--config", str(CONFIGS / "rank_example.yaml"), "--rank.n_queries", "20"])
    return lines | {"rank": pd.read_parquet(ranked).head(50).astype(str).to_csv(index=False).splitlines()}


def write_example() -> None:
    """The sentences that training on the example reads."""
    generate_diffs.main(["--config", str(CONFIGS / "diffs_example_plain.yaml"), *FEW])


def mirror() -> dict[str, Any]:
    """A quarter of a quickstart run of pc_anchor_mirror, seed 0, and all figures of it."""
    write_example()
    return figures(
        ["--checkpoint", str(train("pc_anchor_mirror", "--config", "example_mirror.yaml", "--train.steps", "200"))]
    )


RECIPES: dict[str, Callable[[], Any]] = {
    "written": written,
    "steps": lambda: {"machine": machine(), "runs": {name: twenty_steps(name) for name in RUNS}},
    "figures_base": lambda: figures(["--dataset", "example"]),
    "figures_mirror": mirror,
    "figures_relations": lambda: figures(
        ["--dataset", "example_relations", "--mode", RELATIONS, "--checkpoint", str(Path("runs") / "preference")]
    ),
    "figures_changes": lambda: figures(
        ["--dataset", "example_changes", "--checkpoint", str(Path("runs") / "change_caption")]
    ),
}
NEEDS_RUN = {"figures_relations": "preference", "figures_changes": "change_caption"}


def record(name: str) -> Any:
    """Compute one recipe in the working folder."""
    torch.set_num_threads(1)
    sizes = example_sets.EXAMPLE_SIZES, example_sets.CHANGES_SIZES
    example_sets.EXAMPLE_SIZES, example_sets.CHANGES_SIZES = SIZES, PAIRS
    try:
        needed = NEEDS_RUN.get(name)
        if needed and not (Path("runs") / needed).exists():
            twenty_steps(needed)
        return twenty_steps(name) if name in RUNS else RECIPES[name]()
    finally:
        example_sets.EXAMPLE_SIZES, example_sets.CHANGES_SIZES = sizes


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        for name in sys.argv[1:] or RECIPES:
            FOLDER.mkdir(exist_ok=True)
            (FOLDER / f"{name}.json").write_text(json.dumps(record(name), indent=1, ensure_ascii=False) + "\n")
            print(f"{name}.json", flush=True)


if __name__ == "__main__":
    main()
