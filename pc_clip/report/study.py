"""A study: variants x seeds -> one table. `python -m pc_clip study configs/studies/quickstart.yaml --seeds 0 1 2`.

Each variant is a finetune.py command line, each evaluation one of run.py; both run as a user would run them, several
at a time. What is finished is not done again, so an interrupted study continues. Writes results/NAME/table.csv (mean,
standard deviation and interval over the seeds), table.md and table.png, and comparison.csv where the study says what to
compare with.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml
from tqdm import tqdm

from pc_clip.core.errors import UserError, nearest
from pc_clip.core.files import write_text
from pc_clip.core.paths import MODEL_FILE, STATE_FILE, configs_folder, shipped
from pc_clip.report import charts, page
from pc_clip.report.compare import compare
from pc_clip.report.results import cells, check_once, grid, long_table, read, summarise

SCRIPTS = ("generate_diffs.py", "finetune.py", "run.py")
COLUMNS = ["variant", "evaluation", "dataset", "metric", "mean", "std", "seeds", "low", "high"]
_NAME = re.compile(r"\{([\w.+-]+)\}")  # the run of a variant, or a placeholder of a grid


@dataclass
class Study:
    """What a study's YAML says.

    variants: name -> arguments of finetune.py, or null for the model as it was. {NAME} among these stands for the run
    of the variant NAME with the same seed, which is then trained first; it must come earlier. grid: more variants, one
    for each combination of `values` (placeholder -> list), which fill the placeholders {k} of `variant` (the name) and
    `arguments`; the last value changes fastest.
    evaluations: lists of arguments of run.py. metrics: the figures of the table. prepare: commands run once before,
    each a list. runs: the study whose runs are evaluated; its own unless named. baselines: variants that do not
    compete. chosen_on: the data set the best of the others is chosen on, by the mean of the metrics choose_by; it is
    then left out of table and picture. against: the variant that all others are compared with, image by image.
    intervals: whether the table shows 95 % intervals.
    """

    name: str
    evaluations: list[list[str]]
    metrics: list[str]
    variants: dict[str, list[str] | None] = field(default_factory=dict)
    grid: list[dict[str, Any]] = field(default_factory=list)
    prepare: list[list[str]] = field(default_factory=list)
    runs: str = ""
    baselines: list[str] = field(default_factory=list)
    chosen_on: str = ""
    choose_by: list[str] = field(default_factory=list)
    against: str = ""
    intervals: bool = False

    def __post_init__(self) -> None:
        self.variants = dict(self.variants)
        for name, arguments in (variant for each in self.grid for variant in _expand(**each)):
            if name in self.variants:
                raise UserError(f"two variants of study {self.name} are called {name!r}; see the grid's `variant`")
            self.variants[name] = arguments
        if not self.variants:
            raise UserError(f"study {self.name} has no variants; it needs `variants` or `grid`")
        if bool(self.chosen_on) != bool(self.choose_by):
            raise UserError(f"study {self.name} needs both `chosen_on` and `choose_by`, or neither")
        trained: list[str] = []
        for name, arguments in self.variants.items():
            self._check(f"variant {name!r}", self.needs(name), trained)
            trained += [name] if arguments is not None else []
        self._check("choose_by", self.choose_by, self.metrics)
        self._check("baselines", self.baselines, self.variants)
        self._check("against", [self.against] if self.against else [], self.variants)

    def _check(self, key: str, names: Any, known: Any) -> None:
        if not isinstance(names, list):
            raise UserError(f"{key} of study {self.name} is {names!r}; it must be a list")
        for name in names:
            if name not in known:
                raise UserError(f"{key} of study {self.name} names {name!r}. {nearest(str(name), known)}")

    @classmethod
    def read(cls, path: Path) -> Study:
        """Raises UserError for a file that is absent or is no study."""
        if not path.is_file():
            known = ", ".join(sorted(p.name for p in (configs_folder() / "studies").glob("*.yaml")))
            raise UserError(f"no study at {path}; in configs/studies: {known}")
        try:
            return cls(**yaml.safe_load(path.read_text(encoding="utf-8")))
        except (TypeError, ValueError, AttributeError, yaml.YAMLError) as error:
            raise UserError(
                f"{path} is no study ({error}); it needs name, evaluations, metrics, and variants or grid"
            ) from error

    def needs(self, variant: str) -> list[str]:
        """The variants whose runs its arguments name."""
        return [name for argument in self.variants[variant] or [] for name in _NAME.findall(str(argument))]

    def only(self, patterns: list[str]) -> Study:
        """The same with the variants whose name matches a pattern, and those they begin with. UserError for none."""
        chosen = {name for name in self.variants if any(fnmatchcase(name, pattern) for pattern in patterns)}
        for name in reversed(self.variants):
            chosen |= set(self.needs(name)) if name in chosen else set()
        if not chosen:
            known = nearest(patterns[0], self.variants)
            raise UserError(f"--only {' '.join(patterns)} matches no variant of study {self.name}. {known}")
        return replace(
            self,
            variants={name: arguments for name, arguments in self.variants.items() if name in chosen},
            grid=[],
            baselines=[name for name in self.baselines if name in chosen],
            against=self.against if self.against in chosen else "",
        )

    @property
    def results(self) -> Path:
        return Path("results") / self.name

    @property
    def competitors(self) -> list[str]:
        return [name for name in self.variants if name not in self.baselines]

    def members(self, seeds: list[int]) -> list[tuple[str, int | None]]:
        """(variant, seed) of all that is measured, in order. The model as it was has no seed."""
        every = self.variants.items()
        return [(name, seed) for name, arguments in every for seed in (seeds if arguments is not None else [None])]

    def run(self, variant: str, seed: int | None) -> Path:
        return Path("runs") / (self.runs or self.name) / label(variant, seed)

    def commands(self, seeds: list[int]) -> list[tuple[str, list[str], list[str]]]:
        """(label, command, labels whose commands come before it) of all there is to run, trainings first.

        A finished run has its training too: finetune.py then checks that it is this very run.
        """
        commands = []
        for variant, seed in self.members(seeds):
            if seed is not None:
                run, needs = self.run(variant, seed), self.needs(variant)
                arguments = [str(argument) for argument in self.variants[variant]]
                for other in needs:
                    arguments = [text.replace(f"{{{other}}}", str(self.run(other, seed))) for text in arguments]
                name = ["--name", str(run.relative_to("runs")), "--seed", str(seed)]
                begun = (run / STATE_FILE).is_file() and not (run / MODEL_FILE).is_file()
                resume = ["--resume", "true"] if begun else []
                before = [label(name, seed) for name in needs]
                commands.append((label(variant, seed), ["finetune.py", *arguments, *name, *resume], before))
        for evaluation in self.evaluations:
            for variant, seed in self.members(seeds):
                checkpoint = ["--checkpoint", str(self.run(variant, seed))] if seed is not None else []
                place = ["--label", label(variant, seed), "--out", str(self.results)]
                command = ["run.py", *map(str, evaluation), *checkpoint, *place]
                commands.append((label(variant, seed), command, [label(variant, seed)]))
        return commands


def label(variant: str, seed: int | None) -> str:
    """What a variant's run and results are called."""
    return variant if seed is None else f"{variant}-seed{seed}"


