"""Every data set behind one table: `open_dataset(name, ...)`. `python -m pc_clip.datasets` lists them.

A data set is images with ids, and whatever is known about them: captions, classes, graded attributes.
Nothing is downloaded here unless a reader is told to.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image, UnidentifiedImageError

from pc_clip.errors import UserError, check_choice, nearest
from pc_clip.example import scenes, world

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif"}
PHOTO_TEMPLATE = ("This is a photo of a {}.",)


@dataclass(frozen=True)
class Question:
    """A classification task: which of `classes` each of some images belongs to.

    rows, target: [M] int64, into the data set's images and into `classes`.
    """

    name: str
    classes: tuple[str, ...]
    rows: np.ndarray
    target: np.ndarray
    templates: tuple[str, ...] = PHOTO_TEMPLATE


@dataclass(frozen=True)
class Attribute:
    """Something images have more or less of.

    value: [N] float, NaN where it is not defined. more/less complete "The first image shows ...";
    high/low name one image that has much or little of it, for a prompt. Two images differ clearly when
    their values are more than `gap` apart.
    """

    name: str
    value: np.ndarray
    more: str
    less: str
    high: str
    low: str
    gap: float = 0.0


@dataclass(frozen=True)
class Dataset:
    """Images and what is known about them. `load(row)` gives an RGB image or raises UserError with its path."""

    name: str
    split: str
    ids: list[str]
    load: Callable[[int], Image.Image]
    fingerprint: str
    captions: list[tuple[str, ...]] | None = None
    questions: tuple[Question, ...] = ()
    attributes: tuple[Attribute, ...] = ()
    note: str = ""

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def label(self) -> str:
        return f"{self.name}/{self.split}" if self.split else self.name


@dataclass(frozen=True)
class Reader:
    """How a data set is opened, and what a user has to fetch for it."""

    open: Callable[[Path, str], Dataset]
    root: str | None  # where it is looked for unless told otherwise; None: it needs no files
    splits: tuple[str, ...]
    fetch: str
    size: str
    licence: str


def open_dataset(
    name: str, root: str | Path | None = None, split: str | None = None, *, missing: str = "error"
) -> Dataset:
    """Open a data set by name.

    missing: what a caption file's absent pictures mean, "error" or "skip" (counted in the note).
    Raises UserError for an unknown name or split and for a data set that is not there, with what to fetch.
    """
    check_choice("missing", missing, ("error", "skip"))
    if name not in READERS:
        raise UserError(f"unknown data set {name!r}. {nearest(name, READERS)}")
    reader = READERS[name]
    split = split or (reader.splits[-1] if reader.splits else "")
    if reader.splits and split not in reader.splits and name != "coco":
        raise UserError(f"{name} has no split {split!r}. {nearest(split, reader.splits)}")
    folder = Path(root or reader.root or ".")
    if reader.root is not None and not folder.is_dir():
        raise UserError(f"{name} is not at {folder}. {reader.fetch} Then name the folder with --root (--data.root).")
    opener = partial(reader.open, missing=missing) if name == "coco" else reader.open
    return opener(folder, split)


# What `load` is made of; plain functions, because worker processes are sent them.


def _draw_scene(shown: list[scenes.Scene], row: int) -> Image.Image:
    return scenes.draw(shown[row])


def _read_file(files: list[Path], row: int) -> Image.Image:
    return read_image(files[row])


def _read_torchvision(data: Any, row: int) -> Image.Image:
    return data[row][0].convert("RGB")


# -- the embedded example ------------------------------------------------------------------------------

EXAMPLE_SIZES = {"train": 6000, "val": 1000, "test": 2000}


def _open_example(_: Path, split: str) -> Dataset:
    n = EXAMPLE_SIZES[split]
    return example(split, n)


def example(split: str, n: int) -> Dataset:
    """The first `n` scenes of a split of the embedded example."""
    shown = [world.scene(split, i) for i in range(n)]
    pixels = b"".join(scenes.draw(scene).tobytes() for scene in shown[:8])
    return Dataset(
        name="example",
        split=split,
        ids=[f"{split}-{i:05d}" for i in range(n)],
        load=partial(_draw_scene, shown),
        fingerprint=_digest(split, n, hashlib.sha256(pixels).hexdigest()),
        captions=[world.captions(split, i) for i in range(n)],
        questions=tuple(_example_question(name, shown) for name in world.CLASSES),
        attributes=tuple(_example_attribute(name, shown) for name in ("size", "background", "count")),
    )


def _example_question(name: str, shown: list[scenes.Scene]) -> Question:
    answers = [world.answer(name, scene) for scene in shown]
    rows = np.array([row for row, a in enumerate(answers) if a is not None], dtype=np.int64)
    target = np.array([a for a in answers if a is not None], dtype=np.int64)
    return Question(name, world.CLASSES[name], rows, target, world.TEMPLATES[name])


def _example_attribute(name: str, shown: list[scenes.Scene]) -> Attribute:
    value = np.array([world.grade(name, scene) for scene in shown])
    more, less = world.COMPARATIVES[name]
    high, low = {
        "size": ("a large object", "a small object"),
        "background": ("an object on a light background", "an object on a dark background"),
        "count": ("three objects", "one object"),
    }[name]
    # A clear difference is wider than the spread within one class: 2.4 pixels at most, 50 grey levels.
    gap = {"size": 2.4, "background": 50.0, "count": 0.5}[name]
    return Attribute(name, value, more, less, high, low, gap)


# -- captions, COCO's and SimCLIP's formats ------------------------------------------------------------


def read_coco_captions(path: Path) -> dict[str, tuple[str, tuple[str, ...]]]:
    """A COCO captions file: image id -> (file name, its captions). Images without a caption are left out.

    Raises UserError when the file is missing, is not JSON, or holds no captions.
    """
    if not path.is_file():
        raise UserError(f"no captions file at {path}. COCO's are in annotations_trainval2017.zip of cocodataset.org.")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not JSON ({error}); fetch it again, it may have been cut short") from error
    if (
        not isinstance(content, dict)
        or not isinstance(content.get("images"), list)
        or not isinstance(content.get("annotations"), list)
    ):
        raise UserError(f'{path} is no COCO captions file: it needs the lists "images" and "annotations"')
    captions: dict[str, list[str]] = {}
    for kind, key in (("annotations", "image_id"), ("images", "id"), ("images", "file_name")):
        for n, entry in enumerate(content[kind]):
            if not isinstance(entry, dict) or key not in entry:
                raise UserError(f"{path}: entry {n} of {kind} has no {key}: {str(entry)[:80]}")
    for annotation in content["annotations"]:
        if not isinstance(annotation.get("caption"), str):
            raise UserError(
                f"{path} has annotations without captions (COCO's instances file? captions_*.json is wanted)"
            )
        if annotation["caption"].strip():
            captions.setdefault(str(annotation["image_id"]), []).append(" ".join(annotation["caption"].split()))
    files = {str(image["id"]): image["file_name"] for image in content["images"]}
    found = {key: (file, tuple(captions[key])) for key, file in files.items() if key in captions}
    if not found:
        raise UserError(f"{path} holds no captions: {len(files)} images, {len(content['annotations'])} annotations")
    return found


def read_simclip_tsv(path: Path) -> dict[str, tuple[str, tuple[str, ...]]]:
    """SimCLIP's table, `image caption1 caption2 ...`, tab-separated: image id -> (file name, its captions).

    The id is the column `id` where there is one, else the file's name. A missing caption is left out,
    never "nan". Raises UserError when the file or its columns are missing, or it has no captions.
    """
    if not path.is_file():
        raise UserError(f"no captions file at {path}; give --captions a tab-separated file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", pd.errors.ParserWarning)  # about a tab at the end of each row
            table = pd.read_csv(path, sep="\t", dtype=str, keep_default_na=False, quoting=3, index_col=False)
    except (pd.errors.EmptyDataError, pd.errors.ParserError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is no tab-separated UTF-8 table: {str(error).strip()}") from error
    columns = [c for c in table.columns if c.startswith("caption")]
    if "image" not in table.columns or not columns:
        raise UserError(
            f"{path} needs a column image and columns caption1, caption2, ...; found {', '.join(table.columns)}"
        )
    found = {}
    for row in table.to_dict("records"):
        texts = tuple(" ".join(row[c].split()) for c in columns if row[c].strip())
        key = row.get("id") or row["image"]
        if key in found:
            raise UserError(f"{path} has two rows for {key!r}; put all captions of an image into one row")
        if texts:
            found[key] = (row["image"], texts)
    if not found:
        raise UserError(f"{path} holds no captions: {len(table)} rows, all without one")
    return found


def read_captions(path: str | Path) -> dict[str, tuple[str, tuple[str, ...]]]:
    """Captions by image id from either format, told apart by the file's ending."""
    path = Path(path)
    return read_simclip_tsv(path) if path.suffix in {".tsv", ".txt", ".csv"} else read_coco_captions(path)


