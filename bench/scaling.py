"""Finetuning on several processes against one: pairs a second, and whether the loss is the same.

    python bench/scaling.py

It starts finetune.py itself, as `accelerate launch` does, on sentences about 1,000 images of the embedded example:
on 1 and 2 processes of the CPU, or on 1, 2, 4, ... GPUs where there are any. The global batch is the same on all, so
each process has a share of it. What this script does not know goes to finetune.py: --train.batch_size 512.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from math import nan
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from record import Figure, exit_if_missed, record

from pc_clip.core.config.write import GenerateConfig
from pc_clip.core.distributed import Processes
from pc_clip.core.errors import UserError, check_at_least, run_script
from pc_clip.write.generate import generate

ROOT = Path(__file__).parents[1]
SPLIT, IMAGES = "val", 1000  # this split has as many
WARM = 2  # lines of the log that are left out of the speed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1, help="of each process")
    parser.add_argument("--processes", type=int, nargs="+", help="how many, each time; 1 is always among them")
    known, rest = parser.parse_known_args()
    exit_if_missed(record(figures(known.threads, known.steps, known.rounds, known.processes, rest)))


def figures(
    threads: int = 1,
    steps: int = 60,
    rounds: int = 2,
    processes: Sequence[int] | None = None,
    arguments: Sequence[str] = (),
) -> list[Figure]:
    """How many times as fast N processes are as one, and how far their losses part, for each N.

    threads: of each process. processes: each N; those that the machine has devices for, unless given. arguments:
    further ones for finetune.py. Raises UserError, with the end of its log, when a run fails.
    """
    check_at_least("--steps", steps, 5 * (WARM + 1))
    check_at_least("--rounds", rounds, 1)
    counts = sorted({1, *(processes or _devices())})
    rates: dict[int, list[float]] = {n: [] for n in counts}
    losses: dict[int, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        here = Path(folder)
        sentences = GenerateConfig(name="pairs", split=SPLIT, n_images=IMAGES, n_pairs=20_000, out=str(here / "diffs"))
        given = [f"--data.differences={generate(sentences, Processes())}", *arguments]
        _train(here, 1, f"steps={5 * (WARM + 1)}", threads, given, 5 * (WARM + 1))  # fills the caches
        for turn in range(rounds):  # in turn, so that all meet the same load of the machine
            for n in counts:
                rows = _train(here, n, f"{n}-{turn}", threads, given, steps)
                rates[n] += [row["pairs_per_second"] for row in rows[WARM:]]
                losses[n] = [row["loss"] for row in rows]
    return [figure for n in counts[1:] for figure in _compare(n, rates, losses, threads)]


def _compare(
    n: int, rates: dict[int, list[float]], losses: dict[int, list[float]], threads: int
) -> tuple[Figure, Figure]:
    one, many = median(rates[1]), median(rates[n])
    apart = max(abs(a - b) / abs(a) for a, b in zip(losses[1], losses[n], strict=True))
    where = "GPU(s)" if torch.cuda.is_available() else f"process(es) of {threads} thread(s)"
    speeds = f"{many:.0f} against {one:.0f} pairs/s on {n} and 1 {where}; {n} x would be all"
    about = f"the largest over {len(losses[1])} lines of the log, of losses about {median(losses[1]):.2f}"
    return (
        Figure(f"finetuning, {n} processes : 1", many / one, nan, "x", speeds),
        Figure(f"loss, {n} processes against 1", apart * 1e6, nan, "1e-6, relative difference",
               f"{about}; float32 rounds to 0.06", most=10),
    )  # fmt: skip


def _devices() -> list[int]:
    """1, 2, 4, ... as far as there are GPUs; without any, 1 and 2."""
    most = torch.cuda.device_count() if torch.cuda.is_available() else 2
    return [2**k for k in range(most.bit_length()) if 2**k <= most]


def _train(folder: Path, n: int, name: str, threads: int, arguments: list[str], steps: int) -> list[dict[str, float]]:
    """Run finetune.py on n processes; returns the lines of its log."""
    launch = [sys.executable]
    if n > 1:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        launch += ["-m", "accelerate.commands.launch", "--multi_gpu", f"--num_processes={n}", "--num_machines=1"]
        launch += ["--mixed_precision=no", "--dynamo_backend=no", f"--main_process_port={port}"]
    # A low rate: at the example's own, what differs by rounding alone is soon another run.
    settings = {
        "config": ROOT / "configs" / "example.yaml", "name": name, "data.split": SPLIT, "train.steps": steps,
        "train.log_every": 5, "train.save_every": steps, "train.threads": threads, "train.lr": 1e-4,
        "device": "" if torch.cuda.is_available() else "cpu",
    }  # fmt: skip
    command = [*launch, str(ROOT / "finetune.py"), *(f"--{key}={value}" for key, value in settings.items())]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    done = subprocess.run([*command, *arguments], cwd=folder, env=environment, capture_output=True, text=True)
    if done.returncode:
        log = " ".join(done.stderr.split())
        raise UserError(f"finetune.py failed on {n} processes, its log ends: {log[-1000:]}")
    return [json.loads(line) for line in (folder / "runs" / name / "metrics.jsonl").read_text().splitlines()]


if __name__ == "__main__":
    run_script(main)
