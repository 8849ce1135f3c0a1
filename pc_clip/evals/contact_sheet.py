"""Contact sheets: images in reading order with a caption each, under a title."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, ImageOps


@lru_cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    import matplotlib

    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf", size)


def contact_sheet(
    images: Sequence[Image.Image], title: str, labels: Sequence[str], columns: int = 8, side: int = 128
) -> Image.Image:
    """Each image fitted into a square of `side` pixels, its label below. The title wraps to the sheet's width."""
    gap, label_height = 10, 20
    columns = min(columns, len(images))
    width = max(columns * (side + gap) + gap, 480)
    lines = _wrap(title, width - 2 * gap)
    top = gap + 22 * len(lines) + 6
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (width, top + rows * (side + label_height + gap)), "white")
    pen = ImageDraw.Draw(sheet)
    for n, line in enumerate(lines):
        pen.text((gap, gap + 22 * n), line, "black", _font(16))
    for n, (image, label) in enumerate(zip(images, labels)):
        x, y = gap + n % columns * (side + gap), top + n // columns * (side + label_height + gap)
        method = Image.Resampling.NEAREST if max(image.size) < side else Image.Resampling.LANCZOS
        fitted = ImageOps.contain(image, (side, side), method)
        sheet.paste(fitted, (x + (side - fitted.width) // 2, y + (side - fitted.height) // 2))
        pen.text((x + side / 2, y + side + 3), label, "#444444", _font(12), anchor="ma")
    return sheet


def _wrap(text: str, width: int) -> list[str]:
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        lines[-1:] = [longer] if _font(16).getlength(longer) <= width or not lines[-1] else [lines[-1], word]
    return lines
