"""Results to look at: `python -m pc_clip report results/ runs/` reads every result and every run below the folders.

Writes one HTML page that opens from disk and fetches nothing, its tables as Markdown, and every figure as CSV.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import numpy as np
import pandas as pd
from markupsafe import Markup

import pc_clip
from pc_clip.core.config.evaluate import EVALUATIONS
from pc_clip.core.errors import UserError, check_choice
from pc_clip.core.files import write_text
from pc_clip.report import charts
from pc_clip.report.results import (
    QUESTION,
    cells,
    check_once,
    grid,
    long_table,
    natural,
    read,
    summarise,
    unlike,
    variant_of,
)

LOG = "metrics.jsonl"  # of a run
MOST_CONFUSED = 10  # pairs of classes that are listed
NOTE = "Per cent where a figure is a share; ± is the standard deviation over seeds, [a, b] a 95 % interval over images."
MADE_BY = ["model", "seed", "n", "date", "commit", "key", "weights", "machine", "gpu", "versions", "command"]


class Section(NamedTuple):
    title: str
    text: str
    tables: list[Markup]
    pictures: list[Markup]


def write(paths: Sequence[Path], out: Path | None = None, baseline: str | None = None) -> tuple[Path, list[str]]:
    """Write report.html, report.md (its tables) and report.csv (every figure).

    out: a folder; that of the first path when empty. Returns the page's path, and a line for each file that is left
    out. Raises UserError for a path that does not exist, for nothing to report, and for an unknown baseline.
    """
    results, left_out = read(paths)
    runs = _runs(paths, left_out)
    if not results and not runs:
        broken = "".join(f"; {line}" for line in left_out[:3])
        raise UserError(f"no results and no runs in {', '.join(map(str, paths))}; run.py writes them{broken}")
    names = _apart([(result["file"].parent.parent, result["model"]) for result in results])
    results = [result | {"model": name} for result, name in zip(results, names)]
    left_out += [f"not to be compared: {line}" for line in unlike(results)]
    table = long_table(results)
    check_once(table, ["model", *QUESTION, "metric"])
    summary = _ordered(summarise(table), baseline)
    tables = _tables(summary)
    markdown = [f"## {title}\n\n{table.to_markdown(disable_numparse=True)}" for title, table in tables.items()]
    page = (out or (paths[0] if paths[0].is_dir() else paths[0].parent)) / "report.html"
    write_text(page.with_suffix(".csv"), summary.drop(columns="title").to_csv(index=False, float_format="%.6f"))
    write_text(page.with_suffix(".md"), "\n\n".join([NOTE, *markdown]) + "\n")
    write_text(page, _page(summary, tables, results, runs, left_out))
    return page, left_out


# -- what there is to show -----------------------------------------------------------------------------


def _runs(paths: Sequence[Path], left_out: list[str]) -> dict[str, pd.DataFrame]:
    """The log of each run by name, indexed by `step`; truncated lines are dropped and counted."""
    files = [file for path in paths for file in sorted(path.rglob(LOG), key=natural)]
    runs = {}
    for file, name in zip(files, _apart([(file.parent.parent, file.parent.name) for file in files])):
        rows, lines = [], file.read_text(encoding="utf-8").splitlines()
        for line in lines:
            try:
                rows.append({"step": json.loads(line)["step"]} | json.loads(line))
            except (ValueError, KeyError, TypeError):
                continue
        if len(rows) < len(lines):
            left_out.append(f"{file}: {len(lines) - len(rows)} of its {len(lines)} lines are broken")
        if rows:
            runs[name] = pd.DataFrame(rows).set_index("step").sort_index().select_dtypes("number")
    return runs


def _apart(places: Sequence[tuple[Path, str]]) -> list[str]:
    """Names with their folders before them where these differ: several studies have a variant `base`."""
    folders = [folder.resolve() for folder, _ in places]
    common = os.path.commonpath(folders) if folders else ""
    return [(folder.relative_to(common) / name).as_posix() for folder, (_, name) in zip(folders, places)]


def _ordered(summary: pd.DataFrame, baseline: str | None) -> pd.DataFrame:
    """The same with `title`, and `baseline`, whose rows come first: the pretrained model unless it is named."""
    if baseline is not None:
        check_choice("--baseline", baseline, summary.variant.unique())
    pretrained = summary.variant.str.fullmatch(r"(?:.*/)?(?:base|pretrained|.*-pretrained)")
    summary.insert(1, "baseline", pretrained if baseline is None else summary.variant == baseline)
    summary["title"] = [_title(row) for row in summary.to_dict("records")]
    order = sorted(summary.index, key=lambda n: (not summary.baseline[n], natural(summary.variant[n])))
    return summary.loc[order].reset_index(drop=True)


def _title(result: dict[str, Any]) -> str:
    about = str(result.get("about") or "").replace("_", " ")
    return f"{result['evaluation']} on {result['dataset']}" + (f": {about}" if about else "")


def _tables(summary: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Title -> table of texts: each evaluation's first figure, then all figures of every evaluation."""
    if summary.empty:
        return {}
    rows = summary.assign(text=cells(summary))
    rows["variant"] += np.where(rows.baseline, " (baseline)", "")
    first = rows[rows.metric != "images"].drop_duplicates("title").set_index("title").metric
    heads = rows[rows.metric == rows.title.map(first)]
    heads = heads.assign(head=heads.title + ": " + heads.metric)
    tables = {"Overview": grid(heads, "variant", "head").rename_axis(None)}
    for title, block in rows.groupby("title", sort=False):
        wide = grid(block, "variant", "metric").rename_axis(None)
        tables[title] = wide.T if wide.shape[1] > max(8, len(wide)) else wide
    return tables


