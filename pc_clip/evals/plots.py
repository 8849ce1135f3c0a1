"""Pictures for people: contact sheets, sheets of pairs before and after a change, and maps of points."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import CSS4_COLORS
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont, ImageOps

from pc_clip.data.dataset import Change, Dataset
from pc_clip.evals import Picture

GREEN, RED, BLACK, GREY, PALE = "#1a7f37", "#c62828", "#111111", "#5f6368", "#dadce0"
LINE = 19  # pixels from one line of text to the next
GAP, MARGIN = 10, 14
SIDE, SMALL = 200, 97  # pixels of an image of a pair, and of a map of where the decoder looked
REFERENCES, WORDS = 2, 2  # that are shown of a pair
# Words that point at no place in an image. Of the others, those are shown at which the decoder looks most sharply.
_EMPTY = {
    "a", "an", "the", "is", "are", "was", "were", "be", "been", "has", "have", "had", "it", "its", "this", "that",
    "these", "those", "there", "of", "in", "on", "at", "to", "from", "by", "with", "and", "or", "no", "not", "now",
    "as", "than", "same", "all", "other", "another", "one", "image", "picture", "photo", "scene",
}  # fmt: skip


@lru_cache
def font(size: int, bold: bool = False) -> ImageFont.FreeTypeFont:
    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / name, size)


def wrap(text: str, width: int, size: int, bold: bool = False) -> list[str]:
    """Lines that fit into `width` pixels. A word that is too long for a line is broken."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font(size, bold).getlength(longer) <= width:
            lines[-1] = longer
            continue
        lines.append("")
        for letter in word:
            if font(size, bold).getlength(lines[-1] + letter) > width:
                lines.append("")
            lines[-1] += letter
    return lines[1:] if len(lines) > 1 and not lines[0] else lines


class Text(NamedTuple):
    """A paragraph of a sheet."""

    content: str
    size: int
    colour: str = BLACK
    bold: bool = False


def _write(sheet: Image.Image | None, place: tuple[int, int], width: int, texts: Sequence[Text]) -> int:
    """Write paragraphs below each other and return the height they take; of no sheet, only measure."""
    y = place[1]
    for text in texts:
        for line in wrap(text.content, width, text.size, text.bold):
            if sheet:
                ImageDraw.Draw(sheet).text((place[0], y), line, text.colour, font(text.size, text.bold))
            y += LINE * text.size // 13
    return y - place[1]


