"""A study: variants x seeds -> one table. `python -m pc_clip.study configs/studies/quickstart.yaml --seeds 0 1 2`.

Each variant is a finetune.py command line, each evaluation one of run.py; both run as a user would run
them, several at a time. What is finished is not done again, so an interrupted study continues. Writes
results/NAME/table.csv (mean and standard deviation over the seeds), table.md and table.png.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd
import yaml
from tqdm import tqdm

from pc_clip import report
from pc_clip.checkpoint import MODEL_FILE, STATE_FILE
from pc_clip.errors import UserError, run_script
from pc_clip.report import long_table, read

ROOT = Path(__file__).parents[1]
COLUMNS = ["variant", "evaluation", "dataset", "metric", "mean", "std", "seeds"]


@dataclass
class Study:
    """What a study's YAML says.

    prepare: commands run once before, each a list. variants: name -> arguments of finetune.py, or null for
    the model as it was. evaluations: lists of arguments of run.py. metrics: the figures of the table.
    runs: the study whose runs are evaluated; its own unless named.
    """

    name: str
    variants: dict[str, list[str] | None]
    evaluations: list[list[str]]
    metrics: list[str]
    prepare: list[list[str]] = field(default_factory=list)
    runs: str = ""

    @property
    def results(self) -> Path:
        return Path("results") / self.name

    @classmethod
    def read(cls, path: Path) -> Study:
        """Raises UserError for a file that is absent or is no study."""
        if not path.is_file():
            known = ", ".join(sorted(p.name for p in (ROOT / "configs" / "studies").glob("*.yaml")))
            raise UserError(f"no study at {path}; in configs/studies: {known}")
        try:
            return cls(**yaml.safe_load(path.read_text(encoding="utf-8")))
        except (TypeError, yaml.YAMLError) as error:
            raise UserError(
                f"{path} is no study ({error}); it needs name, variants, evaluations and metrics"
            ) from error


@dataclass
class Job:
    """One variant with one seed: trained, then evaluated. The untrained variant has no seed."""

    study: Study
    variant: str
    seed: int | None

    @property
    def label(self) -> str:
        return self.variant if self.seed is None else f"{self.variant}-seed{self.seed}"

    @property
    def run(self) -> Path:
        return Path("runs") / (self.study.runs or self.study.name) / self.label

    def commands(self) -> list[list[str]]:
        arguments = self.study.variants[self.variant]
        found = []
        if self.seed is not None:  # also when it is finished: finetune.py then checks that it is this very run
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


def conduct(study: Study, seeds: list[int], workers: int) -> pd.DataFrame:
    """Run what is not done yet and return the table. Raises UserError when a command fails, with its last lines."""
    for command in study.prepare:
        tqdm.write(f"python {' '.join(command)}")
        _call(command, study.results / "logs" / "prepare.log")
    jobs = [
        Job(study, variant, seed)
        for variant, arguments in study.variants.items()
        for seed in (seeds if arguments is not None else [None])
    ]
    jobs.sort(key=lambda job: -_length(study.variants[job.variant]))  # the longest first, so that none is left alone
    running: dict[str, Job] = {}
    stop = threading.Event()

    def work(job: Job) -> None:
        running[job.label], then = job, time.perf_counter()
        for command in job.commands():
            if stop.is_set():
                return
            _call(command, study.results / "logs" / f"{job.label}.log")
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
    return tabulate(study, seeds)


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
            [sys.executable, *command], stdout=out, stderr=subprocess.STDOUT, env=environment
        ).returncode
    if code:
        last = [line for line in log.read_text().replace("\r", "\n").splitlines() if line.strip()][-3:]
        raise UserError(f"python {' '.join(command)} failed with {code}: {' | '.join(last)} (all of it in {log})")


def tabulate(study: Study, seeds: list[int]) -> pd.DataFrame:
    """One row a figure, over the seeds: COLUMNS. The standard deviation is that of the sample, empty for one seed."""
    frames = []
    for variant, arguments in study.variants.items():
        for seed in seeds if arguments is not None else [None]:
            label = Job(study, variant, seed).label
            table = long_table(read([study.results / label]))
            table = table[table.metric.isin(study.metrics)]
            if twice := table[table.duplicated(["dataset", "metric"])].metric.tolist():
                raise UserError(
                    f"{study.results / label} holds {twice[0]} twice; delete the result that is not of this study"
                )
            frames.append(table.assign(variant=variant))
    table = pd.concat(frames)
    keys = ["variant", "evaluation", "dataset", "metric"]
    found = table.groupby(keys, sort=False).value.agg(mean="mean", std="std", seeds="count").reset_index()[COLUMNS]
    found.to_csv(study.results / "table.csv", index=False, float_format="%.6f")
    return found


def render(study: Study, table: pd.DataFrame) -> str:
    """The table as people read it: a row a variant, a column a metric, per cent, as Markdown."""
    cells: dict[str, dict[str, str]] = {}
    for row in table.itertuples():
        spread = f" ± {100 * row.std:.1f}" if row.seeds > 1 and row.std == row.std else ""
        cells.setdefault(row.variant, {})[row.metric] = f"{100 * row.mean:.1f}{spread}"
    columns = list(dict.fromkeys(name for row in cells.values() for name in row))
    columns.sort(key=lambda name: study.metrics.index(name) if name in study.metrics else len(study.metrics))
    lines = [["variant", *columns]] + [[v, *(row.get(c, "") for c in columns)] for v, row in cells.items()]
    widths = [max(len(line[k]) for line in lines) for k in range(len(columns) + 1)]
    rows = ["| " + " | ".join(cell.ljust(w) for cell, w in zip(line, widths)) + " |" for line in lines]
    rows.insert(1, "|" + "|".join("-" * (w + 2) for w in widths) + "|")
    return "\n".join(rows)


def plot(study: Study, table: pd.DataFrame, path: Path) -> None:
    """Bars: a group a metric, a bar a variant, with the spread over the seeds."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figures = {(row.variant, row.metric): (100 * row.mean, 100 * row.std) for row in table.itertuples()}
    metrics = [m for m in study.metrics if m in set(table.metric)]
    variants = list(dict.fromkeys(table.variant))
    figure, axes = plt.subplots(figsize=(2.2 + 1.7 * len(metrics), 4.2), layout="constrained")
    width, nothing = 0.8 / len(variants), (float("nan"),) * 2
    for k, variant in enumerate(variants):
        x = [n + (k - (len(variants) - 1) / 2) * width for n in range(len(metrics))]
        heights, spread = zip(*[figures.get((variant, m), nothing) for m in metrics])
        colour = plt.cm.viridis(k / len(variants))
        bars = axes.bar(x, heights, width * 0.92, label=variant, yerr=spread, capsize=2, color=colour)
        axes.bar_label(bars, [f"{h:.0f}" if h == h else "" for h in heights], fontsize=8, padding=2)
    axes.set_xticks(range(len(metrics)), [m.replace("_", " ") for m in metrics])
    axes.set(ylabel="per cent", ylim=(0, 108), title=f"{study.name}: {table.dataset.iloc[0]}")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=min(6, len(variants)), frameon=False)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m pc_clip.study", description=__doc__)
    parser.add_argument("study", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="one finetuning a seed and variant")
    parser.add_argument("--workers", type=int, default=min(4, os.cpu_count() or 1), help="commands at a time")
    arguments = parser.parse_args()
    study = Study.read(arguments.study.resolve())
    os.chdir(ROOT)
    table = conduct(study, arguments.seeds, arguments.workers)
    text = render(study, table)
    (study.results / "table.md").write_text(text + "\n", encoding="utf-8")
    plot(study, table, study.results / "table.png")
    runs = Path("runs") / (study.runs or study.name)
    report.write([path for path in (study.results, runs) if path.exists()], study.results / "report.html")
    print(f"\n{text}\n\nper cent; table.csv and table.png are in {study.results}/, and report.html to look at")


if __name__ == "__main__":
    run_script(main)
