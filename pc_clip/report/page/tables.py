"""The page's tables without the page: Markdown to paste, CSV to compute with."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from pc_clip.report.page.summary import Block, Summary
from pc_clip.report.page.words import figure, spread

COLUMNS = [
    "variant", "baseline", "evaluation", "dataset", "about", "metric", "main",
    "mean", "std", "low", "high", "seeds", "n",
]  # fmt: skip


def cell(block: Block, variant: str, metric: str) -> str:
    """A figure and its spread in one line; empty where the variant has none."""
    found = block.figures.get((variant, metric))
    if found is None:
        return ""
    share = block.shares[metric]
    return f"{figure(found.mean, share)} {spread(found.std, found.low, found.high, share)}".strip()


def heads(summary: Summary) -> list[tuple[Block, str]]:
    """The first figure of each block, the columns of the overview; none of a block that only counts its images."""
    first = [(block, next((m for m in block.main if m != "images"), None)) for block in summary.blocks]
    return [(block, metric) for block, metric in first if metric is not None]


def markdown(summary: Summary) -> str:
    """The overview, then the main figures of each evaluation."""
    measured = summary.measured()
    base = {v.name for v in summary.baselines()}
    label = {name: f"{name} (baseline)" if name in base else name for name in measured}
    parts = [
        "Per cent where a figure is a share; ± is the sample standard deviation over seeds, "
        "[a, b] a bootstrap 95 % interval."
    ]
    columns = heads(summary)
    head = ["variant", *(f"{block.title}: {metric}" for block, metric in columns)]
    rows = [[label[name], *(cell(block, name, metric) for block, metric in columns)] for name in measured]
    if rows:
        parts.append(_table(head, rows))
    for block in summary.blocks:
        n = "" if block.n is None else f" (n = {block.n})"
        rows = [[label[name], *(cell(block, name, metric) for metric in block.main)] for name in block.results]
        parts += [f"## {_escape(block.title)}{n}", _table(["variant", *block.main], rows)]
    return "\n\n".join(parts) + "\n"


def every_figure(summary: Summary) -> pd.DataFrame:
    """One row a figure, COLUMNS; fractions as they are. std is empty for one seed, low and high for several."""
    base = {v.name for v in summary.baselines()}
    rows = [
        (
            variant, variant in base, block.evaluation, block.dataset, block.about, metric, metric in block.main,
            found.mean, found.std, found.low, found.high, found.seeds, found.n,
        )
        for block in summary.blocks
        for (variant, metric), found in block.figures.items()
    ]  # fmt: skip
    return pd.DataFrame(rows, columns=COLUMNS)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [[_escape(text) for text in line] for line in (head, *rows)]
    widths = [max(len(line[k]) for line in lines) for k in range(len(head))]
    text = ["| " + " | ".join(part.ljust(w) for part, w in zip(line, widths)) + " |" for line in lines]
    text.insert(1, "|" + "|".join("-" * (w + 2) if k == 0 else "-" * (w + 1) + ":" for k, w in enumerate(widths)) + "|")
    return "\n".join(text)


def _escape(text: str) -> str:
    """Text that stays in its cell and is no markup."""
    flat = " ".join(text.split()).replace("\\", "\\\\").replace("|", "\\|").replace("`", "\\`")
    return flat.replace("](", "]\\(").replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
