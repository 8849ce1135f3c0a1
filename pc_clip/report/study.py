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
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml
from tqdm import tqdm

from pc_clip.core.errors import UserError, nearest
from pc_clip.core.files import write_text
from pc_clip.core.paths import configs_folder, shipped
from pc_clip.report import charts
from pc_clip.report.compare import compare
from pc_clip.report.results import cells, check_once, grid, long_table, read, summarise, unlike

SCRIPTS = ("generate_diffs.py", "finetune.py", "run.py")
COLUMNS = ["variant", "evaluation", "dataset", "metric", "mean", "std", "seeds", "low", "high"]
_NAME = re.compile(r"\{([\w.+-]+)\}")  # the run of a variant, or a placeholder of a grid


@dataclass
class Study:
    """A study's settings, from its YAML.

    variants: name -> arguments of finetune.py, or null for the model as it was. {NAME} among these stands for the run
    of the variant NAME with the same seed, which is then trained first; it must come earlier. grid: more variants, one
    for each combination of `values` (placeholder -> list), which fill the placeholders {k} of `variant` (the name) and
    `arguments`; the last value changes fastest.
    evaluations: lists of arguments of run.py. metrics: the figures of the table. prepare: commands run once before,
    each a list. runs: the study whose runs are evaluated; its own unless named. baselines: variants that do not
    compete. chosen_on: data sets the best of the others is chosen on, by the mean of the metrics choose_by; they are
    then left out of table and picture. against: the variant that all others are compared with, image by image.
    intervals: whether the table shows 95 % intervals. tradeoff: two figures as DATASET:METRIC, what is kept and what
    is gained, for a picture of both with a point a variant and seed.
    """

    name: str
    evaluations: list[list[str]]
    metrics: list[str]
    variants: dict[str, list[str] | None] = field(default_factory=dict)
    grid: list[dict[str, Any]] = field(default_factory=list)
    prepare: list[list[str]] = field(default_factory=list)
    runs: str = ""
    baselines: list[str] = field(default_factory=list)
    chosen_on: list[str] = field(default_factory=list)
    choose_by: list[str] = field(default_factory=list)
    against: str = ""
    intervals: bool = False
    tradeoff: list[str] = field(default_factory=list)

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
        self._check("choose_by", self.choose_by, self.metrics)
        self._check("tradeoff", [name.rpartition(":")[2] for name in self.tradeoff], self.metrics)
        if len(self.tradeoff) not in (0, 2):
            raise UserError(f"tradeoff of study {self.name} names {len(self.tradeoff)} metrics; it takes two")
        self._check("baselines", self.baselines, self.variants)
        self._check("against", [self.against] if self.against else [], self.variants)
        trained: list[str] = []
        for name, arguments in self.variants.items():
            self._check(f"variant {name!r}", self.needs(name), trained)
            trained += [name] if arguments is not None else []

    def _check(self, key: str, names: Sequence[str], known: Any) -> None:
        for name in names:
            if name not in known:
                raise UserError(f"{key} of study {self.name} names {name!r}. {nearest(str(name), known)}")

    @classmethod
    def read(cls, path: Path) -> Study:
        """Raises UserError for a file that is absent or not a study."""
        if not path.is_file():
            known = ", ".join(sorted(p.name for p in (configs_folder() / "studies").glob("*.yaml")))
            raise UserError(f"no study at {path}; in configs/studies: {known}")
        try:
            return cls(**yaml.safe_load(path.read_text(encoding="utf-8")))
        except (TypeError, ValueError, AttributeError, yaml.YAMLError) as error:
            raise UserError(
                f"{path} is not a study ({error}); it needs name, evaluations, metrics, and variants or grid"
            ) from error

    def only(self, names: Sequence[str]) -> Study:
        """The same study of some of its variants, in this order. Raises UserError for a name that it does not have."""
        self._check("--variants", names, self.variants)
        baselines = [name for name in self.baselines if name in names]
        against = self.against if self.against in names else ""
        variants = {name: self.variants[name] for name in names}
        return replace(self, variants=variants, grid=[], baselines=baselines, against=against)

    def needs(self, variant: str) -> list[str]:
        """The variants whose runs its arguments name."""
        return [name for argument in self.variants[variant] or [] for name in _NAME.findall(str(argument))]

    @property
    def results(self) -> Path:
        return Path("results") / self.name

    def run(self, variant: str, seed: int) -> Path:
        return Path("runs") / (self.runs or self.name) / label(variant, seed)

    def members(self, seeds: list[int]) -> list[tuple[str, int | None]]:
        """(variant, seed) of all that is measured, in order; the model as it was has no seed."""
        every = self.variants.items()
        return [(name, seed) for name, arguments in every for seed in (seeds if arguments is not None else [None])]

    def commands(self, seeds: list[int]) -> list[tuple[str, list[str], list[str]]]:
        """(label, command, labels whose commands come before it) of all there is to run, trainings first.

        A finished run has its training too: finetune.py then checks that it is this very run.
        """
        commands = []
        for variant, seed in self.members(seeds):
            if seed is not None:
                runs = {name: str(self.run(name, seed)) for name in self.variants}
                arguments = [_fill(word, runs) for word in self.variants[variant]]
                place = ["--name", runs[variant].removeprefix("runs/"), "--seed", str(seed), "--resume", "true"]
                before = [label(name, seed) for name in self.needs(variant)]
                commands.append((label(variant, seed), ["finetune.py", *arguments, *place], before))
        for evaluation in self.evaluations:
            for variant, seed in self.members(seeds):
                checkpoint = ["--checkpoint", str(self.run(variant, seed))] if seed is not None else []
                place = ["--label", label(variant, seed), "--out", str(self.results)]
                command = ["run.py", *map(str, evaluation), *checkpoint, *place]
                commands.append((label(variant, seed), command, [label(variant, seed)]))
        return commands


