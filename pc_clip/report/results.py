"""Results of run.py as tables: JSON files -> one pandas frame -> the terminal, CSV, Markdown."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pandas as pd

from pc_clip.core.errors import UserError

QUESTION = ["evaluation", "dataset", "about"]
RESULT_KEYS = {"model", "evaluation", "dataset", "metrics"}
SEED = r"(?<=.)-seed\d+$"  # NAME-seed0, NAME-seed1, ... are the seeds of one variant

# Figures between -1 and 1 that are not fractions, by a word of their name.
_PLAIN = {"alignment", "alpha", "cosine", "images", "modality", "spearman"}


def read(paths: Iterable[Path]) -> tuple[list[dict[str, Any]], list[str]]:
    """Results in files and below folders, each with its path as "file"; and a line for each file left out.

    Below a folder, JSON of other kinds is passed over. Raises UserError for a path that does not exist.
    """
    results, left_out = {}, []
    for given in paths:
        if not given.exists():
            raise UserError(f"no such file or folder: {given}; give a folder of results or of runs")
        for file in sorted(given.rglob("*.json"), key=natural) if given.is_dir() else [given]:
            try:
                content = json.loads(file.read_text(encoding="utf-8"))
            except (ValueError, RecursionError):
                left_out.append(f"{file}: it is cut short or no JSON")
                continue
            if not isinstance(content, dict) or not content.keys() >= RESULT_KEYS:
                left_out += [f"{file}: it is not a result of run.py"] if file == given else []
            elif not all(isinstance(value, int | float | None) for value in content["metrics"].values()):
                left_out.append(f"{file}: its metrics are not all numbers")
            else:
                results[file.resolve()] = content | {"file": file}
    return list(results.values()), left_out


def natural(name: Any) -> list[tuple[str, int]]:
    """A sort key that counts as people do: k2 comes before k16."""
    return [(text, int(digits or -1)) for text, digits in re.findall(r"(\D*)(\d*)", str(name))]


def variant_of(model: str) -> str:
    return re.sub(SEED, "", model)


def long_table(results: Iterable[dict[str, Any]]) -> pd.DataFrame:
    """A row a figure: model, evaluation, dataset, about (sentences or attribute), metric, value, n, low, high.

    low and high are the ends of the figure's 95 % interval, NaN where there is none.
    """
    rows = [
        (r["model"], r["evaluation"], r["dataset"], r.get("about") or "", metric, value, r.get("n"), *ends)
        for r in results
        for metric, value in r["metrics"].items()
        for ends in [(r.get("intervals") or {}).get(metric) or (None, None)]
    ]
    table = pd.DataFrame(rows, columns=["model", *QUESTION, "metric", "value", "n", "low", "high"])
    return table.astype({"value": float, "low": float, "high": float})


def check_once(table: pd.DataFrame, columns: list[str]) -> None:
    """Raise UserError where two rows say the same thing, as two results that one folder holds of one question."""
    twice = table[table.duplicated(columns)]
    if len(twice):
        model, metric = twice.iloc[0][[columns[0], "metric"]]
        raise UserError(
            f"the results hold {metric} of {model} twice; delete the one that is older or of other settings"
        )


def unlike(results: Iterable[dict[str, Any]]) -> list[str]:
    """A line for each question that results answer on different images: their figures cannot be compared."""
    asked: dict[str, dict[str, str]] = {}
    for result in results:
        question = " on ".join([result["evaluation"], result["dataset"]])
        question += f", {result['about']}" if result.get("about") else ""
        asked.setdefault(question, {}).setdefault(result.get("images", ""), result["model"])
    several = {question: list(models.values()) for question, models in asked.items() if len(models) > 1}
    return [f"{question}: {a} and {b} saw different images" for question, (a, b, *_) in several.items()]


def summarise(table: pd.DataFrame) -> pd.DataFrame:
    """A row a figure of a variant over its seeds: variant, QUESTION, metric, mean, std, seeds, low, high, n.

    std: of the sample, NaN for one seed; it tells of other seeds. low, high: the mean of the seeds' own intervals, NaN
    where one has none; they tell of other images of the same kind.
    """

    def mean_of_all(ends: pd.Series) -> float:
        return ends.mean(skipna=False)

    groups = table.assign(variant=table.model.str.replace(SEED, "", regex=True)).groupby(
        ["variant", *QUESTION, "metric"], sort=False
    )
    return groups.agg(
        mean=("value", "mean"),
        std=("value", "std"),
        seeds=("value", "count"),
        low=("low", mean_of_all),
        high=("high", mean_of_all),
        n=("n", "max"),
    ).reset_index()


def is_share(metric: str, values: Iterable[float]) -> bool:
    """Whether a figure is shown in per cent: all values lie between -1 and 1, and the name is of no other unit.

    CIDEr always is, as papers print it, though it may be above 1.
    """
    words = set(metric.split("_"))
    return "cider" in words or not (_PLAIN & words or any(abs(value) > 1 for value in values))


def figure(value: float, share: bool) -> str:
    """87.6 for the share 0.876; 3 for 3.0, 0.17 for 0.1667; a dash for NaN."""
    if not math.isfinite(value):
        return "–"
    number = round(100 * value, 1) + 0.0 if share else value  # + 0.0: no minus before a zero
    whole = not share and float(value).is_integer()
    return f"{number:{'.0f' if whole else '.1f' if share else '.2f'}}".replace("-", "−")


def cells(summary: pd.DataFrame, intervals: bool = False) -> pd.Series:
    """Each figure as people read it: 80.0 ± 1.2 over seeds, 80.0 [75.0, 84.5] of one result; both with `intervals`."""
    share = summary.groupby("metric")["mean"].transform(lambda values: is_share(values.name, values))

    def text(row: Any, share: bool) -> str:
        parts = [figure(row.mean, share)]
        parts += [f"± {figure(row.std, share)}"] if not math.isnan(row.std) else []
        if not math.isnan(row.low) and (intervals or len(parts) == 1):
            parts += [f"[{figure(row.low, share)}, {figure(row.high, share)}]"]
        return " ".join(parts)

    rows = summary[["mean", "std", "low", "high"]].itertuples()
    return pd.Series([text(row, each) for row, each in zip(rows, share)], index=summary.index, dtype=object)


def grid(rows: pd.DataFrame, index: str | list[str], columns: str, values: str = "text") -> pd.DataFrame:
    """Rows as a table of texts in the order they come in, with a dash for what there is not."""
    wide = rows.pivot_table(index=index, columns=columns, values=values, aggfunc="first", sort=False)
    return wide.rename_axis(columns=None).fillna("–")


def show(results: Iterable[dict[str, Any]]) -> None:
    """Print results: one block an evaluation, a row a metric, a column a model. Fractions are shown in per cent."""
    for (evaluation, dataset, about), block in long_table(results).groupby(QUESTION, sort=False):
        print(f"\n{evaluation} on {dataset}{about and f', {about}'} (n = {block.n.max()})")
        block = block.rename(columns={"value": "mean"}).assign(std=math.nan)
        print(grid(block.assign(text=cells(block)), "metric", "model").rename_axis(index=None).to_string())