# -- the page ------------------------------------------------------------------------------------------


def _page(
    summary: pd.DataFrame,
    tables: dict[str, pd.DataFrame],
    results: list[dict[str, Any]],
    runs: dict[str, pd.DataFrame],
    left_out: list[str],
) -> str:
    sections = []
    for title, table in tables.items():
        answers, rows = [r for r in results if _title(r) == title], summary[summary.title == title]
        overview = Section(title, NOTE, [_table(table)], [])
        sections.append(_section(title, table, rows, answers, left_out) if answers else overview)
    sections += [Section("Training", "What finetune.py logged over steps.", [], charts.training(runs))] if runs else []
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    template = environment.from_string((Path(__file__).parent / "page.html.j2").read_text(encoding="utf-8"))
    return template.render(
        title=", ".join(dict.fromkeys(summary.dataset)) or "training",
        made=f"python -m pc_clip report; pc_clip {pc_clip.__version__}",
        left_out=left_out,
        sections=sections,
        sources=_sources(results),
    )


def _section(
    title: str, table: pd.DataFrame, rows: pd.DataFrame, results: list[dict[str, Any]], left_out: list[str]
) -> Section:
    """All that is shown of one evaluation. rows: of the summary."""
    text = f"{EVALUATIONS.get(results[0]['evaluation'], '')}; n = {rows.n.max()}"
    tables = [_table(table), *_confusions(results, rows.variant[rows.baseline].tolist())]
    return Section(title, text, tables, [*charts.curves(results), *_pictures(results, left_out)])


def _table(table: pd.DataFrame, caption: str = "") -> Markup:
    """The table as HTML, escaped."""
    with pd.option_context("display.max_colwidth", None):
        return Markup(table.rename_axis(columns=caption or None).to_html(border=0))


def _sources(results: list[dict[str, Any]]) -> Markup:
    """A row a result: what it says of when, with what and by which command it was made."""
    files = [str(result["file"]) for result in results]
    return _table(pd.DataFrame(results, files, MADE_BY, dtype=object).fillna("").astype(str))


def _confusions(results: list[dict[str, Any]], baselines: list[str]) -> list[Markup]:
    """The classes most often taken for others: per cent of the true class, seeds summed, and the change in points."""
    counts: dict[tuple[str, str], pd.DataFrame] = {}
    for result in results:
        for question, detail in (result.get("details") or {}).items():
            if isinstance(detail, dict) and detail.get("confusion"):
                table = pd.DataFrame(detail["confusion"], detail["classes"], detail["classes"], dtype=float)
                key = question, variant_of(result["model"])
                counts[key] = counts[key] + table if key in counts else table
    shares = {key: 100 * table.div(table.sum(axis=1), axis=0) for key, table in counts.items()}
    tables = []
    for (question, variant), share in shares.items():
        before = next((shares[question, name] for name in baselines if (question, name) in shares), None)
        most = share.mask(np.eye(len(share), dtype=bool)).stack().nlargest(MOST_CONFUSED)
        rows = {
            f"{true} taken for {guess}": [f"{value:.0f}"]
            + ([] if before is None else [f"{value - before.loc[true, guess]:+.0f}"])
            for (true, guess), value in most.items()
        }
        columns = ["per cent"] if before is None else ["per cent", "change"]
        table = pd.DataFrame.from_dict(rows, orient="index", columns=columns)
        tables.append(_table(table, f"{question}, {variant}"))
    return tables


def _pictures(results: list[dict[str, Any]], left_out: list[str]) -> list[Markup]:
    """The pictures beside each variant's first result. Those that are missing are left out and named."""
    images, first = [], {}
    for result in results:
        first.setdefault(variant_of(result["model"]), result)
    for variant, result in first.items():
        for picture in result.get("pictures") or []:
            file = result["file"].parent / Path(picture["file"]).name  # right beside it, and nowhere else
            if file.is_file():
                images.append(charts.image("png", file.read_bytes(), picture["alt"], f"{variant}: {file.stem}"))
            else:
                left_out.append(f"{file}: it is not there")
    return images


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m pc_clip report", description=__doc__)
    parser.add_argument("paths", type=Path, nargs="*", help="results and runs; results and runs here when not given")
    parser.add_argument("--out", type=Path, help="a folder; else beside the results")
    parser.add_argument("--baseline", help="what the others are compared with; the pretrained model when not given")
    arguments = parser.parse_args(argv)
    paths = arguments.paths or [p for p in (Path("results"), Path("runs")) if p.exists()] or [Path("results")]
    page, left_out = write(paths, arguments.out, arguments.baseline)
    for line in left_out:
        print(line if line.startswith("not to be compared") else f"left out: {line}", file=sys.stderr)
    print(f"{page}\n{page.with_suffix('.md')}\n{page.with_suffix('.csv')}")