def _open_coco(root: Path, split: str, missing: str = "error") -> Dataset:
    """COCO's layout: {root}/[annotations/]captions_{split}.json, pictures in {root}/{split}/."""
    candidates = [folder / f"captions_{split}.json" for folder in (root / "annotations", root)]
    path = next((p for p in candidates if p.is_file()), None)
    if path is None:
        present = sorted(
            p.stem.removeprefix("captions_") for f in (root / "annotations", root) for p in f.glob("captions_*.json")
        )
        raise UserError(f"{root} has no captions_{split}.json; splits found there: {', '.join(present) or 'none'}")
    entries = read_coco_captions(path)
    folders = [root / split, root / "images" / split, root / "images", root]
    files = {key: next((f / name for f in folders if (f / name).is_file()), None) for key, (name, _) in entries.items()}
    absent = [entries[key][0] for key, file in files.items() if file is None]
    if absent and (missing == "error" or len(absent) == len(files)):
        raise UserError(
            f"{len(absent)} of the {len(files)} pictures in {path} are not in {root / split}, first {absent[0]}. "
            f"Get {split}.zip of cocodataset.org, or use only those that are there with --data.missing skip."
        )
    kept = [key for key, file in files.items() if file is not None]
    return Dataset(
        name="coco",
        split=split,
        ids=kept,
        load=partial(_read_file, [files[key] for key in kept]),
        fingerprint=_digest(*[(key, *_stat(files[key])) for key in kept]),
        captions=[entries[key][1] for key in kept],
        note=f"{len(absent)} pictures named in {path.name} are absent and left out" if absent else "",
    )


