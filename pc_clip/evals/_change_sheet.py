"""A sheet of pairs of images: before, after, what was said and what people say, and where the decoder looked."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

from pc_clip.data.dataset import Change, Dataset
from pc_clip.evals import Picture

COLUMNS = 3
SIDE = 200  # pixels of an image
SMALL = 97  # of a map
GAP, MARGIN = 6, 14
WIDTH = 2 * SIDE + GAP  # of a pair
REFERENCES, WORDS = 2, 2  # that are shown
LINE = 19  # pixels from one line of text to the next

GREEN, RED, BLACK, GREY, PALE = "#1a7f37", "#c62828", "#111111", "#5f6368", "#dadce0"
# Words that point at no place in an image. Of the others, those are shown at which the decoder looks most sharply.
_EMPTY = {
    "a", "an", "the", "is", "are", "was", "were", "be", "been", "has", "have", "had", "it", "its", "this", "that",
    "these", "those", "there", "of", "in", "on", "at", "to", "from", "by", "with", "and", "or", "no", "not", "now",
    "as", "than", "same", "all", "other", "another", "one", "image", "picture", "photo", "scene",
}  # fmt: skip


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
    columns = min(COLUMNS, len(cells))
    lines = [cells[n : n + columns] for n in range(0, len(cells), columns)]
    width = columns * (WIDTH + 2 * MARGIN)
    heading = wrap(title, width - 2 * MARGIN, 18, True)
    legend = wrap(_legend(shown), width - 2 * MARGIN, 12)
    top = MARGIN + len(heading) * 26 + len(legend) * LINE + 8
    heights = [max(cell.height for cell in line) + 2 * MARGIN for line in lines]
    sheet = Image.new("RGB", (width, top + sum(heights)), "white")
    pen = ImageDraw.Draw(sheet)
    for n, text in enumerate(heading):
        pen.text((MARGIN, MARGIN + 26 * n), text, BLACK, _font(18, True))
    for n, text in enumerate(legend):
        pen.text((MARGIN, MARGIN + 26 * len(heading) + LINE * n), text, GREY, _font(12))
    for line, height in zip(lines, heights):
        pen.line([(MARGIN, top), (width - MARGIN, top)], PALE)
        for n, cell in enumerate(line):
            sheet.paste(cell, (MARGIN + n * (WIDTH + 2 * MARGIN), top + MARGIN))
        top += height
    return Picture(sheet, _in_words(shown))


def chosen_words(tokens: Sequence[str], attention: np.ndarray) -> list[int]:
    """The places of two words in a sentence that name something, in its order: those looked at most sharply."""
    of = [n for n, token in enumerate(tokens) if token.isalpha() and len(token) > 1 and token.lower() not in _EMPTY]
    sharpness = attention.max(axis=(1, 2, 3)) / attention.mean(axis=(1, 2, 3))
    first = {tokens[n]: n for n in reversed(of)}.values()  # a word that comes twice is shown once
    return sorted(sorted(first, key=lambda n: -sharpness[n])[:WORDS])


def overlay(image: Image.Image, looks: np.ndarray, highest: float, side: int) -> Image.Image:
    """An image in pale grey with a warm colour where it was looked at. looks: [rows, columns]; highest: full colour."""
    from matplotlib import colormaps

    grey = np.asarray(_fitted(image, side).convert("L").convert("RGB"), dtype=np.float64) / 255
    strength = Image.fromarray((looks / max(highest, 1e-12)).astype(np.float32))
    strength = np.asarray(strength.resize((side, side), Image.Resampling.BICUBIC)).clip(0, 1)[..., None]
    mixed = (1 - 0.75 * strength) * (0.4 + 0.6 * grey) + 0.75 * strength * colormaps["inferno"](strength[..., 0])[
        ..., :3
    ]
    return Image.fromarray((255 * mixed.clip(0, 1)).round().astype(np.uint8))


def wrap(text: str, width: int, size: int, bold: bool = False) -> list[str]:
    """Lines that fit. A word that is too long for a line is broken."""
    font, lines = _font(size, bold), [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width:
            lines[-1] = longer
            continue
        lines += [word] if lines[-1] else []
        lines[-1] = lines[-1] or word
        while font.getlength(lines[-1]) > width:
            fits = next(n for n in range(len(lines[-1]) - 1, 0, -1) if font.getlength(lines[-1][:n]) <= width or n == 1)
            lines[-1:] = [lines[-1][:fits], lines[-1][fits:]]
    return lines


def _cell(before: Image.Image, after: Image.Image, one: Shown) -> Image.Image:
    colour = {True: GREEN, False: RED, None: BLACK}[one.right]
    mark = {True: "✓ ", False: "✗ ", None: ""}[one.right]
    said = [(text, colour, True) for text in wrap(mark + (one.said or "(nothing)"), WIDTH, 14, True)]
    told = [(t, GREY, False) for ref in one.change.sentences[:REFERENCES] for t in wrap(f"– {ref}", WIDTH, 13)]
    text, top = said + told, 18 + SIDE + 6
    words = chosen_words(one.tokens, one.attention) if one.attention is not None else []
    maps_at = top + len(text) * LINE + 8
    cell = Image.new("RGB", (WIDTH, maps_at + (18 + SMALL if words else 0)), "white")
    pen = ImageDraw.Draw(cell)
    for n, (image, name) in enumerate([(before, "before"), (after, "after")]):
        kind = f"   ({one.change.kind})" if n and one.change.kind else ""
        pen.text((n * (SIDE + GAP), 0), name + kind, GREY, _font(12))
        cell.paste(_fitted(image, SIDE), (n * (SIDE + GAP), 18))
    for n, (line, colour, bold) in enumerate(text):
        pen.text((0, top + n * LINE), line, colour, _font(14 if bold else 13, bold))
    for n, place in enumerate(words):
        left, looks = n * (SIDE + GAP), one.attention[place]
        label = wrap(f"“{one.tokens[place]}”", SIDE, 12)[0]
        pen.text((left, maps_at), label, BLACK, _font(12))
        for m, image in enumerate([before, after]):
            cell.paste(overlay(image, looks[m], float(looks.max()), SMALL), (left + m * (SIDE - SMALL), maps_at + 18))
    return cell


def _fitted(image: Image.Image, side: int) -> Image.Image:
    """A square: the middle of the image, as CLIP's transform takes it, so that maps lie where they belong."""
    method = Image.Resampling.NEAREST if max(image.size) * 2 <= side else Image.Resampling.LANCZOS
    return ImageOps.fit(image.convert("RGB"), (side, side), method)


def _legend(shown: Sequence[Shown]) -> str:
    said = "bold: what the model says"
    if any(one.right is not None for one in shown):
        said += ", ✓ where it is right and ✗ where it is wrong"
    maps = "; small: where the decoder's last layer looks at a word, before and after, with one scale for both"
    return f"{said}; below it: what people say{maps if any(s.attention is not None for s in shown) else ''}"


def _in_words(shown: Sequence[Shown]) -> str:
    judged = [one.right for one in shown if one.right is not None]
    about = f"; {sum(judged)} of {len(judged)} sentences are right" if judged else ""
    maps = ", and where the decoder looked at two of its words" if any(s.attention is not None for s in shown) else ""
    return (
        f"{len(shown)} pairs of images before and after a change, what the model says and what people say{maps}{about}"
    )


@lru_cache
def _font(size: int, bold: bool = False) -> ImageFont.FreeTypeFont:
    import matplotlib

    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / name, size)
