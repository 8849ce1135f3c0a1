"""The logs of runs as charts: one a logged figure, one line a run, one colour a variant."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from pc_clip.report.page.charts import Line
from pc_clip.report.page.gather import Run
from pc_clip.report.page.summary import Summary

_SETTINGS = ("lr", "pairs_per_second")  # how a run was done, not what it learnt: last, and never smoothed
_MOST_POINTS = 400


@dataclass(frozen=True)
class Log:
    """One figure of all runs that have it. window: how many neighbouring records a drawn point is the mean of."""

    name: str
    lines: list[Line]
    window: int


def logs(summary: Summary) -> list[Log]:
    """The loss first, then the others in the order they are met, then the settings."""
    runs = [run for group in summary.runs.values() for run in group]
    names = list(dict.fromkeys(key for run in runs for row in run.rows for key in row if key not in ("step", "epoch")))
    names.sort(key=lambda name: (name != "loss", name in _SETTINGS))
    found = []
    for name in names:
        lines, widest = [], 1
        for variant, group in summary.runs.items():
            style = summary.variant(variant).style
            for run in group:
                points = [(row["step"], row[name]) for row in run.rows if name in row]
                window = 1 if name in _SETTINGS else smoothing(len(points))
                widest = max(widest, window)
                if window > 1:
                    lines.insert(0, Line(run.folder.name, _thin(points), style, faint=True))
                if points:
                    lines.append(Line(run.folder.name, _thin(smooth(points, window)), style))
        found.append(Log(name, lines, widest))
    return found


def smoothing(points: int) -> int:
    """Records that one drawn point is the mean of: 1 below 40 of them, then 3, up to 11 for long runs."""
    return 2 * min(points // 40, 5) + 1


def smooth(points: Sequence[tuple[float, float]], window: int) -> list[tuple[float, float]]:
    """The mean over `window` neighbours, the point in the middle; fewer at the ends, as many on either side."""
    found = []
    for n, (x, _) in enumerate(points):
        reach = min(window // 2, n, len(points) - 1 - n)
        near = [y for _, y in points[n - reach : n + reach + 1]]
        found.append((x, math.fsum(near) / len(near) if all(map(math.isfinite, near)) else math.nan))
    return found


def ends(run: Run) -> tuple[float | None, float | None, int | None]:
    """First and last logged loss, and the last step."""
    losses = [row["loss"] for row in run.rows if "loss" in row]
    return (
        losses[0] if losses else None,
        losses[-1] if losses else None,
        int(run.rows[-1]["step"]) if run.rows else None,
    )


def _thin(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Every k-th point of very long logs, and the last: more than the screen has pixels helps nobody."""
    step = -(-len(points) // _MOST_POINTS) or 1
    return points[::step] + (points[-1:] if (len(points) - 1) % step else [])