def label(variant: str, seed: int | None) -> str:
    """The name of a variant's run and results."""
    return variant if seed is None else f"{variant}-seed{seed}"


def _expand(variant: str, arguments: list[Any], values: dict[str, list[Any]]) -> Iterator[tuple[str, list[str]]]:
    """(name, arguments) of each variant of a grid."""
    for combination in product(*values.values()):
        chosen = dict(zip(values, map(str, combination)))
        yield _fill(variant, chosen), [_fill(argument, chosen) for argument in arguments]


def _fill(text: Any, values: dict[str, str]) -> str:
    """A text with values in place of the {NAMES} that are known."""
    return _NAME.sub(lambda match: values.get(match[1], match[0]), str(text))


# -- running it ----------------------------------------------------------------------------------------


def conduct(study: Study, seeds: list[int], workers: int) -> None:
    """Run what is not done yet. Raises UserError when a command fails, with its last lines."""
    logs, commands = study.results / "logs", study.commands(seeds)
    for command in study.prepare:
        tqdm.write(f"python {shlex.join(map(str, command))}")
        _call(command, logs / "prepare.log")
    last: dict[str, Future[None]] = {}  # label -> the last of its commands so far

    def call(name: str, command: list[str], before: list[Future[None]]) -> None:
        for future in before:
            future.result()
        _call(command, logs / f"{name}.log")

    with ThreadPoolExecutor(workers) as pool, tqdm(total=len(commands), desc=study.name, disable=None) as bar:
        try:
            futures = []
            for name, command, needs in commands:  # what one waits for is submitted before it: no two wait in a ring
                last[name] = pool.submit(call, name, command, [last[other] for other in needs if other in last])
                futures.append(last[name])
            for future in as_completed(futures):
                future.result()
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
        if len({result.get("weights") for result in of_label}) > 1:
            raise UserError(f"{folder} holds results of several models; delete it and run the study again")
        results += [result | {"model": label(variant, seed)} for result in of_label]
    for line in unlike(results):
        raise UserError(f"{line}; delete {study.results} and run the study again")
    return results


def tabulate(study: Study, results: Sequence[dict[str, Any]]) -> pd.DataFrame:
    """One row a figure, over the seeds: COLUMNS; std, low and high as `summarise` has them."""
    table = long_table(results)
    table = table[table.metric.isin(study.metrics)]
    if table.empty:
        raise UserError(f"the results in {study.results} hold none of {', '.join(study.metrics)}; correct `metrics`")
    check_once(table, ["model", "dataset", "metric"])
    return summarise(table)[COLUMNS]


