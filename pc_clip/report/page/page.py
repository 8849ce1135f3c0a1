"""The page: everything gathered, in one HTML file that opens from disk and fetches nothing."""

from __future__ import annotations

import ast
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

import pc_clip
from pc_clip.report.page import charts, words
from pc_clip.report.page.charts import Dot
from pc_clip.report.page.confusion import SMALLEST, comparisons
from pc_clip.report.page.curves import curves, heights
from pc_clip.report.page.gather import Gathered
from pc_clip.report.page.pictures import pictures
from pc_clip.report.page.summary import Block, Summary, distinct
from pc_clip.report.page.tables import heads
from pc_clip.report.page.training import ends, logs

HERE = Path(__file__).parent
EVALS = HERE.parent / "evals"
_FACTS = ("commit", "date", "seed", "key", "weights", "checkpoint_of")


@dataclass(frozen=True)
class Command:
    """A command line, and what it made."""

    line: str
    made: list[str]


def page(found: Gathered, summary: Summary, command: Sequence[str], now: str, beside: Sequence[str]) -> str:
    """The HTML. Adds to `found.skipped` the pictures that cannot be shown.

    command: the one that makes this page; now: when, as text; beside: the files that hold its tables and figures.
    """
    shown = [(block, pictures(block, found)) for block in summary.blocks]
    return _template().render(
        css=Markup((HERE / "page.css").read_text(encoding="utf-8")),
        title=title(summary),
        version=pc_clip.__version__,
        command=shlex.join(command),
        now=now,
        beside=beside,
        summary=summary,
        style={v.name: v.style for v in summary.variants},
        baselines=[v.name for v in summary.baselines()],
        heads=heads(summary),
        datasets=list(dict.fromkeys(block.dataset for block in summary.blocks)),
        facts=facts(found, summary),
        about={block.evaluation: described(block.evaluation) for block in summary.blocks},
        dots=[dots(summary, block) for block in summary.blocks],
        logs=logs(summary),
        ends=ends,
        curves=[(block, drawn) for block in summary.blocks if (drawn := curves(block))],
        confusion=[(block, compared) for block in summary.blocks if (compared := comparisons(summary, block))],
        pictures=[(block, files) for block, files in shown if files],
        commands=commands(found),
        sources=sources(summary),
        skipped=found.skipped,
    )


@lru_cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"listed": words.listed, "breakable": breakable}
    environment.globals |= {
        "words": words, "swatch": charts.swatch, "dot_chart": charts.dot_chart, "line_chart": charts.line_chart,
        "zip": zip, "heights": heights, "SMALLEST": SMALLEST,
    }  # fmt: skip
    return environment.get_template("page.html.j2")


def title(summary: Summary) -> str:
    """What was measured, in a line."""
    tuned = len(summary.variants)
    datasets = words.listed((block.dataset for block in summary.blocks), 4)
    return words.counted(tuned, "model") + (f" on {datasets}" if datasets else ", trained")


def facts(found: Gathered, summary: Summary) -> list[tuple[str, str]]:
    """What the results say of when, with what and where they were made."""
    every = [*found.results, *found.runs]
    dates = sorted(date[:16].replace("T", " ") for date in distinct(every, lambda c: c.get("date")))
    commits = [
        c[:12] + (" with uncommitted changes" if c.endswith("+") else "")
        for c in distinct(every, lambda c: c.get("commit"))
    ]
    versions = distinct(every, lambda c: ", ".join(_versions(c)))
    machines = distinct(every, lambda c: ", ".join(str(c[k]) for k in ("machine", "gpu") if c.get(k)))
    rows = [
        ("Evaluations", words.listed(block.evaluation for block in summary.blocks)),
        ("Results", words.counted(len(found.results), "file") if found.results else ""),
        ("Runs", words.counted(len(found.runs), "training log") if found.runs else ""),
        ("Baseline", words.listed(v.name for v in summary.baselines())),
        ("Made", " to ".join(dict.fromkeys([*dates[:1], *dates[-1:]])) + (" UTC" if dates else "")),
        ("Code", words.listed(commits, 4)),
        ("Versions", "; ".join(versions[:3])),
        ("Machine", words.listed(machines, 4)),
    ]
    return [(name, value) for name, value in rows if value]


def described(evaluation: str) -> str:
    """The first paragraph of an evaluation's own documentation; nothing for one that is not of this version."""
    known = {path.stem: path for path in EVALS.glob("*.py")}
    if evaluation not in known:
        return ""
    text = ast.get_docstring(ast.parse(known[evaluation].read_text(encoding="utf-8"))) or ""
    return " ".join(text.split("\n\n")[0].split())


def dots(summary: Summary, block: Block) -> list[tuple[str, list[Dot]]]:
    """The main shares of a block as dots with whiskers, for the chart beside its table."""
    rows = []
    for metric in block.main:
        known = [(v, f) for v in block.results if (f := block.figures.get((v, metric)))]
        if block.shares[metric] and known:
            rows.append((metric, [_dot(summary.variant(v).style, v, f) for v, f in known]))
    return rows


def commands(found: Gathered) -> list[Command]:
    """Every command that made a result or a run, with the labels of what it made."""
    made: dict[str, list[str]] = {}
    for item in found.results:
        _note(made, item.content, f"{item.content['model']}: {item.content['evaluation']}")
    for run in found.runs:
        _note(made, run.about, run.shown)
    return [Command(line, list(dict.fromkeys(labels))) for line, labels in made.items()]


def sources(summary: Summary) -> list[dict[str, str]]:
    """A row a result: where it lies, and what it says of itself."""
    return [
        {"file": result.shown, "variant": variant, "evaluation": block.title, "n": str(result.content.get("n", ""))}
        | {name: str(result.content.get(name) if result.content.get(name) is not None else "") for name in _FACTS}
        for block in summary.blocks
        for variant, results in block.results.items()
        for result in results
    ]


def breakable(text: str) -> Markup:
    """Text that may break after an underscore or a slash."""
    parts = str(text).replace("_", "_\n").replace("/", "/\n").split("\n")
    return Markup("<wbr />").join(parts)


def _dot(style: int, name: str, figure: Any) -> Dot:
    if figure.std is not None:
        return Dot(name, figure.mean, figure.mean - figure.std, figure.mean + figure.std, style)
    return Dot(name, figure.mean, figure.low, figure.high, style)


def _versions(content: dict[str, Any]) -> list[str]:
    known = content.get("versions")
    own = [("pc_clip", content.get("pc_clip")), ("python", content.get("python"))]
    return [f"{k} {v}" for k, v in [*own, *(known.items() if isinstance(known, dict) else ())] if v]


def _note(made: dict[str, list[str]], content: dict[str, Any], label: str) -> None:
    command = content.get("command")
    if isinstance(command, list) and command:
        made.setdefault(f"python {shlex.join(map(str, command))}", []).append(label)
