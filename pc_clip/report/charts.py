"""Figures over variants, steps and settings, drawn by matplotlib; for the page as SVG that follows light and dark."""

from __future__ import annotations

import base64
import io
import math
import re
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import pandas as pd
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pc_clip.report.results import SEED, is_share

_INK = "#010203"  # becomes the colour of the reader's mode: dark on white, light on black
_STYLE = "<style>svg { color: #1b2027 } @media (prefers-color-scheme: dark) { svg { color: #e4e8ec } }</style>"
LOOK = {"svg.fonttype": "none", "savefig.transparent": True, "grid.color": _INK}
LOOK |= dict.fromkeys(["text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"], _INK)


def dots(
    rows: pd.DataFrame, metrics: Sequence[str], baselines: Sequence[str] = (), hollow: Collection[tuple] = ()
) -> Figure:
    """A panel a metric (and data set), a row a variant: the mean, with its std over seeds, else its interval.

    rows: of `summarise`. Baselines are grey, and lines through the panel. hollow: (variant, dataset, metric) whose
    dots are empty.
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
            if not math.isfinite(row.mean):
                continue
            low, high = (row.mean - row.std, row.mean + row.std) if math.isfinite(row.std) else (row.low, row.high)
            color = "grey" if row.variant in baselines else "C0"
            y, face = variants.index(row.variant), "white" if (row.variant, dataset, metric) in hollow else color
            axes.plot([scale * low, scale * high], [y, y], color=color, linewidth=1.5)
            axes.plot(scale * row.mean, y, "o", color=color, markerfacecolor=face, markersize=5)
            if row.variant in baselines:
                axes.axvline(scale * row.mean, color=color, linewidth=0.8, linestyle=":")
        name = metric.replace("_", " ") + (f", {dataset}" if rows.dataset.nunique() > 1 else "")
        axes.set_title(name + (" (per cent)" if shares[metric] else ""), fontsize=10)
        axes.set_yticks(range(len(variants)), variants if n % columns == 0 else [], fontsize=9)
        axes.set_ylim(len(variants) - 0.5, -0.5)
        axes.grid(axis="x", alpha=0.2)
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def svg(figure: Figure, alt: str) -> Markup:
    """A figure that is part of the page, readable in light and dark mode."""
    out = io.StringIO()
    figure.savefig(out, format="svg", bbox_inches="tight", metadata={"Date": None})
    text = re.sub(r"(<svg[^>]*>)", rf"\1{_STYLE}", out.getvalue().replace(_INK, "currentColor"), count=1)
    return image("svg+xml", text.encode(), alt)


def image(kind: str, content: bytes, alt: str, caption: str = "") -> Markup:
    source = f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
    figure = '<figure><img src="{}" alt="{}"><figcaption>{}</figcaption></figure>'
    return Markup(figure).format(source, alt, caption)


def _axes(title: str, x: str, panels: int = 1) -> tuple[Figure, list[Axes]]:
    figure = Figure((4.4 * panels, 2.8), layout="constrained")
    axes = figure.subplots(1, panels, squeeze=False, sharey=True)[0]
    figure.suptitle(title, fontsize=11)
    for each in axes:
        each.set_xlabel(x)
        each.grid(alpha=0.2)
        each.spines[["top", "right"]].set_visible(False)
    return figure, list(axes)


def training(runs: dict[str, pd.DataFrame]) -> list[Markup]:
    """A chart a logged figure, a line a run, a colour a variant. Long logs are smoothed, as logged behind."""
    variants = list(dict.fromkeys(re.sub(SEED, "", name) for name in runs))
    charts = []
    for metric in dict.fromkeys(name for rows in runs.values() for name in rows if name != "epoch"):
        figure, (axes,) = _axes(metric, "step")
        ends = []
        for run, rows in runs.items():
            if metric not in rows or (values := rows[metric].dropna()).empty:
                continue
            variant = re.sub(SEED, "", run)
            colour = f"C{variants.index(variant)}"
            window = 2 * min(len(values) // 40, 5) + 1
            if window > 1:
                axes.plot(values, color=colour, alpha=0.25, linewidth=0.8)
            shown = axes.get_legend_handles_labels()[1]
            smooth = values.rolling(window, center=True, min_periods=1).mean()
            axes.plot(smooth, color=colour, linewidth=1.5, label=variant if variant not in shown else None)
            ends.append(f"{run} from {values.iloc[0]:.4g} to {values.iloc[-1]:.4g}")
        figure.legend(loc="upper center", bbox_to_anchor=(0.5, 0), ncols=3, fontsize=8, frameon=False)
        charts.append(svg(figure, f"{metric} over steps: {'; '.join(ends)}"))
    return charts


def curves(results: list[dict[str, Any]]) -> list[Markup]:
    """A chart a curve, such as accuracy over alpha: a panel a variant, a line a seed; what was chosen is dashed."""
    charts = []
    for title in dict.fromkeys(curve["title"] for result in results for curve in result.get("curves") or []):
        same = [(r["model"], curve) for r in results for curve in r.get("curves") or [] if curve["title"] == title]
        variants = list(dict.fromkeys(re.sub(SEED, "", model) for model, _ in same))
        figure, panels = _axes(title, same[0][1]["x"], len(variants))
        panels[0].set_ylabel(same[0][1]["y"])
        ends = []
        for model, curve in same:
            axes = panels[variants.index(re.sub(SEED, "", model))]
            axes.set_title(re.sub(SEED, "", model), fontsize=9)
            for n, (name, points) in enumerate(curve["series"].items()):
                x, y = np.transpose(points)
                axes.plot(x, y, "o-", markersize=3, color=f"C{n}", label=name)
                ends.append(f"{model}, {name}: {y[0]:.3g} at {x[0]:g}, {y[-1]:.3g} at {x[-1]:g}")
            if curve.get("marked") is not None:
                axes.axvline(curve["marked"], color=_INK, linestyle="--", linewidth=0.8)
        lines, names = panels[0].get_legend_handles_labels()
        legend = dict(zip(names, lines))
        figure.legend(legend.values(), legend, loc="upper center", bbox_to_anchor=(0.5, 0), ncols=4, frameon=False)
        charts.append(svg(figure, f"{title}. {'; '.join(ends)}"))
    return charts
