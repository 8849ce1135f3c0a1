"""Pictures inside the page: contact sheets and maps that lie beside a result, made small enough to send."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from pc_clip.report.page.gather import Found, Gathered, clean
from pc_clip.report.page.summary import Block

WIDEST = 1400  # pixels
LARGEST = 250_000  # bytes that go in as they are; larger files are encoded again as JPEG
_AS_IT_IS = {"PNG": "image/png", "JPEG": "image/jpeg"}


@dataclass(frozen=True)
class Shown:
    """source: a data: address. width and height in pixels of what was put in."""

    variant: str
    alt: str
    source: str
    width: int
    height: int
    seeds: int


def pictures(block: Block, found: Gathered) -> dict[str, list[Shown]]:
    """Name -> the picture of each variant, of its first seed. Those that cannot be shown are named in `found`."""
    shown: dict[str, list[Shown]] = {}
    for variant, results in block.results.items():
        for file, alt in _named(results[0]):
            try:
                source, width, height = embed(results[0].file.parent / file)
            except (OSError, ValueError, Image.DecompressionBombError) as error:
                why = "it is not there" if isinstance(error, FileNotFoundError) else "it is no picture that can be read"
                found.skipped.append((str(Path(results[0].shown).parent / file), why))
                continue
            name = Path(file).stem.removeprefix(f"{results[0].file.stem}-")
            shown.setdefault(name, []).append(Shown(variant, alt, source, width, height, len(results)))
    return shown


def embed(path: Path) -> tuple[str, int, int]:
    """A picture's data: address, width and height. Raises OSError or ValueError for what is no picture."""
    raw = path.read_bytes()
    with Image.open(io.BytesIO(raw)) as image:
        image.load()
        if image.width <= WIDEST and len(raw) <= LARGEST and image.format in _AS_IT_IS:
            return _address(raw, _AS_IT_IS[image.format]), image.width, image.height
        whole = image.convert("RGBA")
    plain = Image.new("RGB", whole.size, "white")
    plain.paste(whole, mask=whole.getchannel("A"))
    if plain.width > WIDEST:
        plain = plain.resize((WIDEST, max(1, round(plain.height * WIDEST / plain.width))), Image.Resampling.LANCZOS)
    out = io.BytesIO()
    plain.save(out, "JPEG", quality=85, optimize=True)
    return _address(out.getvalue(), "image/jpeg"), plain.width, plain.height


def _named(result: Found) -> list[tuple[str, str]]:
    """File and description of a result's pictures: only those that lie right beside it."""
    given = result.content.get("pictures")
    found = [p for p in given if isinstance(p, dict)] if isinstance(given, list) else []
    named = [(p.get("file"), p.get("alt")) for p in found]
    return [
        (file, clean(alt) if isinstance(alt, str) and alt else f"{file}, not described")
        for file, alt in named
        if isinstance(file, str) and file and Path(file).name == file
    ]


def _address(raw: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(raw).decode('ascii')}"