def _sheet(cells: Sequence[Image.Image], heading: Sequence[Text], columns: int, gap: int = GAP) -> Image.Image:
    """Cells in reading order under a heading, which wraps to the sheet's width."""
    rows = [cells[n : n + columns] for n in range(0, len(cells), columns)]
    width = max(max(sum(cell.width + gap for cell in row) for row in rows) - gap + 2 * MARGIN, 480)
    y = MARGIN + _write(None, (0, 0), width - 2 * MARGIN, heading) + GAP
    sheet = Image.new("RGB", (width, y + sum(max(cell.height for cell in row) + gap for row in rows)), "white")
    _write(sheet, (MARGIN, MARGIN), width - 2 * MARGIN, heading)
    for row in rows:
        if gap > GAP:
            ImageDraw.Draw(sheet).line([(MARGIN, y - gap // 3), (width - MARGIN, y - gap // 3)], PALE)
        for n, cell in enumerate(row):
            sheet.paste(cell, (MARGIN + n * (cell.width + gap), y))
        y += max(cell.height for cell in row) + gap
    return sheet


def contact_sheet(
    images: Sequence[Image.Image], title: str, labels: Sequence[str], columns: int = 8, side: int = 128
) -> Image.Image:
    """Each image fitted into a square of `side` pixels, its label below. The title wraps to the sheet's width."""
    cells = []
    for image, label in zip(images, labels):
        method = Image.Resampling.NEAREST if max(image.size) < side else Image.Resampling.LANCZOS
        fitted = ImageOps.contain(image.convert("RGB"), (side, side), method)
        cell = Image.new("RGB", (side, side + 18), "white")
        cell.paste(fitted, ((side - fitted.width) // 2, (side - fitted.height) // 2))
        ImageDraw.Draw(cell).text((side / 2, side + 3), label, GREY, font(12), anchor="ma")
        cells.append(cell)
    return _sheet(cells, [Text(title, 16)], columns)


# -- pairs before and after a change -----------------------------------------------------------------------


class Shown(NamedTuple):
    """A pair as the sheet shows it. right: whether it was judged so, None for not judged. tokens: T pieces of the
    sentence; attention: [T, 2, rows, columns] of before and after, None for a sentence that no decoder wrote."""

    change: Change
    said: str
    right: bool | None
    tokens: Sequence[str]
    attention: np.ndarray | None


def change_sheet(data: Dataset, shown: Sequence[Shown], title: str) -> Picture:
    """Each pair in a cell. Sentences are green where they were judged right, red where wrong, else black."""
    row = {key: n for n, key in enumerate(data.ids)}
    cells = [_cell(data.load(row[one.change.before]), data.load(row[one.change.after]), one) for one in shown]
    legend, alt = "bold: what the model says", ""
    judged = [one.right for one in shown if one.right is not None]
    if judged:
        legend += ", ✓ where it is right and ✗ where it is wrong"
        alt = f"; {sum(judged)} of {len(judged)} sentences are right"
    legend += "; below it: what people say"
    if any(one.attention is not None for one in shown):
        legend += "; small: where the decoder's last layer looks at a word, before and after, with one scale for both"
        alt = f", and where the decoder looked at two of its words{alt}"
    alt = f"{len(shown)} pairs of images before and after a change, what the model says and what people say{alt}"
    return Picture(_sheet(cells, [Text(title, 18, bold=True), Text(legend, 12, GREY)], columns=3, gap=3 * GAP), alt)


def _cell(before: Image.Image, after: Image.Image, one: Shown) -> Image.Image:
    colour = {True: GREEN, False: RED, None: BLACK}[one.right]
    mark = {True: "✓ ", False: "✗ ", None: ""}[one.right]
    texts = [Text(mark + (one.said or "(nothing)"), 14, colour, True)]
    texts += [Text(f"– {reference}", 13, GREY) for reference in one.change.sentences[:REFERENCES]]
    words = chosen_words(one.tokens, one.attention) if one.attention is not None else []
    width, top = 2 * SIDE + GAP, 18 + SIDE + 6
    maps_at = top + _write(None, (0, 0), width, texts) + 8
    cell = Image.new("RGB", (width, maps_at + (18 + SMALL if words else 0)), "white")
    _write(cell, (0, top), width, texts)
    kind = f"   ({one.change.kind})" if one.change.kind else ""
    for n, (image, name) in enumerate([(before, "before"), (after, f"after{kind}")]):
        _write(cell, (n * (SIDE + GAP), 0), SIDE, [Text(name, 12, GREY)])
        cell.paste(_fitted(image, SIDE), (n * (SIDE + GAP), 18))
    for n, place in enumerate(words):
        left, looks = n * (SIDE + GAP), one.attention[place]
        _write(cell, (left, maps_at), SIDE, [Text(f"“{one.tokens[place]}”", 12)])
        for m, image in enumerate([before, after]):
            cell.paste(overlay(image, looks[m], float(looks.max()), SMALL), (left + m * (SIDE - SMALL), maps_at + 18))
    return cell


def chosen_words(tokens: Sequence[str], attention: np.ndarray) -> list[int]:
    """The places of two words in a sentence that name something, in its order: those looked at most sharply."""
    places = [n for n, token in enumerate(tokens) if token.isalpha() and len(token) > 1 and token.lower() not in _EMPTY]
    sharpness = attention.max(axis=(1, 2, 3)) / attention.mean(axis=(1, 2, 3))
    first = {tokens[n]: n for n in reversed(places)}.values()  # a word that comes twice is shown once
    return sorted(sorted(first, key=lambda n: -sharpness[n])[:WORDS])


def overlay(image: Image.Image, looks: np.ndarray, highest: float, side: int) -> Image.Image:
    """An image in pale grey with a warm colour where it was looked at. looks: [rows, columns]; highest: full colour."""
    grey = 0.4 + 0.6 * np.asarray(_fitted(image, side).convert("L"), dtype=np.float64)[..., None] / 255
    strength = Image.fromarray((looks / max(highest, 1e-12)).astype(np.float32))
    strength = np.asarray(strength.resize((side, side), Image.Resampling.BICUBIC)).clip(0, 1)[..., None]
    warm = matplotlib.colormaps["inferno"](strength[..., 0])[..., :3]
    mixed = (1 - 0.75 * strength) * grey + 0.75 * strength * warm
    return Image.fromarray((255 * mixed.clip(0, 1)).round().astype(np.uint8))


def _fitted(image: Image.Image, side: int) -> Image.Image:
    """A square: the middle of the image, as CLIP's transform takes it, so that maps lie where they belong."""
    method = Image.Resampling.NEAREST if max(image.size) * 2 <= side else Image.Resampling.LANCZOS
    return ImageOps.fit(image.convert("RGB"), (side, side), method)


# -- maps --------------------------------------------------------------------------------------------------

# Okabe and Ito's palette, which people with any colour blindness can tell apart; shapes say the same again.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#C4B000", "#3D1A78")
MARKS = "osD^vP*X"
STYLES = {  # as matplotlib's scatter takes them
    "image": {"s": 26, "alpha": 0.75, "edgecolors": "#333333", "linewidths": 0.4},  # an edge, for pale colours
    "text": {"s": 210, "edgecolors": "black", "linewidths": 1.5, "zorder": 3},
}


class Layer(NamedTuple):
    """Points of one kind, a key of STYLES. places: [P, 2]; target: [P], their classes."""

    kind: str
    places: np.ndarray
    target: np.ndarray


def draw_map(title: str, panels: list[tuple[str, list[Layer]]], names: dict[int, str], note: str) -> Image.Image:
    """Panels side by side on one scale, with a note and one legend below. names: of the classes with a colour.

    A class that is itself called after a colour has that colour.
    """
    figure = Figure(figsize=(7.2, 5.4), dpi=125, layout="constrained")  # large letters, for a phone
    figure.suptitle(title, fontsize=16)
    axes = figure.subplots(1, len(panels), sharex=True, sharey=True, squeeze=False)[0]
    handles = {}
    for ax, (name, layers) in zip(axes, panels):
        ax.set_title(name, fontsize=14)
        ax.set(xticks=[], yticks=[])
        for layer in layers:
            groups = [(~np.isin(layer.target, [*names]), "#B0B0B0", "o", "other classes")]
            for (c, name), colour, mark in zip(names.items(), COLOURS, MARKS):
                colour = name if name in CSS4_COLORS else colour
                groups.append((layer.target == c, colour, mark, name))
            for chosen, colour, mark, name in groups:
                if chosen.any():
                    points = ax.scatter(*layer.places[chosen].T, color=colour, marker=mark, **STYLES[layer.kind])
                    handles.setdefault(name, points)
    columns = 2 if max(map(len, handles)) > 12 else 4
    figure.legend(
        handles.values(), handles.keys(), loc="outside lower center", ncols=columns, fontsize=13, frameon=False,
        title="\n".join(wrap(note, 800, 18)), title_fontsize=12, handletextpad=0.2, columnspacing=1, markerscale=1.6,
    )  # fmt: skip
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
