"""Results to look at: `python -m pc_clip report results/ runs/` reads every result and every run below the folders.

Writes one HTML page that opens from disk and fetches nothing, its tables as Markdown, and every figure as CSV.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import matplotlib
import numpy as np
import pandas as pd
from markupsafe import Markup, escape
from pandas.io.formats.style import Styler
from PIL import Image

import pc_clip
from pc_clip.core.config.evaluate import EVALUATIONS
from pc_clip.core.errors import UserError, check_choice
from pc_clip.core.files import write_text
from pc_clip.report import charts
from pc_clip.report.results import QUESTION, cells, check_once, grid, long_table, natural, read, summarise, variant_of

LOG = "metrics.jsonl"  # of a run
MOST_PANELS = 6  # figures of an evaluation that its chart shows, the first ones; the table has all
MOST_CLASSES = 30  # of a confusion table that is shown whole
WIDEST = 1400  # pixels of a picture inside the page
NOTE = "Per cent where a figure is a share; ± is the standard deviation over seeds, [a, b] a 95 % interval over images."


class Section(NamedTuple):
    title: str
    text: str
    tables: list[Markup]
    pictures: list[Markup]


def write(paths: Sequence[Path], out: Path | None = None, baseline: str | None = None) -> tuple[Path, list[str]]:
    """Write the page, and beside it its tables as .md and its figures as .csv.

    out: a folder, or a file that ends in .html; the first folder given when empty. Returns the page's path, and a
    line for each file that is left out. Raises UserError for a path that is not there, for nothing to report, and for
    an unknown baseline.
    """
    results, left_out = read(paths)
    runs = _runs(paths, left_out)
    if not results and not runs:
        broken = "".join(f"; {line}" for line in left_out[:3])
        raise UserError(f"no results and no runs in {', '.join(map(str, paths))}; run.py writes them{broken}")
    names = _apart([(result["file"].parent.parent, result["model"]) for result in results])
    results = [result | {"model": name} for result, name in zip(results, names)]
    table = long_table(results)
    check_once(table, ["model", *QUESTION, "metric"])
    summary = _ordered(summarise(table), baseline)
    target = out or (paths[0] if paths[0].is_dir() else paths[0].parent)
    if target.suffix.lower() not in (".html", ".htm"):
        if target.is_file():
            raise UserError(f"--out is {out}, a file that is no page; give a folder or a name that ends in .html")
        target = target / "report.html"
    tables = _tables(summary) if len(summary) else {}
    markdown = [f"## {title}\n\n{table.to_markdown(disable_numparse=True)}" for title, table in tables.items()]
    write_text(target.with_suffix(".csv"), summary.to_csv(index=False, float_format="%.6f"))
    write_text(target.with_suffix(".md"), "\n\n".join([NOTE, *markdown]) + "\n")
    with matplotlib.rc_context(charts.LOOK):
        write_text(target, _page(summary, tables, results, runs, left_out))
    return target, left_out


# -- what there is to show -----------------------------------------------------------------------------


def _runs(paths: Sequence[Path], left_out: list[str]) -> dict[str, pd.DataFrame]:
    """What each run logged, by its name, with `step` for index; lines that are cut short are left out and counted."""
    files = [file for path in paths for file in ([path] if path.is_file() else sorted(path.rglob(LOG), key=natural))]
    files = [file for file in dict.fromkeys(files) if file.name == LOG]
    runs = {}
    for file, name in zip(files, _apart([(file.parent.parent, file.parent.name) for file in files])):
        rows, lines = [], file.read_text(encoding="utf-8", errors="replace").splitlines()
        for line in lines:
            try:
                rows.append(json.loads(line))
            except ValueError:
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
    """The same with `title` and `baseline`, whose rows come first: the pretrained model unless it is named."""
    if baseline is not None:
        check_choice("--baseline", baseline, summary.variant.unique())
    pretrained = summary.variant.str.fullmatch(r"(?:.*/)?(?:base|pretrained|.*-pretrained)")
    summary.insert(1, "baseline", pretrained if baseline is None else summary.variant == baseline)
    order = sorted(summary.index, key=lambda n: (not summary.baseline[n], natural(summary.variant[n])))
    return summary.loc[order].reset_index(drop=True)


def _title(row: Any) -> str:
    about = str(row.get("about") or "").replace("_", " ")
    return f"{row['evaluation']} on {row['dataset']}" + (f": {about}" if about else "")


def _tables(summary: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Title -> table of texts: each evaluation's first figure, then all figures of every evaluation."""
    rows = summary.assign(text=cells(summary), title=[_title(row) for _, row in summary[QUESTION].iterrows()])
    rows["variant"] += np.where(rows.baseline, " (baseline)", "")
    first = rows[rows.metric != "images"].drop_duplicates("title").set_index("title").metric
    heads = rows[rows.metric == rows.title.map(first)]
    tables = {
        "Overview": grid(heads.assign(head=heads.title + ": " + heads.metric), "variant", "head").rename_axis(None)
    }
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
        answers = [result for result in results if _title(result) == title]
        section = Section(title, NOTE, [_table(table)], [])
        if answers:
            rows = summary[[_title(row) == title for _, row in summary[QUESTION].iterrows()]]
            metrics = list(dict.fromkeys(rows.metric))[:MOST_PANELS]
            chart = charts.svg(
                charts.dots(rows, metrics, list(rows.variant[rows.baseline])), f"{title}: the table's figures"
            )
            baseline = rows.variant[rows.baseline].drop_duplicates().tolist()
            pictures = [chart, *charts.curves(answers), *_pictures(answers, left_out)]
            text = f"{EVALUATIONS.get(answers[0]['evaluation'], '')}; n = {rows.n.max()}"
            section = Section(title, text, [_table(table), *_confusions(answers, baseline)], pictures)
        sections.append(section)
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