def best(study: Study, table: pd.DataFrame) -> tuple[str, float]:
    """The variant with the highest mean of study.choose_by on study.chosen_on, baselines apart, and that mean.

    The first of several that are equal. Raises UserError when one of them lacks a figure to choose by.
    """
    validation = table[table.dataset.isin(study.chosen_on)]
    validation = validation[validation.metric.isin(study.choose_by)]
    means = validation.pivot_table(index="variant", columns=["metric", "dataset"], values="mean")
    competing = [v for v in study.variants if v not in study.baselines]
    means = means.reindex(index=competing, columns=pd.MultiIndex.from_product([study.choose_by, study.chosen_on]))
    means = means.loc[:, means.notna().any() | (means.columns.get_level_values(1) == study.chosen_on[0])]
    for variant, row in means[means.isna().any(axis=1)].iterrows():
        lacking, places = (" and ".join(dict.fromkeys(names)) for names in zip(*row.index[row.isna()]))
        known = ", ".join(dict.fromkeys(table.dataset))
        raise UserError(f"{variant} has no {lacking} on {places} to be chosen by; measured: {known}")
    score = means.T.groupby(level=0).mean().mean()  # each metric counts alike, on however many data sets it is known
    return score.idxmax(), float(score.max())


def render(study: Study, table: pd.DataFrame, comparison: pd.DataFrame | None) -> str:
    """The table as Markdown, then the variant that validation chose, then the comparison, a table each data set."""
    parts = _markdown(study, table.assign(text=cells(table, study.intervals)))
    if study.chosen_on:
        variant, score = best(study, table)
        rule = f"the mean of {' and '.join(study.choose_by)} on {' and '.join(study.chosen_on)}"
        parts.append(f"Best by {rule}, baselines apart: {variant} ({100 * score:.1f}).")
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
        parts += _markdown(study, comparison.assign(text=text + np.where(comparison.significant, " *", "")))
    return "\n\n".join(parts)


def _markdown(study: Study, rows: pd.DataFrame) -> list[str]:
    """A table each data set: a row a variant, a column a metric."""
    parts, rows = [], _shown(study, rows)
    for name, block in rows.groupby("dataset", sort=False):
        wide = grid(block, "variant", "metric")
        wide = wide[[metric for metric in study.metrics if metric in wide]].to_markdown(disable_numparse=True)
        parts += [name, wide] if rows.dataset.nunique() > 1 else [wide]
    return parts


def _shown(study: Study, rows: pd.DataFrame) -> pd.DataFrame:
    """The rows of all data sets but those to choose on; of these if there are no others."""
    others = rows[~rows.dataset.isin(study.chosen_on)]
    return others if len(others) else rows


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m pc_clip study", description=__doc__)
    parser.add_argument("study", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="one finetuning a seed and variant")
    parser.add_argument(
        "--variants", nargs="+", metavar="NAME", help="some of its variants, in the order to begin them"
    )
    parser.add_argument("--workers", type=int, default=min(4, os.cpu_count() or 1), help="commands at a time")
    parser.add_argument("--dry_run", action="store_true", help="print the commands and run nothing")
    arguments = parser.parse_args(argv)
    study, seeds = Study.read(shipped(arguments.study)), list(dict.fromkeys(arguments.seeds))
    study = study.only(arguments.variants) if arguments.variants else study
    if arguments.dry_run:
        commands = [*study.prepare, *(command for _, command, _ in study.commands(seeds))]
        print("\n".join(f"python {shlex.join(map(str, command))}" for command in commands))
        return
    conduct(study, seeds, arguments.workers)
    results = results_of(study, seeds)
    table = tabulate(study, results)
    untrained = [name for name, words in study.variants.items() if words is None]
    comparison = compare(results, study.against, untrained, study.metrics) if study.against else None
    text = render(study, table, comparison)
    for name, frame in (("table.csv", table), ("comparison.csv", comparison)):
        if frame is not None:
            write_text(study.results / name, frame.to_csv(index=False, float_format="%.6f"))
    write_text(study.results / "table.md", text + "\n")
    figure = charts.dots(_shown(study, table), study.metrics, study.baselines)
    figure.suptitle(f"{study.name}: mean ± standard deviation over seeds; of one seed its 95 % interval", fontsize=11)
    figure.savefig(study.results / "table.png", dpi=130)
    if study.tradeoff:
        figures = long_table(results)
        runs = figures.assign(figure=figures.dataset + ":" + figures.metric).pivot_table(
            "value", "model", "figure", sort=False
        )
        if absent := [name for name in study.tradeoff if name not in runs]:
            raise UserError(f"tradeoff of study {study.name} names {absent[0]!r}. {nearest(absent[0], list(runs))}")
        runs = runs[study.tradeoff]
        charts.tradeoff(runs, study.baselines).savefig(study.results / "tradeoff.png", dpi=130)
    print(f"\n{text}\n\nper cent where it is a share; table.csv and table.png are in {study.results}/")