def _expand(variant: str, arguments: list[Any], values: dict[str, list[Any]]) -> Iterator[tuple[str, list[str]]]:
    """(name, arguments) of each variant of a grid. Raises UserError for an unknown placeholder, or for no values."""
    if not isinstance(values, dict) or not values or not all(isinstance(v, list) and v for v in values.values()):
        raise UserError(f"values of the grid {variant!r} are {values!r}; each placeholder needs a list of values")

    def fill(text: str) -> str:
        for name in re.findall(r"\{(\w+)\}", text):
            if name not in values:
                raise UserError(f"the grid {variant!r} has no values for {{{name}}}. {nearest(name, values)}")
        return re.sub(r"\{(\w+)\}", lambda match: str(chosen[match[1]]), text)

    for combination in product(*values.values()):
        chosen = dict(zip(values, combination))
        yield fill(variant), [fill(str(argument)) for argument in arguments]


# -- running it ----------------------------------------------------------------------------------------


def conduct(study: Study, seeds: list[int], workers: int) -> None:
    """Run what is not done yet. Raises UserError when a command fails, with its last lines."""
    logs, commands = study.results / "logs", study.commands(seeds)
    for command in study.prepare:
        tqdm.write(f"python {shlex.join(map(str, command))}")
        _call(command, logs / "prepare.log")
    last: dict[str, Future[str]] = {}  # label -> the last of its commands so far

    def call(name: str, command: list[str], before: list[Future[str]]) -> str:
        for future in before:
            future.result()
        _call(command, logs / f"{name}.log")
        return name

    with ThreadPoolExecutor(workers) as pool, tqdm(total=len(commands), desc=study.name, disable=None) as bar:
        try:
            futures = []
            for name, command, needs in commands:  # what one waits for is submitted before it: no two wait in a ring
                last[name] = pool.submit(call, name, command, [last[other] for other in needs if other in last])
                futures.append(last[name])
            for future in as_completed(futures):
                bar.set_postfix_str(f"{future.result()} done")
                bar.update()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _call(command: list[str], log: Path) -> None:
    """Run one of the project's commands on one thread, its output into a log."""
    log.parent.mkdir(parents=True, exist_ok=True)
    script, *arguments = map(str, command)
    program = ["-m", f"pc_clip.interface.{Path(script).stem}"] if script in SCRIPTS else [script]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    line = f"python {shlex.join([script, *arguments])}"
    with log.open("a", encoding="utf-8") as out:
        print(f"$ {line}", file=out, flush=True)
        done = subprocess.run(
            [sys.executable, *program, *arguments], stdout=out, stderr=subprocess.STDOUT, env=environment
        )
    if done.returncode:
        text = log.read_text(encoding="utf-8", errors="replace").replace("\r", "\n")
        last = [each for each in text.splitlines() if each.strip()][-3:]
        raise UserError(f"{line} failed with {done.returncode}: {' | '.join(last)} (all of it in {log})")


