"""A study: variants x seeds -> one table. `python -m pc_clip study configs/studies/quickstart.yaml --seeds 0 1 2`.

Each variant is a finetune.py command line, each evaluation one of run.py; both run as a user would run
them, several at a time. What is finished is not done again, so an interrupted study continues. Writes
results/NAME/table.csv (mean, standard deviation and interval over the seeds), table.md and table.png, and
comparison.csv where the study says what to compare with.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import yaml
from tqdm import tqdm

from pc_clip.core.errors import UserError
from pc_clip.core.files import write_text
from pc_clip.core.paths import MODEL_FILE, STATE_FILE, shipped
from pc_clip.report import report
from pc_clip.report.study_compare import compare, render_comparison
from pc_clip.report.study_config import Study, label
from pc_clip.report.study_plot import plot
from pc_clip.report.study_table import read_results, render, render_choice, tabulate

SCRIPTS = ("generate_diffs.py", "finetune.py", "run.py")


@dataclass
class Job:
    """One variant with one seed: trained, then evaluated. The untrained variant has no seed."""

    study: Study
    variant: str
    seed: int | None

    @property
    def label(self) -> str:
        return label(self.variant, self.seed)

    @property
    def run(self) -> Path:
        return Path("runs") / (self.study.runs or self.study.name) / self.label

    @property
    def needs(self) -> list[Job]:
        """Those whose runs this one begins with."""
        return [Job(self.study, variant, self.seed) for variant in self.study.needs(self.variant)]

    def commands(self) -> list[list[str]]:
        found = []
        if self.seed is not None:  # also when it is finished: finetune.py then checks that it is this very run
            arguments = self.study.arguments(self.variant, lambda name: Job(self.study, name, self.seed).run)
            begun = (self.run / STATE_FILE).is_file() and not (self.run / MODEL_FILE).is_file()
            resume = ["--resume", "true"] if begun else []
            name = str(self.run.relative_to("runs"))
            found.append(["finetune.py", *arguments, "--name", name, "--seed", str(self.seed), *resume])
        for evaluation in self.study.evaluations:
            checkpoint = ["--checkpoint", str(self.run)] if self.seed is not None else []
            found.append(["run.py", *evaluation, *checkpoint, "--label", self.label, "--out", str(self.study.results)])
        return found

    def progress(self) -> str:
        """How far the training has come, for the bar."""
        try:
            last = (self.run / "metrics.jsonl").read_text().splitlines()[-1]
            return f"{self.label} step {json.loads(last)['step']}"
        except (OSError, IndexError, ValueError):
            return self.label


def conduct(study: Study, seeds: list[int], workers: int) -> None:
    """Run what is not done yet. Raises UserError when a command fails, with its last lines."""
    for command in study.prepare:
        tqdm.write(f"python {' '.join(command)}")
        _call(command, study.results / "logs" / "prepare.log")
    jobs = [Job(study, variant, seed) for variant, seed in study.members(seeds)]
    jobs.sort(key=_longest_first)
    running: dict[str, Job] = {}
    stop = threading.Event()
    trained = {job.label: threading.Event() for job in jobs}

    def work(job: Job) -> None:
        for other in job.needs:  # it was begun before this one
            while not trained[other.label].wait(0.5):
                if stop.is_set():
                    return
        running[job.label], then = job, time.perf_counter()
        for command in job.commands():
            if stop.is_set():
                return
            _call(command, study.results / "logs" / f"{job.label}.log")
            trained[job.label].set()  # by the first of them
        del running[job.label]
        tqdm.write(f"{job.label}: trained and evaluated in {time.perf_counter() - then:.0f} s")

    with ThreadPoolExecutor(workers) as pool, tqdm(total=len(jobs), desc=study.name, unit="run", disable=None) as bar:
        waiting = {pool.submit(work, job) for job in jobs}
        try:
            while waiting:
                done = {future for future in waiting if future.done()}
                for future in as_completed(done):
                    future.result()
                    bar.update()
                waiting -= done
                bar.set_postfix_str(", ".join(job.progress() for job in list(running.values())))
                stop.wait(1.0)
        except BaseException:
            stop.set()
            pool.shutdown(cancel_futures=True)
            raise


def _longest_first(job: Job) -> tuple[int, int]:
    """So that none is left alone at the end; but what others begin with comes before all."""
    depth = max((1 + _longest_first(other)[0] for other in job.needs), default=0)
    return depth, -_length(job.study.variants[job.variant])


def _length(arguments: list[str] | None) -> int:
    """The steps a variant's config asks for, to start the longest first."""
    if not arguments or "--config" not in arguments:
        return 0
    config = yaml.safe_load(Path(arguments[arguments.index("--config") + 1]).read_text(encoding="utf-8"))
    return config.get("train", {}).get("steps") or 0


