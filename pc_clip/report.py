"""Results to look at: `python -m pc_clip.report results/ runs/` reads every result and every run below the folders.

Writes one HTML page that opens from disk and needs nothing else, its tables as Markdown, and every figure as CSV.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pandas as pd

from pc_clip.errors import UserError, run_script
from pc_clip.files import write_text
from pc_clip.report_page.gather import METRICS, Gathered, files_below, gather, read_result
from pc_clip.report_page.page import page
from pc_clip.report_page.summary import summarise
from pc_clip.report_page.tables import every_figure, markdown
from pc_clip.report_page.words import figure, is_share


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
    """Print results: one block an evaluation, one column a model. Fractions are shown in per cent."""
    table = long_table(results)
    for (evaluation, dataset, about), block in table.groupby(["evaluation", "dataset", "about"], sort=False):
        wide = block.pivot_table(index="metric", columns="model", values="value", sort=False).astype(object)
        print(f"\n{evaluation} on {dataset}{about and f', {about}'} (n = {block.n.max()})")
        for metric, row in wide.iterrows():
            share = is_share(metric, row)
            wide.loc[metric] = [figure(value, share) for value in row]
        print(wide.rename_axis(None).rename_axis(None, axis=1).to_string())


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
    command = ["python", "-m", "pc_clip.report", *map(str, paths)]
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


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m pc_clip.report", description=__doc__)
    parser.add_argument("paths", type=Path, nargs="*", help="results and runs; results and runs here when not given")
    parser.add_argument("--out", type=Path, help="a folder, or a file that ends in .html; else beside the results")
    parser.add_argument("--baseline", help="what the others are compared with; the pretrained model when not given")
    arguments = parser.parse_args()
    paths = arguments.paths or [p for p in (Path("results"), Path("runs")) if p.exists()] or [Path("results")]
    target, found = write(paths, arguments.out, arguments.baseline)
    for file, why in found.skipped:
        print(f"left out: {file}: {why}", file=sys.stderr)
    print(f"{target}\n{target.with_suffix('.md')}\n{target.with_suffix('.csv')}")


if __name__ == "__main__":
    run_script(main)
