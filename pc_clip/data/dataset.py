"""What a data set is: images with ids, and whatever is known about them."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from pc_clip.core.errors import UserError

# endings of files that are taken for images
IMAGE_SUFFIXES = {".avif", ".bmp", ".gif", ".jfif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
CAPTION_COLUMN, LABEL_COLUMNS = re.compile(r"caption\d*|title|text"), ("label", "class", "category")  # of tables
PHOTO_TEMPLATE = ("This is a photo of a {}.",)


class NoSplit(UserError):
    """The data set is there, and a split of it is not."""


class BrokenImage(UserError):
    """An image whose bytes do not decode; reading it again gives the same error."""


@dataclass(frozen=True)
class Question:
    """A classification task: which of `classes` each of some images belongs to.

    rows, target: [M] int64, into the data set's images and into `classes`.
    graded: what the data set's own files say of each class: attribute -> class -> how much of it. Empty for most.
    templates: the prompts of the paper; several: the data set's own list of prompts, empty where it has none.
    """

    name: str
    classes: tuple[str, ...]
    rows: np.ndarray
    target: np.ndarray
    templates: tuple[str, ...] = PHOTO_TEMPLATE
    graded: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    several: tuple[str, ...] = ()


@dataclass(frozen=True)
class Attribute:
    """Something images have more or less of.

    value: [N] float, NaN where it is not defined. more/less complete "The first image shows ...";
    high/low name one image that has much or little of it, for a prompt. Two images differ clearly when
    their values are more than `gap` apart. task: the group it is reported in; empty for its own.
    """

    name: str
    value: np.ndarray
    more: str
    less: str
    high: str
    low: str
    gap: float = 0.0
    task: str = ""


@dataclass(frozen=True)
class Statement:
    """A text about an image and another that contradicts it; `true` says whether the text holds.

    What contradicts a true text is false. What contradicts a false one is taken to be true, and mostly is: of an
    image neither may hold ("left of", "right of"), which what was made by data/relations.py cannot know.

    image: an id of a data set, as the file writes it, or a view of one (data/views.py). kind: what it is reported
    under: a relation ("left of"), or the file it came from. category: a group of kinds. rejected_image: in ranking
    data, an image that the text fits less; text and contradiction are then the same.
    """

    image: str
    text: str
    contradiction: str
    true: bool = True
    kind: str = ""
    category: str = ""
    rejected_image: str = ""

    @property
    def preferred(self) -> str:
        return self.text if self.true else self.contradiction

    @property
    def rejected(self) -> str:
        return self.contradiction if self.true else self.text


@dataclass(frozen=True)
class Change:
    """Two images and what is said of how the second differs from the first.

    before, after: ids of images of a data set. sentences: one or more, each says it all. kind: of change, as the data
    set names it ("colour", "none"); empty where it does not say.
    """

    before: str
    after: str
    sentences: tuple[str, ...]
    kind: str = ""


@dataclass(frozen=True)
class Dataset:
    """Images and what is known about them. `load(row)` gives an RGB image or raises UserError with its path, and
    BrokenImage where the fault is in the image.

    split: how results and files name it; it says how a random split was made ("test-10pct-seed0"). part: the
    split as it was asked for ("test"); empty for a data set without splits. changes: pairs of its images with what is
    said of how the second differs; left_out: ids that its files name and that were left out because their picture is
    absent or broken; judge(row, sentence) tells which parts of a sentence about changes[row] are right
    ("type", "object", "value"), where the data set can know.
    """

    name: str
    split: str
    ids: list[str]
    load: Callable[[int], Image.Image]
    fingerprint: str
    captions: list[tuple[str, ...]] | None = None
    questions: tuple[Question, ...] = ()
    attributes: tuple[Attribute, ...] = ()
    note: str = ""
    part: str = ""
    left_out: frozenset[str] = frozenset()
    statements: tuple[Statement, ...] = ()
    changes: tuple[Change, ...] = ()
    judge: Callable[[int, str], dict[str, bool]] | None = None

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def label(self) -> str:
        return f"{self.name}/{self.split}" if self.split else self.name


def subset(data: Dataset, rows: np.ndarray) -> Dataset:
    """Some images of a data set, in increasing order of their rows, with what is known about them.

    It has a fingerprint, and so a cache of embeddings, of its own.
    """
    place = np.full(len(data), -1)
    place[rows] = np.arange(len(rows))

    def of(question: Question) -> Question:
        kept = place[question.rows] >= 0
        return dataclasses.replace(question, rows=place[question.rows][kept], target=question.target[kept])

    kept = {data.ids[row] for row in rows}
    changes = [n for n, change in enumerate(data.changes) if change.before in kept and change.after in kept]
    return dataclasses.replace(
        data,
        ids=[data.ids[row] for row in rows],
        load=partial(_at, data.load, rows),
        fingerprint=digest(data.fingerprint, rows.tolist()),
        captions=[data.captions[row] for row in rows] if data.captions else None,
        questions=tuple(map(of, data.questions)),
        attributes=tuple(dataclasses.replace(a, value=a.value[rows]) for a in data.attributes),
        statements=tuple(
            s for s in data.statements if {i.split("@")[0] for i in (s.image, s.rejected_image or s.image)} <= kept
        ),
        changes=tuple(data.changes[n] for n in changes),
        judge=data.judge and partial(_at, data.judge, changes),
    )


def images_alone(data: Dataset) -> Dataset:
    """The same images, without what is known about them."""
    return Dataset(data.name, data.split, data.ids, data.load, data.fingerprint, note=data.note, part=data.part)


def with_changes(data: Dataset, rows: Sequence[int]) -> Dataset:
    """The same images with some of their changes."""
    chosen = tuple(data.changes[row] for row in rows)
    judge = data.judge and partial(_at, data.judge, list(rows))
    return dataclasses.replace(data, changes=chosen, judge=judge, fingerprint=digest(data.fingerprint, list(rows)))


def _at(function: Callable, rows: Sequence[int], place: int, *others: object) -> Any:
    return function(int(rows[place]), *others)


# -- for readers --------------------------------------------------------------------------------------


def read_image(path: str | Path) -> Image.Image:
    """An RGB image. Raises UserError that names the path: BrokenImage where the fault is in the file's content."""
    try:
        content = Path(path).read_bytes()  # first, so that a fault of the disk is not taken for one of the picture
    except FileNotFoundError as error:
        raise UserError(f"no image at {path}") from error
    except OSError as error:
        raise unreadable(path, error) from error
    return decode_image(content, str(path))