def _call(command: list[str], log: Path) -> None:
    """Run one of the project's commands on one thread, its output into a log."""
    log.parent.mkdir(parents=True, exist_ok=True)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    with log.open("a") as out:
        out.write(f"$ python {' '.join(command)}\n")
        out.flush()
        code = subprocess.run(
            [sys.executable, *_program(command[0]), *command[1:]], stdout=out, stderr=subprocess.STDOUT, env=environment
        ).returncode
    if code:
        last = [line for line in log.read_text().replace("\r", "\n").splitlines() if line.strip()][-3:]
        raise UserError(f"python {' '.join(command)} failed with {code}: {' | '.join(last)} (all of it in {log})")


def _program(script: str) -> list[str]:
    """finetune.py, run.py or generate_diffs.py as the installed package has it; another script as it is."""
    name = Path(script).stem
    return ["-m", f"pc_clip.interface.{name}"] if script in SCRIPTS else [script]


def announce(study: Study, seeds: list[int]) -> str:
    """Every command the study runs, a line each, and how many they are."""
    jobs = [Job(study, variant, seed) for variant, seed in study.members(seeds)]
    commands = [*study.prepare, *(command for job in jobs for command in job.commands())]
    trained = sum(job.seed is not None for job in jobs)
    finished = sum((job.run / MODEL_FILE).is_file() for job in jobs if job.seed is not None)
    lines = [f"python {shlex.join(command)}" for command in commands]
    return "\n".join(lines) + (
        f"\n\n{len(commands)} commands: {len(study.prepare)} to prepare, {trained} trainings ({finished} of them "
        f"finished), {len(jobs) * len(study.evaluations)} evaluations of {len(study.variants)} variants"
    )


def publish(study: Study, table: pd.DataFrame, comparison: pd.DataFrame | None, text: str) -> None:
    """Write everything but the results themselves."""
    for name, frame in (("table.csv", table), ("comparison.csv", comparison)):
        if frame is not None:
            write_text(study.results / name, frame.to_csv(index=False, float_format="%.6f"))
    write_text(study.results / "table.md", text + "\n")
    plot(study, table, study.results / "table.png", comparison)
    runs = Path("runs") / (study.runs or study.name)
    found = [path for path in (study.results, runs) if path.exists()]
    report.write(found, study.results / "report.html")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m pc_clip study", description=__doc__)
    parser.add_argument("study", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="one finetuning a seed and variant")
    parser.add_argument("--workers", type=int, default=min(4, os.cpu_count() or 1), help="commands at a time")
    parser.add_argument(
        "--only", nargs="+", metavar="PATTERN", help="variants to run, such as 'text-*'; no table is written"
    )
    parser.add_argument("--dry_run", action="store_true", help="print the commands and run nothing")
    arguments = parser.parse_args(argv)
    study, seeds = Study.read(shipped(arguments.study)), list(dict.fromkeys(arguments.seeds))
    if arguments.only:
        study = study.only(arguments.only)
    if arguments.dry_run:
        print(announce(study, seeds))
        return
    conduct(study, seeds, arguments.workers)
    measured = read_results(study, seeds)
    table = tabulate(study, measured)
    comparison = compare(study, measured) if study.against else None
    parts = [render(study, table)]
    parts += [render_choice(study, table)] if study.chosen_on else []
    parts += [render_comparison(study, comparison)] if comparison is not None else []
    text = "\n\n".join(parts)
    if arguments.only:
        print(f"\n{text}\n\nper cent; nothing was written but runs and results, because of --only")
        return
    publish(study, table, comparison, text)
    also = ", comparison.csv" if comparison is not None else ""
    print(f"\n{text}\n\nper cent; table.csv{also} and table.png are in {study.results}/, and report.html to look at")
