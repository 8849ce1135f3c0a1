"""Results to look at: `python -m pc_clip report results/ runs/` reads every result and every run below the folders.

Writes one HTML page that opens from disk and needs nothing else, its tables as Markdown, and every figure as CSV.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterable, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pandas as pd

from pc_clip.core.errors import UserError
from pc_clip.core.files import write_text
from pc_clip.report.page.gather import METRICS, Gathered, files_below, gather, read_result
from pc_clip.report.page.page import page
from pc_clip.report.page.summary import interval, summarise
from pc_clip.report.page.tables import every_figure, markdown
from pc_clip.report.page.words import figure, is_share, spread

# What an evaluation's names mean, for those who meet them on the terminal; the page has a paragraph of its own.
_NAMES = {
    "retrieve": "t2i: a caption finds its image; i2t: an image finds one of its captions (CLIP_benchmark).\n"
    "paired: one caption an image (SimCLIP). centred: i2t without what a caption has of all images. See "
    "docs/evaluations.md.",
    "caption": "right: type, object and value are all right. most_common, shuffled: said without looking at the pair.",
    "change_retrieval": "p2s: a pair finds one of its sentences; s2p: a sentence finds a pair it is said of. chance: a "
    "random order.\nsubtraction: the untrained model, the image after less the image before.",
}
_AT = re.compile(r"(.+)_r([1-9]\d*)")  # a figure at rank k, such as t2i_r10


def read(paths: Iterable[Path]) -> list[dict[str, Any]]:
    """All results in files and below folders. Raises UserError where there are none, or one is cut short."""
    paths, results = list(paths), []
    for file, _ in (pair for path in paths if path.exists() for pair in files_below(path)):
        if file.name == METRICS:
            continue
        try:
            results.append(read_result(file))
        except (OSError, ValueError, RecursionError) as error:
            raise UserError(f"{file} cannot be read ({error}); delete it and run that evaluation again") from error
    if not any(results):
        raise UserError(f"no results in {', '.join(map(str, paths))}; run.py writes them")
    return [content for content in results if content]


def long_table(results: Iterable[dict[str, Any]]) -> pd.DataFrame:
    """One row a figure: model, evaluation, dataset, about (which sentences or attribute), metric, value, n."""
    rows = [
        (r["model"], r["evaluation"], r["dataset"], r.get("about", ""), metric, value, r["n"])
        for r in results
        for metric, value in r["metrics"].items()
    ]
    return pd.DataFrame(rows, columns=["model", "evaluation", "dataset", "about", "metric", "value", "n"])


def show(results: Iterable[dict[str, Any]]) -> None:
    """Print results: one block an evaluation, a row a metric, a column a model. Fractions are shown in per cent.

    What is measured at several ranks, as NAME_r1, NAME_r5, ..., is one row a name and model, with a column a rank.
    """
    blocks: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for result in (r for r in results if r["metrics"]):
        blocks.setdefault((result["evaluation"], result["dataset"], result.get("about", "")), []).append(result)
    for (evaluation, dataset, about), block in blocks.items():
        table = long_table(block)
        ranked = _ranked(dict.fromkeys(table.metric))
        plain = table[~table.metric.isin([f"{name}_r{k}" for name, ks in ranked.items() for k in ks])]
        print(f"\n{evaluation} on {dataset}{about and f', {about}'} (n = {table.n.max()})")
        parts = [_by_model(plain)] if len(plain) else []
        parts += [_by_rank(block, ranked)] if ranked else []
        print("\n\n".join(parts))
        if ranked:
            print("\nrk: per cent found among the first k" + "; [a, b]: its 95 % interval" * ("[" in parts[-1]) + ".")
        if evaluation in _NAMES:
            print(_NAMES[evaluation])


def _by_model(table: pd.DataFrame) -> str:
    """A row a metric, a column a model."""
    wide = table.pivot_table(index="metric", columns="model", values="value", sort=False).astype(object)
    for metric, row in wide.iterrows():
        share = is_share(metric, row)
        wide.loc[metric] = [figure(value, share) for value in row]
    return wide.rename_axis(None).rename_axis(None, axis=1).to_string()


def _ranked(metrics: Iterable[str]) -> dict[str, list[int]]:
    """Name -> the ranks it is measured at; empty where there is one such figure alone, as difference_r1 is."""
    found: dict[str, list[int]] = {}
    for match in filter(None, map(_AT.fullmatch, metrics)):
        found.setdefault(match[1], []).append(int(match[2]))
    return found if sum(map(len, found.values())) > 1 else {}


def _by_rank(results: Sequence[dict[str, Any]], ranked: dict[str, list[int]]) -> str:
    """A row a name and model, a column a rank; the first rank of all with its interval."""
    ranks, several = sorted({k for ks in ranked.values() for k in ks}), len({r["model"] for r in results}) > 1
    rows = {}
    for name in ranked:
        for result in results:
            known = result["metrics"]
            cells = [figure(known.get(f"{name}_r{k}"), share=True) for k in ranks]
            cells[0] = f"{cells[0]} {spread(None, *interval(result, f'{name}_r{ranks[0]}'), share=True)}".strip()
            if any(f"{name}_r{k}" in known for k in ranks):
                rows[(name, result["model"]) if several else name] = cells
    wide = pd.DataFrame.from_dict(rows, orient="index", columns=[f"r{k}" for k in ranks])
    if several:
        wide.index = pd.MultiIndex.from_tuples(wide.index)
    return wide.to_string()


def write(paths: Sequence[Path], out: Path | None = None, baseline: str | None = None) -> tuple[Path, Gathered]:
    """Write the page, and beside it its tables as .md and its figures as .csv; returns the page's path.

    out: a folder, or a file that ends in .html; the first folder of results given when empty. Raises UserError
    for a path that is not there, for nothing to report, and for an unknown baseline.
    """
    found = gather(paths)
    summary = summarise(found, baseline)
    target = _target(paths, found, out)
    now = datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
    options = [("--out", out), ("--baseline", baseline)]
    command = ["python", "-m", "pc_clip", "report", *map(str, paths)]
    command += [word for name, value in options if value is not None for word in (name, str(value))]
    html = page(found, summary, command, now, [target.with_suffix(s).name for s in (".md", ".csv")])
    write_text(target.with_suffix(".csv"), every_figure(summary).to_csv(index=False, float_format="%.6f"))
    write_text(target.with_suffix(".md"), markdown(summary))
    write_text(target, html)
    return target, found


def _target(paths: Sequence[Path], found: Gathered, out: Path | None) -> Path:
    if out is None:
        first = found.results[0].file if found.results else found.runs[0].folder / METRICS
        near = next(p for p in paths if p.resolve() in (first.resolve(), *first.resolve().parents))
        return (near if near.is_dir() else near.parent) / "report.html"
    if out.suffix.lower() in (".html", ".htm") and not out.is_dir():
        return out
    if out.is_file():
        raise UserError(f"--out is {out}, a file that is no page; give a folder or a name that ends in .html")
    return out / "report.html"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m pc_clip report", description=__doc__)
    parser.add_argument("paths", type=Path, nargs="*", help="results and runs; results and runs here when not given")
    parser.add_argument("--out", type=Path, help="a folder, or a file that ends in .html; else beside the results")
    parser.add_argument("--baseline", help="what the others are compared with; the pretrained model when not given")
    arguments = parser.parse_args(argv)
    paths = arguments.paths or [p for p in (Path("results"), Path("runs")) if p.exists()] or [Path("results")]
    target, found = write(paths, arguments.out, arguments.baseline)
    for file, why in found.skipped:
        print(f"left out: {file}: {why}", file=sys.stderr)
    print(f"{target}\n{target.with_suffix('.md')}\n{target.with_suffix('.csv')}")
