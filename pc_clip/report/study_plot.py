"""A study's picture: bars for a few variants, rows of dots for many."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from pc_clip.report.study_config import Study
from pc_clip.report.study_table import best, datasets

MOST_BARS = 8  # variants; more are unreadable as bars
MOST_GROUPS = 9  # metrics side by side as bars
CUT = 102  # per cent; where bars end that are longer
MOST_PANELS = 4  # metrics side by side as dots
_BASELINES = ("black", "tab:red", "tab:brown", "tab:olive")
_GROUPS = ("tab:blue", "tab:orange", "tab:green", "tab:purple", "tab:cyan", "tab:pink")


def plot(study: Study, table: pd.DataFrame, path: Path, comparison: pd.DataFrame | None = None) -> None:
    """Draw what `render` shows, a line of panels for each data set. With comparison, dots that differ are filled."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shown = [table[table.dataset == name] for name in datasets(study, table)]
    comparison = None if comparison is None or comparison.empty else comparison
    if len(study.variants) <= MOST_BARS:
        figure = _bars(plt, study, shown)
    else:
        chosen = best(study, table)[0] if study.chosen_on and study.competitors else None
        figure = _dots(plt, study, shown, comparison, chosen)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _bars(plt, study: Study, tables: list[pd.DataFrame]):
    """A group of bars a metric, a bar a variant, with the spread over the seeds.

    What is no share goes beyond 100 (CIDEr): such bars are cut there, and their numbers say how long they are.
    """
    lines = [(table, metrics) for table in tables for metrics in _lines(study, table)]
    most = max(len(metrics) for _, metrics in lines)
    size = (2.2 + 1.7 * most, 4.2 * len(lines))
    figure, grid = plt.subplots(len(lines), figsize=size, layout="constrained", squeeze=False)
    for axes, (table, metrics) in zip(grid[:, 0], lines):
        figures = {(row.variant, row.metric): (100 * row.mean, 100 * row.std) for row in table.itertuples()}
        variants = list(dict.fromkeys(table.variant))
        width, nothing = 0.8 / len(variants), (float("nan"),) * 2
        for k, variant in enumerate(variants):
            x = [n + (k - (len(variants) - 1) / 2) * width for n in range(len(metrics))]
            heights, spread = zip(*[figures.get((variant, m), nothing) for m in metrics])
            whiskers = [0.0 if height > CUT else std for height, std in zip(heights, spread)]
            colour = plt.cm.viridis(k / len(variants))
            shown = [min(height, CUT) for height in heights]
            bars = axes.bar(x, shown, width * 0.92, label=variant, yerr=whiskers, capsize=2, color=colour)
            axes.bar_label(bars, [f"{h:.0f}" if h == h else "" for h in heights], fontsize=8, padding=2)
        cut = {m for (_, m), (mean, _) in figures.items() if mean > CUT}
        axes.set_xticks(range(len(metrics)), [m.replace("_", " ") + " (cut)" * (m in cut) for m in metrics])
        axes.set(ylabel="per cent", xlim=(-0.6, most - 0.4), ylim=(0, 108))
        axes.set_title(f"{study.name}: {table.dataset.iloc[0]}")
        axes.spines[["top", "right"]].set_visible(False)
    handles, labels = grid[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(6, len(labels)), frameon=False)
    return figure


def _lines(study: Study, table: pd.DataFrame) -> list[list[str]]:
    """A table's metrics in lines about as long as one another, none longer than fits a page."""
    metrics = [m for m in study.metrics if m in set(table.metric)]
    each = -(-len(metrics) // -(-len(metrics) // MOST_GROUPS))
    return [metrics[n : n + each] for n in range(0, len(metrics), each)]


def _dots(plt, study: Study, tables: list[pd.DataFrame], comparison: pd.DataFrame | None, chosen: str | None):
    """A panel a metric, a row a variant; baselines are upright lines, with a band as wide as the whiskers.

    A whisker is the standard deviation over seeds. Where there is one seed only it is the 95 % interval over images,
    which is wider than what sets two variants apart: both see the same images.
    """
    rows, colours, handles = _rows(study), _colours(study), {}
    metrics = [m for m in study.metrics if any(m in set(table.metric) for table in tables)][:MOST_PANELS]
    size = (2.6 + 2.8 * len(metrics), 1.3 + (0.9 + 0.2 * len(rows)) * len(tables))
    figure, grid = plt.subplots(len(tables), len(metrics), figsize=size, layout="constrained", squeeze=False)
    seeds = any(table["std"].notna().any() for table in tables)
    for line, table in zip(grid, tables):
        dataset = table.dataset.iloc[0]
        for axes, metric in zip(line, metrics):
            figures = _figures(table[table.metric == metric], seeds)
            for name, y in rows.items():
                if name in figures:
                    _dot(axes, y, figures[name], colours[name], _stands_out(comparison, name, dataset, metric))
            axes.set_xlim(_limits([figures[name] for name in rows if name in figures], figures, study.baselines))
            for name, colour in zip(study.baselines, _BASELINES * len(study.baselines)):
                if name in figures:
                    handles[name] = _baseline(axes, name, figures[name], colour)
            axes.set_yticks(list(rows.values()), list(rows) if axes is line[0] else [], fontsize=8)
            without = "" if comparison is None or metric in set(comparison.metric) else " (not compared)"
            title = metric.replace("_", " ") + without
            axes.set(title=title, xlabel="per cent", ylim=(max(rows.values()) + 1.7, -0.8))
            axes.grid(axis="x", color="0.92")
            axes.set_axisbelow(True)
            axes.tick_params(axis="y", length=0)
            axes.spines[["top", "right", "left"]].set_visible(False)
        line[0].set_ylabel(dataset, fontsize=11)
        for text in line[0].get_yticklabels():
            text.set_fontweight("bold" if text.get_text() == chosen else "normal")
    handles |= {group: _sample(plt, colour) for group, colour in _of_groups(study).items()}
    if comparison is not None:
        handles[f"differs from {study.against}"] = _sample(plt, "0.35")
        handles["not shown to"] = _sample(plt, "0.35", hollow=True)
    whisker = "standard deviation over seeds" if seeds else "95 % interval over images"
    bold = f"; bold: best on {study.chosen_on}" if chosen else ""
    figure.suptitle(f"{study.name}: whiskers and bands are the {whisker}{bold}", fontsize=11)
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=min(6, len(handles)), frameon=False)
    return figure