# -- folders and torchvision ---------------------------------------------------------------------------


def read_image(path: Path) -> Image.Image:
    """An RGB image, or a UserError that names the path."""
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except FileNotFoundError as error:
        raise UserError(f"no image at {path}") from error
    except (UnidentifiedImageError, OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"{path} cannot be read as an image ({error}); replace or remove it") from error


def _open_folder(root: Path, _: str) -> Dataset:
    """Any folder of images. Sub-folders are classes, named by the folder; without them there are none."""
    files = sorted(p for p in root.rglob("*") if _is_image_file(p, root))
    if not files:
        raise UserError(f"{root} holds no images ({', '.join(sorted(IMAGE_SUFFIXES))})")
    folders = [p.relative_to(root).parts[0] if p.parent != root else None for p in files]
    questions: tuple[Question, ...] = ()
    if any(folders):
        if not all(folders):
            loose = next(p for p, folder in zip(files, folders) if folder is None)
            raise UserError(
                f"{root} has images in class folders and beside them ({loose.name}); move those into a folder"
            )
        classes = sorted(set(folders))
        target = np.array([classes.index(folder) for folder in folders], dtype=np.int64)
        names = tuple(c.replace("_", " ") for c in classes)
        questions = (Question("class", names, np.arange(len(files)), target),)
    return Dataset(
        name="folder",
        split=root.name,
        ids=[str(p.relative_to(root)) for p in files],
        load=partial(_read_file, files),
        fingerprint=_digest(*[(str(p.relative_to(root)), *_stat(p)) for p in files]),
        questions=questions,
    )


def _is_image_file(path: Path, root: Path) -> bool:
    hidden = any(part.startswith(".") for part in path.relative_to(root).parts)
    return path.suffix.lower() in IMAGE_SUFFIXES and not hidden and path.is_file()


def _open_torchvision(kind: str, root: Path, split: str) -> Dataset:
    from pc_clip._torchvision import torchvision

    try:
        data = getattr(torchvision.datasets, kind)(root, train=split == "train", download=False)
    except RuntimeError as error:
        raise UserError(f"{kind.lower()} is not at {root}. {READERS[kind.lower()].fetch}") from error
    names = tuple(name.replace("_", " ") for name in data.classes)
    question = Question("class", names, np.arange(len(data)), np.asarray(data.targets, dtype=np.int64))
    return Dataset(
        name=kind.lower(),
        split=split,
        ids=[str(i) for i in range(len(data))],
        load=partial(_read_torchvision, data),
        fingerprint=_digest(kind, split, len(data), hashlib.sha256(data.data[:64].tobytes()).hexdigest()),
        questions=(question,),
    )


READERS: dict[str, Reader] = {
    "example": Reader(
        _open_example, None, ("train", "val", "test"), "Nothing to fetch.", "none", "MIT, as this project",
    ),
    "coco": Reader(
        _open_coco, "data/coco", ("train2017", "val2017"),
        "Fetch train2017.zip, val2017.zip and annotations_trainval2017.zip of cocodataset.org and unpack them there.",
        "25 GB", "pictures: Flickr's terms; captions: CC BY 4.0",
    ),
    "folder": Reader(_open_folder, "data/images", (), "Put images there, in a folder a class.", "yours", "yours"),
    "cifar10": Reader(
        partial(_open_torchvision, "CIFAR10"), "data/cifar10", ("train", "test"),
        "Fetch cifar-10-python.tar.gz of www.cs.toronto.edu/~kriz and unpack it there (it makes cifar-10-batches-py/).",
        "170 MB", "not stated",
    ),
    "cifar100": Reader(
        partial(_open_torchvision, "CIFAR100"), "data/cifar100", ("train", "test"),
        "Fetch cifar-100-python.tar.gz of www.cs.toronto.edu/~kriz and unpack it there (it makes cifar-100-python/).",
        "169 MB", "not stated",
    ),
}  # fmt: skip


def _stat(path: Path) -> tuple[int, int]:
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns


def _digest(*parts: object) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def main() -> None:
    """List the data sets: found or not, where they are looked for, what to fetch."""
    for name, reader in READERS.items():
        found = reader.root is None or Path(reader.root).is_dir()
        state, place = "found" if found else "not found", reader.root or "embedded"
        print(f"{name:10} {state:10} {place:15} {reader.size:8} {reader.licence}")
        if not found:
            print(f"{'':10} {reader.fetch}")


if __name__ == "__main__":
    main()
