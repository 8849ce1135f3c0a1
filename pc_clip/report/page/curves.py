"""Figures over a setting, such as accuracy over alpha: one chart a variant, the mean over its seeds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pc_clip.report.page.charts import Line
from pc_clip.report.page.gather import Found
from pc_clip.report.page.summary import Block
from pc_clip.report.page.words import is_share


@dataclass(frozen=True)
class Drawn:
    """One curve of one variant. marked: the x that was chosen, one a seed. seeds: how many it is the mean of."""

    variant: str
    x: str
    y: str
    lines: list[Line]
    marked: list[float]
    share: bool
    seeds: int


def curves(block: Block) -> dict[str, list[Drawn]]:
    """Title -> the curve of each variant that has it. What is not a curve in a file is left out."""
    found: dict[str, list[Drawn]] = {}
    for variant, results in block.results.items():
        for title in dict.fromkeys(curve["title"] for result in results for curve in _of(result)):
            same = [curve for result in results for curve in _of(result) if curve["title"] == title]
            found.setdefault(title, []).append(_mean(variant, same))
    return found


def heights(drawn: Sequence[Drawn]) -> list[float]:
    """Lowest and highest y of curves that stand side by side."""
    values = [y for d in drawn for line in d.lines for _, y in line.points if math.isfinite(y)]
    return [min(values), max(values)] if values else []


def _of(result: Found) -> list[dict[str, Any]]:
    given = result.content.get("curves")
    return [curve for curve in given if _is_curve(curve)] if isinstance(given, list) else []


def _is_curve(curve: Any) -> bool:
    if (
        not isinstance(curve, dict)
        or not isinstance(curve.get("title"), str)
        or not isinstance(curve.get("series"), dict)
    ):
        return False
    return all(
        isinstance(points, list) and points and all(map(_is_point, points)) for points in curve["series"].values()
    )


def _is_point(point: Any) -> bool:
    return isinstance(point, list) and len(point) == 2 and all(isinstance(v, int | float) for v in point)


def _mean(variant: str, seeds: Sequence[dict[str, Any]]) -> Drawn:
    """Seeds that were measured at the same places are averaged; where they were not, the first stands alone."""
    first = seeds[0]
    series = {name: sorted(map(tuple, points)) for name, points in first["series"].items()}
    alike = [s for s in seeds if {n: sorted(x for x, _ in p) for n, p in s["series"].items()} == _places(series)]
    lines = []
    for n, name in enumerate(series):
        rows = [sorted(map(tuple, seed["series"][name])) for seed in alike]
        points = [(row[0][0], math.fsum(y for _, y in row) / len(row)) for row in zip(*rows)]
        lines.append(Line(name, points, n + 1, dash=n))
    marked = [s["marked"] for s in alike if isinstance(s.get("marked"), int | float) and math.isfinite(s["marked"])]
    y = str(first.get("y") or "")
    share = is_share(y.replace(" ", "_"), [v for line in lines for _, v in line.points])
    return Drawn(variant, str(first.get("x") or ""), y, lines, marked, share, len(alike))


def _places(series: dict[str, list[tuple[float, float]]]) -> dict[str, list[float]]:
    return {name: [x for x, _ in points] for name, points in series.items()}