def _table(table: pd.DataFrame | Styler, caption: str = "") -> Markup:
    """As HTML. Whatever stands in it stays text."""
    style = table.style.format(escape="html") if isinstance(table, pd.DataFrame) else table
    style = style.format_index(escape="html").format_index(escape="html", axis=1)
    return Markup(style.set_caption(str(escape(caption))).to_html())


def _sources(results: list[dict[str, Any]]) -> Markup:
    """A row a result: what it says of when, with what and by which command it was made."""
    names = ["model", "seed", "n", "date", "commit", "key", "weights", "machine", "gpu", "versions", "command"]
    rows = {str(r["file"]): {name: r.get(name) if r.get(name) is not None else "" for name in names} for r in results}
    for row in rows.values():
        row["command"] = shlex.join(map(str, row["command"]))
        row["versions"] = ", ".join(f"{name} {version}" for name, version in dict(row["versions"]).items())
    return _table(pd.DataFrame.from_dict(rows, orient="index", columns=names).astype(str))


def _confusions(results: list[dict[str, Any]], baseline: list[str]) -> list[Markup]:
    """The per cent of each true class's images (rows) taken for each class, seeds summed, and the change in points.

    Of many classes the pairs alone that changed most.
    """
    counts: dict[str, dict[str, pd.DataFrame]] = {}
    for result in results:
        for question, detail in (result.get("details") or {}).items():
            if isinstance(detail, dict) and detail.get("confusion"):
                table = pd.DataFrame(detail["confusion"], detail["classes"], detail["classes"], dtype=float)
                variants, variant = counts.setdefault(question, {}), variant_of(result)
                variants[variant] = variants[variant] + table if variant in variants else table
    tables = []
    for question, variants in counts.items():
        shares = {variant: 100 * table.div(table.sum(axis=1), axis=0) for variant, table in variants.items()}
        before = next((shares[name] for name in baseline if name in shares), None)
        for variant, after in shares.items():
            change = (after - (after if before is None else before)).fillna(0).round()
            signed = change.map(lambda points: f" ({points:+.0f})" if points else "")
            text = after.map(lambda share: "" if np.isnan(share) else f"{share:.0f}") + signed
            caption = f"{question}, {variant}: per cent of a true class's images, and the change"
            if len(text) <= MOST_CLASSES:
                style = text.style.background_gradient("Blues", vmin=0, vmax=150, axis=None, gmap=after)
                tables.append(_table(style.format(escape="html"), caption))
            elif change.any(axis=None):
                most = change.stack().abs().nlargest(10).index
                rows = {f"{true} taken for {guess}": text.loc[true, guess] for true, guess in most}
                tables.append(_table(pd.DataFrame.from_dict(rows, orient="index", columns=["after"]), caption))
    return tables


def _pictures(results: list[dict[str, Any]], left_out: list[str]) -> list[Markup]:
    """The pictures beside each variant's first result. Those that cannot be shown are left out and named."""
    images, seen = [], set()
    for result in results:
        variant = variant_of(result)
        for picture in () if variant in seen else result.get("pictures") or []:
            file = result["file"].parent / Path(picture["file"]).name  # right beside it, and nowhere else
            try:
                with Image.open(file) as image:
                    image.thumbnail((WIDEST, WIDEST))
                    out = io.BytesIO()
                    image.save(out, "WEBP", quality=85)
            except (OSError, ValueError, Image.DecompressionBombError) as error:
                left_out.append(f"{file}: {'it is not there' if not file.exists() else f'no picture ({error})'}")
                continue
            images.append(
                charts.image("webp", out.getvalue(), picture.get("alt") or file.stem, f"{variant}: {file.stem}")
            )
        seen.add(variant)
    return images


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m pc_clip report", description=__doc__)
    parser.add_argument("paths", type=Path, nargs="*", help="results and runs; results and runs here when not given")
    parser.add_argument("--out", type=Path, help="a folder, or a file that ends in .html; else beside the results")
    parser.add_argument("--baseline", help="what the others are compared with; the pretrained model when not given")
    arguments = parser.parse_args(argv)
    paths = arguments.paths or [p for p in (Path("results"), Path("runs")) if p.exists()] or [Path("results")]
    target, left_out = write(paths, arguments.out, arguments.baseline)
    for line in left_out:
        print(f"left out: {line}", file=sys.stderr)
    print(f"{target}\n{target.with_suffix('.md')}\n{target.with_suffix('.csv')}")