# -- what came of it -----------------------------------------------------------------------------------


def results_of(study: Study, seeds: list[int]) -> list[dict[str, Any]]:
    """The results of all variants and seeds. Raises UserError for one that has none, or a broken one."""
    results = []
    for variant, seed in study.members(seeds):
        folder = study.results / label(variant, seed)
        of_label, left_out = read([folder])
        if left_out or not of_label:
            raise UserError(f"{(left_out or [f'no results in {folder}'])[0]}; delete it and run the study again")
        results += [result | {"model": label(variant, seed)} for result in of_label]
    return results


def tabulate(study: Study, results: Sequence[dict[str, Any]]) -> pd.DataFrame:
    """One row a figure, over the seeds: COLUMNS; std, low and high as `summarise` has them."""
    table = long_table(results)
    table = table[table.metric.isin(study.metrics)]
    if table.empty:
        raise UserError(f"the results in {study.results} hold none of {', '.join(study.metrics)}; mend `metrics`")
    check_once(table, ["model", "dataset", "metric"])
    return summarise(table)[COLUMNS]


def best(study: Study, table: pd.DataFrame) -> tuple[str, float]:
    """The competitor with the highest mean of study.choose_by on study.chosen_on, and that mean.

    The first of several that are equal. Raises UserError when one of them lacks a figure to choose by.
    """
    validation = table[table.dataset == study.chosen_on]
    means = validation.pivot_table(index="variant", columns="metric", values="mean")
    means = means.reindex(index=study.competitors, columns=study.choose_by)
    for variant, row in means[means.isna().any(axis=1)].iterrows():
        lacking, known = ", ".join(row.index[row.isna()]), ", ".join(dict.fromkeys(table.dataset))
        raise UserError(f"{variant} has no {lacking} on {study.chosen_on} to be chosen by; measured: {known}")
    score = means.mean(axis=1)
    return score.idxmax(), float(score.max())