def _rows(study: Study) -> dict[str, float]:
    """Where each variant's row is: those of one group together, with a little space between groups."""
    names = study.competitors or list(study.variants)
    order = list(dict.fromkeys(study.groups.get(name, "") for name in names))
    names.sort(key=lambda name: order.index(study.groups.get(name, "")))
    return {name: n + 0.7 * order.index(study.groups.get(name, "")) for n, name in enumerate(names)}


def _of_groups(study: Study) -> dict[str, str]:
    groups = dict.fromkeys(study.groups[name] for name in study.competitors if name in study.groups)
    return dict(zip(groups, _GROUPS * (1 + len(groups) // len(_GROUPS))))


def _colours(study: Study) -> dict[str, str]:
    """Each variant's colour; those of no grid are grey."""
    of_group = _of_groups(study)
    return {name: of_group.get(study.groups.get(name, ""), "0.35") for name in study.variants}


def _figures(table: pd.DataFrame, seeds: bool) -> dict[str, tuple[float, float, float]]:
    """variant -> mean and the two ends of its whisker, per cent; the ends are the mean where there is none."""
    found = {}
    for row in table.itertuples():
        ends = (row.mean - row.std, row.mean + row.std) if seeds else (row.low, row.high)
        found[row.variant] = tuple(100 * (end if end == end else row.mean) for end in (row.mean, *ends))
    return found


def _limits(dots: list[tuple], figures: dict[str, tuple], baselines: list[str]) -> tuple[float, float]:
    """What the panel spans: all dots, and the baselines that do not lie so far off that the dots would be one spot."""
    low, high = min((d[1] for d in dots), default=0.0), max((d[2] for d in dots), default=100.0)
    far = max(high - low, 0.5)
    near = [figures[n] for n in baselines if n in figures and low - far <= figures[n][0] <= high + far]
    low, high = min([low, *(b[1] for b in near)]), max([high, *(b[2] for b in near)])
    margin = 0.06 * max(high - low, 0.5)
    return low - margin, high + margin


def _dot(axes, y: float, figure: tuple[float, float, float], colour: str, filled: bool) -> None:
    mean, low, high = figure
    axes.plot([low, high], [y, y], color=colour, linewidth=1.4, zorder=2)
    axes.plot([mean], [y], "o", color=colour, markerfacecolor=colour if filled else "white", markersize=5, zorder=3)


def _baseline(axes, name: str, figure: tuple[float, float, float], colour: str):
    """The upright line; its value at the edge where it lies outside."""
    mean, low, high = figure
    left, right = axes.get_xlim()
    if left <= mean <= right:
        axes.axvspan(low, high, color=colour, alpha=0.13, linewidth=0, zorder=0)
    else:
        at, side, said = (
            (0.0, "left", f"← {name} {mean:.1f}") if mean < left else (1.0, "right", f"{name} {mean:.1f} →")
        )
        place = {"xycoords": "axes fraction", "ha": side, "va": "bottom", "fontsize": 8, "color": colour}
        axes.annotate(said, (at, 0.0), xytext=(0, 1 + 10 * len(axes.texts)), textcoords="offset points", **place)
    line = axes.axvline(mean, color=colour, linewidth=1.3, zorder=1)
    axes.set_xlim(left, right)
    return line


def _stands_out(comparison: pd.DataFrame | None, variant: str, dataset: str, metric: str) -> bool:
    """Whether its dot is filled: it differs from the baseline after correction, or nothing was compared."""
    if comparison is None:
        return True
    at = (comparison.variant == variant) & (comparison.dataset == dataset) & (comparison.metric == metric)
    return bool(comparison[at].significant.any())


def _sample(plt, colour: str, hollow: bool = False):
    """A dot for the legend."""
    face = "white" if hollow else colour
    return plt.Line2D([], [], color=colour, marker="o", markerfacecolor=face, markersize=5, linewidth=0)