def decode_image(content: bytes, name: str) -> Image.Image:
    """An RGB image from a file's bytes, or BrokenImage with the name it is known by."""
    try:
        with Image.open(io.BytesIO(content)) as image:
            return as_rgb(image)
    except (UnidentifiedImageError, OSError, SyntaxError, Image.DecompressionBombError) as error:
        if "out of memory" in str(error):  # so Pillow reports what its decoders did not get
            raise MemoryError(f"decoding {name}") from error
        if getattr(error, "errno", None):  # of the machine; a decoder's own have no number
            raise
        what = "it is cut short, or no image" if isinstance(error, UnidentifiedImageError) else error
        raise BrokenImage(f"{name} cannot be read as an image ({what}); replace or remove it") from error


def as_rgb(image: Image.Image) -> Image.Image:
    return (_in_8_bits(image) if image.mode[0] in "IF" else image).convert("RGB")


def _in_8_bits(image: Image.Image) -> Image.Image:
    """Grey values of more than 8 bits, scaled: Pillow's own conversion cuts them off at 255.

    The upper byte of 16 bits; numbers from 0 to 1 are shares of white; any others go from their least to their most.
    """
    values = np.asarray(image).astype(np.float64)
    if not np.isfinite(values).all():
        raise SyntaxError("it has values that are not numbers")
    least, most = values.min(), values.max()
    if image.mode == "F":
        low, step = (0, 1 / 255) if least >= 0 and most <= 1 else (least, (most - least) / 255 or 1)
    else:
        low, step = (0, 256) if least >= 0 and most < 65536 else (least, (most - least) / 255)
    return Image.fromarray(((values - low) / step).astype(np.uint8))


def unreadable(path: str | Path, error: OSError) -> UserError:
    """The error for a file or folder that the system does not let us read."""
    return UserError(f"{path} cannot be read ({error.strerror or error}); fix that and run the same command again")


def digest(*parts: object) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]
