"""Figures over variants, steps and settings, drawn by matplotlib."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from markupsafe import Markup
from matplotlib.figure import Figure

from pc_clip.report.results import is_share, variant_of


def dots(rows: pd.DataFrame, metrics: Sequence[str], baselines: Sequence[str] = ()) -> Figure:
    """A panel a metric (and data set), a row a variant: the mean, with its std over seeds, else its interval.

    rows: of `summarise`. Baselines are grey, and lines through the panel.
    """
    shares = {metric: is_share(metric, block["mean"]) for metric, block in rows.groupby("metric")}
    panels = [(d, m) for d in dict.fromkeys(rows.dataset) for m in metrics if m in shares]
    variants, columns = list(dict.fromkeys(rows.variant)), min(3, len(panels))
    lines = math.ceil(len(panels) / columns)
    figure = Figure((2 + 2.6 * columns, (0.9 + 0.22 * len(variants)) * lines), layout="constrained")
    for n, (dataset, metric) in enumerate(panels):
        axes = figure.add_subplot(lines, columns, n + 1)
        scale = 100 if shares[metric] else 1
        for row in rows[(rows.dataset == dataset) & (rows.metric == metric)].itertuples():
            low, high = (row.low, row.high) if math.isnan(row.std) else (row.mean - row.std, row.mean + row.std)
            color = "grey" if row.variant in baselines else "C0"
            y = variants.index(row.variant)
            axes.plot([scale * low, scale * high], [y, y], color=color, linewidth=1.5)
            axes.plot(scale * row.mean, y, "o", color=color, markersize=5)
            if row.variant in baselines:
                axes.axvline(scale * row.mean, color=color, linewidth=0.8, linestyle=":")
        name = metric.replace("_", " ") + (f", {dataset}" if rows.dataset.nunique() > 1 else "")
        axes.set_title(name + (" (per cent)" if shares[metric] else ""), fontsize=10)
        axes.set_yticks(range(len(variants)), variants if n % columns == 0 else [], fontsize=9)
        axes.set_ylim(len(variants) - 0.5, -0.5)
        axes.grid(axis="x", alpha=0.2)
    return figure


def tradeoff(runs: pd.DataFrame, baselines: Sequence[str] = ()) -> Figure:
    """Two metrics against each other: a point a run, a colour a variant, and the Pareto frontier.

    runs: a row a run, by its label; two columns, of what is kept and of what is gained, as shares.
    """
    (kept, gained), runs = runs.columns, 100 * runs
    figure = Figure((6.4, 4.2), layout="constrained")
    axes = figure.subplots()
    variants = runs.groupby([variant_of(name) for name in runs.index], sort=False)
    for n, (variant, rows) in enumerate(variants):
        style = {"color": "grey", "marker": "x"} if variant in baselines else {"color": f"C{n % 10}"}
        axes.scatter(rows[kept], rows[gained], label=variant, s=28, zorder=2, **style)
    best = runs.sort_values([kept, gained], ascending=False)
    best = best[best[gained] > best[gained].cummax().shift(fill_value=-np.inf)]  # nothing that keeps more gains as much
    axes.plot(best[kept], best[gained], color="grey", linewidth=0.8, linestyle=":", drawstyle="steps-pre", zorder=1)
    axes.set_xlabel(f"kept: {kept.replace('_', ' ').replace(':', ', ')} (per cent)")
    axes.set_ylabel(f"gained: {gained.replace('_', ' ').replace(':', ', ')} (per cent)")
    axes.grid(alpha=0.2)
    figure.legend(loc="outside right upper", fontsize=8, frameon=False)
    return figure


class Line(NamedTuple):
    panel: str
    label: str
    x: Sequence[float]
    y: Sequence[float]


def line_chart(title: str, x: str, lines: Sequence[Line], marked: Sequence[tuple[str, float]] = ()) -> Markup:
    """Panels beside one another; lines of one label have one colour. marked: (panel, x) of dashed lines."""
    panels, labels = ([*dict.fromkeys(names)] for names in zip(*((line.panel, line.label) for line in lines)))
    figure = Figure((4.4 * len(panels), 2.8), layout="constrained")
    axes = dict(zip(panels, figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]))
    figure.suptitle(title, fontsize=11)
    for line in lines:
        axes[line.panel].plot(line.x, line.y, color=f"C{labels.index(line.label)}", label=line.label)
    for panel, at in marked:
        axes[panel].axvline(at, color="grey", linestyle="--", linewidth=0.8)
    for panel, each in axes.items():
        each.set_title(panel, fontsize=9)
        each.set_xlabel(x)
        each.grid(alpha=0.2)
    legend = {name: line for each in axes.values() for line, name in zip(*each.get_legend_handles_labels())}
    figure.legend(legend.values(), legend, loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    ends = (f"{line.panel} {line.label} from {line.y[0]:.4g} to {line.y[-1]:.4g}".strip() for line in lines)
    return svg(figure, f"{title}: {'; '.join(ends)}")


def training(runs: dict[str, pd.DataFrame]) -> list[Markup]:
    """A chart a logged figure over steps, a line a run, a colour a variant. runs: rows of the log by step."""
    charts = []
    for metric in dict.fromkeys(name for rows in runs.values() for name in rows if name != "epoch"):
        logged = {run: rows[metric].dropna() for run, rows in runs.items() if metric in rows}
        lines = [Line("", variant_of(run), each.index, each.to_numpy()) for run, each in logged.items() if len(each)]
        charts += [line_chart(metric, "step", lines)] if lines else []
    return charts


def curves(results: list[dict[str, Any]]) -> list[Markup]:
    """A chart a curve, such as accuracy over alpha: a panel a variant, a line a seed; what was chosen is dashed."""
    every = [(variant_of(r["model"]), curve) for r in results for curve in r.get("curves") or []]
    charts = []
    for title, x, y in dict.fromkeys((curve["title"], curve["x"], curve["y"]) for _, curve in every):
        same = [(variant, curve) for variant, curve in every if curve["title"] == title]
        lines = [Line(v, name, *np.transpose(points)) for v, curve in same for name, points in curve["series"].items()]
        marked = [(variant, curve["marked"]) for variant, curve in same if curve.get("marked") is not None]
        charts.append(line_chart(f"{title}: {y}", x, lines, marked))
    return charts


def svg(figure: Figure, alt: str) -> Markup:
    """A figure as part of a page."""
    out = io.StringIO()
    figure.savefig(out, format="svg", metadata={"Date": None})
    return image("svg+xml", out.getvalue().encode(), alt)


def image(kind: str, content: bytes, alt: str, caption: str = "") -> Markup:
    source = f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
    figure = '<figure><img src="{}" alt="{}"><figcaption>{}</figcaption></figure>'
    return Markup(figure).format(source, alt, caption)
