"""What the page does with pictures, without the page: rank them, compare two of them, classify them, by two models.

Each picture is embedded once by each model. What a visitor gives is checked here, and refused in a sentence.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd
import torch
from PIL import Image, ImageOps
from torch import Tensor

from pc_clip.core.errors import UserError
from pc_clip.data.dataset import read_image
from pc_clip.data.registry import open_dataset
from pc_clip.data.wordings import swap_roles
from pc_clip.interface.model import Model

UPLOADS = 200  # pictures a visitor may drop at a time
SENTENCES = 20
THUMBNAIL = 320  # pixels of the longer side
AT_ONCE = 64  # pictures embedded between two steps of the progress bar
EXAMPLES = 120  # scenes shown where no folder is named

Progress = Callable[[float, str], object]


@dataclass
class Pictures:
    """Pictures by name, and how one of them is opened."""

    names: list[str]
    open: Callable[[int], Image.Image]
    embedded: dict[str, Tensor] = field(default_factory=dict)  # by model, [N, D] each

    @classmethod
    def of(cls, folder: str | None) -> Pictures:
        """Pictures of a folder, or scenes of the embedded example. Raises UserError for a folder without pictures."""
        data = open_dataset("folder", folder) if folder else open_dataset("example", None, "test")
        return cls(list(data.ids[: None if folder else EXAMPLES]), data.load)

    @classmethod
    def dropped(cls, files: Sequence[str]) -> Pictures:
        """Uploaded pictures, by their temporary paths. Raises UserError for too many."""
        if len(files) > UPLOADS:
            raise UserError(
                f"{len(files)} pictures were dropped; at most {UPLOADS} at a time, or name a folder: --images"
            )
        return cls([Path(file).name for file in files], lambda row: read_picture(files[row]))

    def embed(self, name: str, model: Model, progress: Progress) -> Tensor:
        """Their embeddings by a model, made once.  -> [N, D] unit length"""
        if name not in self.embedded:
            parts = []
            for start in range(0, len(self.names), AT_ONCE):
                progress(start / len(self.names), f"embedding {len(self.names)} pictures ({name})")
                rows = range(start, min(start + AT_ONCE, len(self.names)))
                parts.append(model.embed_images([self.open(row) for row in rows]))
            self.embedded[name] = torch.cat(parts)
        return self.embedded[name]

    def thumbnail(self, row: int) -> Image.Image:
        picture = self.open(row).convert("RGB")
        picture.thumbnail((THUMBNAIL, THUMBNAIL))
        return picture


def read_picture(path: str) -> Image.Image:
    """A picture the way up that its EXIF says. Raises UserError for what is none, without the path it lies at."""
    try:
        return ImageOps.exif_transpose(read_image(Path(path)))
    except UserError as error:
        raise UserError(f"{Path(path).name} cannot be read as a picture; give a JPEG, PNG or WebP file") from error


class Desk:
    """The models that are shown side by side, by name: the one as it was, and the finetuned one if there is one."""

    def __init__(self, models: dict[str, Model], pictures: Pictures) -> None:
        self.models, self.pictures = models, pictures

    def rank(
        self, sentence: str, against: str, files: Sequence[str] | None, progress: Progress
    ) -> tuple[dict[str, list[tuple[Image.Image, str]]], str, pd.DataFrame]:
        """Pictures in the order of a sentence, by each model.

        against: the sentence's opposite, or nothing. files: pictures dropped, in place of the folder's.
        -> by model the twelve first and last (thumbnail, caption); how often the models agree; a row a picture.
        """
        sentence, against = _text(sentence, "a sentence"), against.strip()
        pictures = Pictures.dropped(files) if files else self.pictures
        scores = {}
        for name, model in self.models.items():
            z = pictures.embed(name, model, progress)
            directions = model.embed_texts([sentence, against] if against else [sentence])
            scores[name] = z @ (directions[0] - directions[1] if against else directions[0])
        table = pd.DataFrame({"picture": pictures.names} | {name: score.numpy() for name, score in scores.items()})
        galleries = {name: _ends(pictures, score) for name, score in scores.items()}
        first = next(iter(scores))
        return galleries, _agreement(scores), table.sort_values(first, ascending=False, kind="stable")

    def compare(self, first: str | None, second: str | None, sentences: str) -> pd.DataFrame:
        """Cosines of sentences with the difference of two pictures, first minus second.

        sentences: one a line. -> a row a sentence, model and wording ("as written", or "mirrored", where the
        names of the two pictures are exchanged): sentence, wording, model, score.
        """
        if not (first and second):
            raise UserError("give two pictures: drop one on either side")
        lines = [line.strip() for line in sentences.splitlines() if line.strip()]
        if not 1 <= len(lines) <= SENTENCES:
            raise UserError(f"write between one and {SENTENCES} sentences, one a line")
        pictures, rows = [read_picture(path) for path in (first, second)], []
        for line in lines:
            other = swap_roles(line)
            for wording, text in [("as written", line)] + ([("mirrored", other)] if other else []):
                for name, model in self.models.items():
                    score = model.difference(pictures[:1], pictures[1:], [text]).item()
                    rows.append({"sentence": text, "wording": wording, "model": name, "score": round(score, 4)})
        return pd.DataFrame(rows)

    def classify(self, picture: str | None, classes: str, comparisons: str) -> dict[str, dict[str, float]]:
        """The five likeliest classes, by each model, plainly and with comparisons if there are any.

        classes: one a line. comparisons: one a line, `a | b | how a differs from b`. -> title -> class -> share
        """
        if not picture:
            raise UserError("give a picture")
        names = list(dict.fromkeys(line.strip() for line in classes.splitlines() if line.strip()))
        if len(names) < 2:
            raise UserError("write at least two classes, one a line")
        known = []
        for line in filter(str.strip, comparisons.splitlines()):
            parts = [part.strip() for part in line.split("|")]
            if len(parts) != 3 or not {parts[0], parts[1]} <= set(names) or not parts[2]:
                raise UserError(f"{line.strip()!r} is not a comparison; write `class | other class | how they differ`")
            known.append(dict(zip(("class_a", "class_b", "text"), parts)))
        image, shares = [read_picture(picture)], {}
        for name, model in self.models.items():
            for how, given in [("", None)] + ([(", with comparisons", known)] if known else []):
                row = model.zeroshot(image, names, given, templates=("a photo of a {}",)).iloc[0]
                shares[f"{name}{how}"] = row.nlargest(5).astype(float).to_dict()
        return shares


def _text(text: str, what: str) -> str:
    if not text.strip():
        raise UserError(f"write {what}")
    return text.strip()


def _ends(pictures: Pictures, score: Tensor, count: int = 12) -> list[tuple[Image.Image, str]]:
    """The first pictures of an order, and behind them the last."""
    order = score.argsort(descending=True, stable=True).tolist()
    places = list(range(len(order))) if len(order) <= 2 * count else [*range(count), *range(-count, 0)]
    return [(pictures.thumbnail(order[n]), f"{n % len(order) + 1}. {score[order[n]]:+.3f}") for n in places]


def _agreement(scores: dict[str, Tensor]) -> str:
    """Fraction of picture pairs that two models order alike."""
    if len(scores) < 2 or len(next(iter(scores.values()))) < 2:
        return ""
    a, b = ((score[:, None] - score).sign() for score in scores.values())
    n = len(a)
    same = ((a == b).float().sum() - n) / (n * n - n)
    return f"The two models put {100 * same:.0f} % of all pairs of these {n} pictures in the same order."
