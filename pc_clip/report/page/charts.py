"""Charts as inline SVG: lines over a setting, and dots with whiskers. Text is never below 12 pixels at 360 wide.

Colours are CSS variables of the page (class sN for style N), so a chart follows light and dark mode. Built as
XML elements, so that what stands in results cannot become markup.
"""

from __future__ import annotations

import math
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from markupsafe import Markup

WIDTH, HEIGHT = 340, 232  # units; a phone shows a chart 328 pixels wide
FONT = 13.2
_CHAR = 7.2  # the width of a digit at that size
_RIGHT, _BOTTOM = 14, 42
STYLES = 8  # colours; beyond them the dashes differ
_DASHES = ("", "7 3", "2 2.5", "9 3 2 3")
_DOTTED = 25  # points up to which each gets a dot


@dataclass(frozen=True)
class Line:
    """points: (x, y) by rising x; a y that is no number leaves a gap. faint: drawn thin, as background."""

    name: str
    points: Sequence[tuple[float, float]]
    style: int
    faint: bool = False
    dash: int | None = None


@dataclass(frozen=True)
class Dot:
    name: str
    value: float
    low: float | None
    high: float | None
    style: int


@dataclass(frozen=True)
class Axis:
    """Numbers to places, in a straight line, and the numbers that are written beside it."""

    low: float
    high: float
    start: float
    end: float
    ticks: list[float] = field(default_factory=list)

    def place(self, value: float) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)


def line_chart(
    lines: Sequence[Line],
    title: str,
    x: str,
    y: str,
    share: bool = False,
    marked: Sequence[float] = (),
    within: Sequence[float] = (),
) -> Markup:
    """An SVG of lines over x.

    y: what is shown, may be empty; share: it is written in per cent. marked: values of x with an upright line.
    within: values of y that the scale holds too, so that charts side by side have one scale.
    """
    points = [(a, b) for line in lines for a, b in line.points if math.isfinite(a) and math.isfinite(b)]
    if not points:
        return Markup('<p class="note">{}: nothing to draw</p>').format(title)
    scale = 100 if share else 1
    heights = [b * scale for b in (*(b for _, b in points), *within)]
    level, across = ticks(min(heights), max(heights)), ticks(min(a for a, _ in points), max(a for a, _ in points))
    texts = tick_texts(level)
    left, top = 10 + _CHAR * max(map(len, texts)), 30 if y else 8
    ys = Axis(level[0], level[-1], HEIGHT - _BOTTOM, top, level)
    xs = Axis(min(across[0], min(a for a, _ in points)), max(a for a, _ in points), left, WIDTH - _RIGHT, across)
    svg = _svg(HEIGHT, f"{title}. {_told(lines, x, scale)}")
    for value, text in zip(ys.ticks, texts):
        _rule(svg, left, ys.place(value), WIDTH - _RIGHT, ys.place(value), "grid")
        _text(svg, text, left - 6, ys.place(value) + 4.2, "end")
    shown = [value for value in xs.ticks if xs.low <= value <= xs.high]
    for value, text in zip(shown, tick_texts(shown)):
        _rule(svg, xs.place(value), HEIGHT - _BOTTOM, xs.place(value), HEIGHT - _BOTTOM + 4, "tick")
        _text(svg, text, xs.place(value), HEIGHT - _BOTTOM + 17, "middle")
    if y:
        _text(svg, y + (" (per cent)" if share else ""), 2, 15, "start", "label")
    _text(svg, x, (left + WIDTH - _RIGHT) / 2, HEIGHT - 6, "middle", "label")
    for value in dict.fromkeys(marked):
        _rule(svg, xs.place(value), top, xs.place(value), HEIGHT - _BOTTOM, "mark")
    for line in lines:
        _line(svg, line, xs, ys, scale)
    return _markup(svg)


def dot_chart(rows: Sequence[tuple[str, Sequence[Dot]]], title: str) -> Markup:
    """Shares on a scale of per cent: a band a row, a dot with its whisker each. Names stand above their band."""
    step, head = 9, 26
    heights = [head + step * max(1, len(dots)) + 7 for _, dots in rows]
    height = 8 + sum(heights) + _BOTTOM
    least = min((100 * d.value for _, dots in rows for d in dots), default=0)
    xs = Axis(ticks(min(least, 0.0), 100)[0], 100, 16, WIDTH - 18)
    told = "; ".join(f"{name}: " + ", ".join(f"{d.name} {100 * d.value:.1f}" for d in dots) for name, dots in rows)
    svg = _svg(height, f"{title}, per cent. {told}")
    for value in ticks(xs.low, 100):
        _rule(svg, xs.place(value), 8, xs.place(value), height - _BOTTOM, "grid")
        _text(svg, tick_texts([value])[0], xs.place(value), height - _BOTTOM + 17, "middle")
    _text(svg, "per cent", (16 + WIDTH - 18) / 2, height - 6, "middle", "label")
    top = 8.0
    for (name, dots), tall in zip(rows, heights):
        if top > 8:
            _rule(svg, 0, top, WIDTH, top, "band")
        _text(svg, name, 2, top + 17, "start", "label")
        for n, dot in enumerate(dots):
            y = top + head + step * (n + 0.5)
            group = ET.SubElement(svg, "g", {"class": f"s{colour(dot.style)}"})
            if dot.low is not None and dot.high is not None:
                low, high = max(100 * dot.low, xs.low), min(100 * dot.high, xs.high)
                _rule(group, xs.place(low), y, xs.place(high), y, "whisker")
            mark = ET.SubElement(group, "circle", _places(cx=xs.place(100 * dot.value), cy=y, r=3.6))
            ET.SubElement(mark, "title").text = f"{dot.name}, {name}: {100 * dot.value:.1f}"
        top += tall
    return _markup(svg)


