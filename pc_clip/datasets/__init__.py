"""Every data set behind one table: `open_dataset(name, ...)`. `python -m pc_clip.datasets` lists them.

Nothing is downloaded here unless a reader is told to.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from pc_clip.datasets.captioned import open_coco, read_captions, read_coco_captions, read_simclip_tsv
from pc_clip.datasets.classified import open_torchvision
from pc_clip.datasets.dataset import Attribute, Dataset, Question, read_image
from pc_clip.datasets.embedded import open_example
from pc_clip.datasets.folder import open_folder
from pc_clip.errors import UserError, check_choice, nearest

__all__ = [
    "READERS", "Attribute", "Dataset", "Question", "Reader", "open_dataset", "read_captions", "read_coco_captions",
    "read_image", "read_simclip_tsv",
]  # fmt: skip


@dataclass(frozen=True)
class Reader:
    """How a data set is opened, and what a user has to fetch for it."""

    open: Callable[[Path, str], Dataset]
    root: str | None  # where it is looked for unless told otherwise; None: it needs no files
    splits: tuple[str, ...]
    fetch: str
    size: str
    licence: str


READERS: dict[str, Reader] = {
    "example": Reader(
        open_example, None, ("train", "val", "test"), "Nothing to fetch.", "none", "MIT, as this project",
    ),
    "coco": Reader(
        open_coco, "data/coco", ("train2017", "val2017"),
        "Fetch train2017.zip, val2017.zip and annotations_trainval2017.zip of cocodataset.org and unpack them there.",
        "25 GB", "pictures: Flickr's terms; captions: CC BY 4.0",
    ),
    "folder": Reader(open_folder, "data/images", (), "Put images there, in a folder a class.", "yours", "yours"),
    "cifar10": Reader(
        partial(open_torchvision, "CIFAR10"), "data/cifar10", ("train", "test"),
        "Fetch cifar-10-python.tar.gz of www.cs.toronto.edu/~kriz and unpack it there (it makes cifar-10-batches-py/).",
        "170 MB", "not stated",
    ),
    "cifar100": Reader(
        partial(open_torchvision, "CIFAR100"), "data/cifar100", ("train", "test"),
        "Fetch cifar-100-python.tar.gz of www.cs.toronto.edu/~kriz and unpack it there (it makes cifar-100-python/).",
        "169 MB", "not stated",
    ),
}  # fmt: skip


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