def render(study: Study, table: pd.DataFrame, comparison: pd.DataFrame | None) -> str:
    """The table as Markdown, then the variant that validation chose, then the comparison, a table each data set."""
    datasets = [name for name in dict.fromkeys(table.dataset) if name != study.chosen_on] or [study.chosen_on]
    parts = _markdown(study, table.assign(text=cells(table, study.intervals)), datasets)
    if study.chosen_on and study.competitors:
        variant, score = best(study, table)
        rows = table[table.variant.isin([variant, *study.baselines])]
        parts.append(
            f"Best of {len(study.competitors)} on {study.chosen_on} by the mean of {' and '.join(study.choose_by)}: "
            f"{variant} ({100 * score:.1f}). With 95 % intervals over images:"
        )
        parts += _markdown(study, rows.assign(text=cells(rows, intervals=True)), datasets)
    if comparison is not None and comparison.empty:
        parts.append(f"Nothing to compare with {study.against}: the results have no number for each image.")
    elif comparison is not None:
        seeds = comparison.seeds.max()
        noise = f" and {seeds} seeds" if seeds > 1 else "; one seed, so that the noise of training is left out"
        parts.append(
            f"Less {study.against}, points, with 95 % intervals over the same images{noise}. * holds after Holm's "
            "correction for all comparisons of its column."
        )
        points = (100 * comparison[["difference", "low", "high"]]).map("{:+.1f}".format)
        text = points.difference + " [" + points.low + ", " + points.high + "]"
        parts += _markdown(study, comparison.assign(text=text + np.where(comparison.significant, " *", "")), datasets)
    return "\n\n".join(parts)


def _markdown(study: Study, rows: pd.DataFrame, datasets: list[str]) -> list[str]:
    """A row a variant, a column a metric."""
    parts = []
    for name, block in ((name, rows[rows.dataset == name]) for name in datasets):
        if len(block):
            wide = grid(block, "variant", "metric")
            wide = wide[[metric for metric in study.metrics if metric in wide]]
            parts.append(
                (f"{name}\n\n" if rows.dataset.nunique() > 1 else "") + wide.to_markdown(disable_numparse=True)
            )
    return parts


def picture(study: Study, table: pd.DataFrame, comparison: pd.DataFrame | None, path: Path) -> None:
    """What the table shows; where something was compared, what does not differ after the correction is hollow."""
    shown = table[table.dataset != study.chosen_on]
    hollow = None
    if comparison is not None and len(comparison):
        same = comparison[~comparison.significant]
        hollow = set(zip(same.variant, same.dataset, same.metric))
    figure = charts.dots(table if shown.empty else shown, study.metrics, study.baselines, hollow or ())
    whisker = "standard deviation over seeds, of one seed the 95 % interval over images"
    note = f"; hollow: does not differ from {study.against}" if hollow else ""
    figure.suptitle(f"{study.name}: whiskers are the {whisker}{note}", fontsize=11)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


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
    study = study.only(arguments.only) if arguments.only else study
    if arguments.dry_run:
        commands = [*study.prepare, *(command for _, command, _ in study.commands(seeds))]
        print("\n".join(f"python {shlex.join(map(str, command))}" for command in commands))
        print(f"\n{len(commands)} commands for {len(study.members(seeds))} models; what is finished is not done again")
        return
    conduct(study, seeds, arguments.workers)
    results = results_of(study, seeds)
    table = tabulate(study, results)
    untrained = [name for name, words in study.variants.items() if words is None]
    comparison = compare(results, study.against, untrained, study.metrics) if study.against else None
    text = render(study, table, comparison)
    if arguments.only:
        print(f"\n{text}\n\nper cent where it is a share; nothing was written but runs and results, because of --only")
        return
    for name, frame in (("table.csv", table), ("comparison.csv", comparison)):
        if frame is not None:
            write_text(study.results / name, frame.to_csv(index=False, float_format="%.6f"))
    write_text(study.results / "table.md", text + "\n")
    picture(study, table, comparison, study.results / "table.png")
    runs = Path("runs") / (study.runs or study.name)
    page.write([path for path in (study.results, runs) if path.exists()], study.results / "report.html")
    print(f"\n{text}\n\nper cent where it is a share; table.csv, table.png and report.html are in {study.results}/")
