"""A study's table: the mean of every figure over the seeds, and which variant was best on validation."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import pandas as pd

from pc_clip.core.errors import UserError
from pc_clip.report.page.summary import interval
from pc_clip.report.report import read
from pc_clip.report.study_config import Study, label

COLUMNS = ["variant", "evaluation", "dataset", "metric", "mean", "std", "seeds", "low", "high"]


class Measured(NamedTuple):
    """A variant with one seed (None for the model as it was), and its results as run.py wrote them."""

    variant: str
    seed: int | None
    results: list[dict[str, Any]]


def read_results(study: Study, seeds: list[int]) -> list[Measured]:
    """The results of all variants and seeds. Raises UserError for one that has none, or a figure twice."""
    found = []
    for variant, seed in study.members(seeds):
        folder = study.results / label(variant, seed)
        results = read([folder])
        figures = [(r["dataset"], m) for r in results for m in r["metrics"] if m in study.metrics]
        if twice := [metric for n, (dataset, metric) in enumerate(figures) if (dataset, metric) in figures[:n]]:
            raise UserError(f"{folder} holds {twice[0]} twice; delete the result that is not of this study")
        found.append(Measured(variant, seed, results))
    return found


def tabulate(study: Study, measured: Iterable[Measured]) -> pd.DataFrame:
    """One row a figure, over the seeds: COLUMNS. The standard deviation is that of the sample, empty for one seed.

    low and high are the mean over the seeds of each result's own 95 % interval, empty where one has none. They tell
    of other images of the same kind; std tells of other seeds.
    """
    rows = [
        (variant, result["evaluation"], result["dataset"], metric, value, *interval(result, metric))
        for variant, _, results in measured
        for result in results
        for metric, value in result["metrics"].items()
        if metric in study.metrics
    ]
    if not rows:
        raise UserError(f"the results in {study.results} hold none of {', '.join(study.metrics)}; mend `metrics`")
    keys = ["variant", "evaluation", "dataset", "metric"]
    table = pd.DataFrame(rows, columns=[*keys, "value", "low", "high"]).astype({"low": float, "high": float})
    found = table.groupby(keys, sort=False).agg(
        mean=("value", "mean"),
        std=("value", "std"),
        seeds=("value", "count"),
        low=("low", _mean_of_all),
        high=("high", _mean_of_all),
    )
    return found.reset_index()[COLUMNS]


def _mean_of_all(values: pd.Series) -> float:
    return values.mean(skipna=False)


def datasets(study: Study, table: pd.DataFrame) -> list[str]:
    """The data sets to show: all but the one that was chosen on, unless it is the only one."""
    every = list(dict.fromkeys(table.dataset))
    return [name for name in every if name != study.chosen_on] or every


def render(study: Study, table: pd.DataFrame) -> str:
    """The table as people read it, as Markdown and in per cent; one for each data set where there are several."""
    shown, several = datasets(study, table), table.dataset.nunique() > 1
    parts = [_markdown(study, table[table.dataset == name], study.intervals) for name in shown]
    return "\n\n".join(f"{name}\n\n{part}" if several else part for name, part in zip(shown, parts))


def best(study: Study, table: pd.DataFrame) -> tuple[str, float]:
    """The competitor with the highest mean of study.choose_by on study.chosen_on, and that mean.

    The first of several that are equal. Raises UserError when one of them lacks a figure to choose by.
    """
    on = table[table.dataset == study.chosen_on]
    if on.empty:
        known = ", ".join(sorted(set(table.dataset)))
        raise UserError(f"nothing was measured on {study.chosen_on}, which `chosen_on` names; measured: {known}")
    means = on.pivot_table(index="variant", columns="metric", values="mean", sort=False, dropna=False)
    means = means.reindex(index=study.competitors, columns=study.choose_by)
    for variant, row in means[means.isna().any(axis=1)].iterrows():
        lacking = ", ".join(row.index[row.isna()])
        raise UserError(f"{variant} has no {lacking} on {study.chosen_on}, so that the best cannot be chosen by it")
    if means.empty:
        raise UserError(f"no variant of study {study.name} competes; `baselines` names all of them")
    score = means.mean(axis=1)
    return score.idxmax(), float(score.max())


def render_choice(study: Study, table: pd.DataFrame) -> str:
    """Which variant validation chose, and its figures beside the baselines' on the other data sets, as Markdown."""
    if not study.competitors:
        return "Only baselines were run, so that there is nothing to choose."
    variant, score = best(study, table)
    by = " and ".join(study.choose_by)
    by = f"the mean of {by}" if len(study.choose_by) > 1 else by
    said = f"Best of {len(study.competitors)} on {study.chosen_on} by {by}: {variant} ({100 * score:.1f})."
    beside = table[table.variant.isin([variant, *study.baselines])]
    parts = [f"{said} With 95 % intervals over images:"]
    for name in datasets(study, table):
        parts += [f"{name}\n\n" + _markdown(study, beside[beside.dataset == name], intervals=True)]
    return "\n\n".join(parts)


def _markdown(study: Study, table: pd.DataFrame, intervals: bool) -> str:
    """A row a variant, a column a metric."""
    cells: dict[str, dict[str, str]] = {}
    for row in table.itertuples():
        cell = f"{100 * row.mean:.1f}" + (f" ± {100 * row.std:.1f}" if row.seeds > 1 and row.std == row.std else "")
        if intervals and row.low == row.low:
            cell += f" [{100 * row.low:.1f}, {100 * row.high:.1f}]"
        cells.setdefault(row.variant, {})[row.metric] = cell
    columns = list(dict.fromkeys(name for row in cells.values() for name in row))
    columns.sort(key=lambda name: study.metrics.index(name) if name in study.metrics else len(study.metrics))
    return aligned([["variant", *columns]] + [[v, *(row.get(c, "") for c in columns)] for v, row in cells.items()])


def aligned(lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table of a head and rows, its columns as wide as their widest cell."""
    widths = [max(len(line[k]) for line in lines) for k in range(len(lines[0]))]
    rows = ["| " + " | ".join(cell.ljust(w) for cell, w in zip(line, widths)) + " |" for line in lines]
    rows.insert(1, "|" + "|".join("-" * (w + 2) for w in widths) + "|")
    return "\n".join(rows)