def swatch(style: int, dash: int | None = None) -> Markup:
    """The little line of a legend."""
    svg = ET.Element("svg", {"class": f"swatch s{colour(style)}", "viewBox": "0 0 28 12", "aria-hidden": "true"})
    ET.SubElement(svg, "path", {"d": "M1 6 L27 6", "class": "line"} | _dash(style, dash))
    return _markup(svg)


def colour(style: int) -> int:
    """Style 0 is the baseline's; the others go round."""
    return 0 if style == 0 else (style - 1) % STYLES + 1


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers, a step of 1, 2 or 5 apart, the first at or below low, the last at or above high."""
    if high - low < 1e-12 * max(1.0, abs(high)):
        half = abs(high) / 2 or 0.5
        low, high = low - half, high + half
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(n * step, 12) for n in range(first, last + 1)]


def tick_texts(values: Sequence[float]) -> list[str]:
    """Numbers of one axis, with as many decimals as their step needs."""
    largest = max((abs(v) for v in values), default=0.0)
    if largest and (largest >= 1e5 or largest < 1e-3):
        return [f"{v:.1e}".replace("e-0", "e-").replace("e+0", "e").replace(".0e", "e") if v else "0" for v in values]
    step = min((b - a for a, b in pairwise(values)), default=largest) or 1.0
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    return [f"{v:.{decimals}f}".replace("-", "−") for v in values]


def _line(svg: ET.Element, line: Line, xs: Axis, ys: Axis, scale: float) -> None:
    pieces, pen = [], "M"
    for x, y in line.points:
        if not (math.isfinite(x) and math.isfinite(y)):
            pen = "M"
            continue
        pieces.append(f"{pen}{xs.place(x):.2f} {ys.place(scale * y):.2f}")
        pen = "L"
    if not pieces:
        return
    kind = "line faint" if line.faint else "line"
    group = ET.SubElement(svg, "g", {"class": f"s{colour(line.style)}"})
    path = ET.SubElement(group, "path", {"d": " ".join(pieces), "class": kind} | _dash(line.style, line.dash))
    ET.SubElement(path, "title").text = line.name
    if not line.faint and len(line.points) <= _DOTTED:
        for x, y in line.points:
            if math.isfinite(x) and math.isfinite(y):
                dot = ET.SubElement(group, "circle", _places(cx=xs.place(x), cy=ys.place(scale * y), r=2.2))
                ET.SubElement(dot, "title").text = f"{line.name}: {scale * y:.4g} at {x:g}"


def _told(lines: Sequence[Line], x: str, scale: float) -> str:
    """The chart in words, for those who cannot see it."""
    found = []
    for line in lines:
        points = [p for p in line.points if math.isfinite(p[0]) and math.isfinite(p[1])]
        if points and not line.faint:
            (a, first), (b, last) = points[0], points[-1]
            found.append(f"{line.name}: {scale * first:.3g} at {x} {a:g}, {scale * last:.3g} at {b:g}")
    return "; ".join(found[:12]) + (f"; and {len(found) - 12} more lines" if len(found) > 12 else "")


def _dash(style: int, dash: int | None) -> dict[str, str]:
    number = dash if dash is not None else max(0, style - 1) // STYLES
    pattern = _DASHES[number % len(_DASHES)]
    return {"stroke-dasharray": pattern} if pattern else {}


def _svg(height: float, told: str) -> ET.Element:
    box = {"class": "chart", "viewBox": f"0 0 {WIDTH} {height:g}", "font-size": f"{FONT}"}
    return ET.Element("svg", box | {"role": "img", "aria-label": told})


def _rule(svg: ET.Element, x1: float, y1: float, x2: float, y2: float, kind: str) -> None:
    ET.SubElement(svg, "line", _places(x1=x1, y1=y1, x2=x2, y2=y2) | {"class": kind})


def _text(svg: ET.Element, text: str, x: float, y: float, anchor: str, kind: str = "value") -> None:
    place = _places(x=x, y=y) | {"text-anchor": anchor, "class": kind}
    ET.SubElement(svg, "text", place).text = text


def _places(**values: float) -> dict[str, str]:
    return {name: f"{value:.2f}".rstrip("0").rstrip(".") for name, value in values.items()}


def _markup(svg: ET.Element) -> Markup:
    return Markup(ET.tostring(svg, encoding="unicode"))
