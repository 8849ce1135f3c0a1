"""Every data set behind one table: `open_dataset(name, ...)`. `python -m pc_clip datasets` lists them.

What there is to know of each but its reader stands in datasets.yaml. Nothing is downloaded unless it is asked for:
`python -m pc_clip datasets --download NAME`.
"""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from pc_clip.core.errors import UserError, check_choice, nearest
from pc_clip.data import download as archives
from pc_clip.data.captions import TABLES, open_coco, open_tsv
from pc_clip.data.changes import (
    LINES,
    open_clevr_change,
    open_image_editing_request,
    open_lines,
    open_spot_the_diff,
)
from pc_clip.data.classification import KINDS, download_classified, open_awa2, open_classified, open_cub
from pc_clip.data.dataset import Dataset
from pc_clip.data.example_sets import example, example_changes, example_relations
from pc_clip.data.folder import open_folder
from pc_clip.data.huggingface import open_huggingface
from pc_clip.data.picture_files import is_list
from pc_clip.data.upright import upright as turned_upright
from pc_clip.data.webdataset import open_webdataset

ONES_OWN = ("folder", "tsv", "changes")


@dataclass(frozen=True)
class Reader:
    """How a data set is opened, and what a user has to fetch for it. The fields of datasets.yaml are explained there.

    open: takes the folder of its files and a split. any_split: whether others than `splits` may be named, since the
    files decide. may_miss: whether pictures may be absent that a file lists; `open` then takes `missing` as well.
    is_table: whether a split is the path of a file, which may name pictures anywhere, so that nothing has to be at
    `root`. root: None for a set that needs no files.
    """

    open: Callable[[Path, str], Dataset]
    any_split: bool = False
    may_miss: bool = False
    is_table: Callable[[Path], bool] | None = None
    root: str | None = None
    splits: tuple[str, ...] = ()
    fetch: str = "Nothing to fetch."
    size: str = "yours"
    licence: str = "yours"
    inner: tuple[str, ...] = ()
    files: tuple[str, ...] = ()

    def folder(self, root: Path) -> Path:
        """The first of the inner folders that exists; otherwise `root` itself."""
        return next((root / inner for inner in self.inner if (root / inner).is_dir()), root)

    def state(self, root: Path | None = None) -> str:
        """Whether it is in a folder, `root` or its usual one: "found", "not found", or "incomplete: no ..."."""
        if self.root is None:
            return "found"
        root = root or Path(self.root)
        folder = self.folder(root)
        absent = [file for file in self.files if not any(any(folder.glob(name)) for name in file.split("|"))]
        if not root.is_dir() or (absent and len(absent) == len(self.files)):
            return "not found"
        return f"incomplete: no {', '.join(absent)}" if absent else "found"


def _reader(name: str, opener: Callable, **how: Any) -> Reader:
    about = {key: tuple(value) if isinstance(value, list) else value for key, value in _ABOUT[name].items()}
    if archive := about.pop("archive", None):
        about["fetch"] = f"Fetch it: python -m pc_clip datasets --download {name} (or unpack {archive})."
    return Reader(opener, **how, **about)


def _embedded(make: Callable[[str], Dataset]) -> Reader:
    splits = ("train", "val", "test")
    return Reader(lambda _, split: make(split), splits=splits, size="none", licence="MIT, as this project")


_ABOUT = yaml.safe_load(Path(__file__).with_name("datasets.yaml").read_text(encoding="utf-8"))
READERS: dict[str, Reader] = {
    "example": _embedded(example),
    "example_relations": _embedded(example_relations),
    "example_changes": _embedded(example_changes),
    "coco": _reader("coco", open_coco, any_split=True, may_miss=True),
    "tsv": _reader("tsv", open_tsv, any_split=True, may_miss=True, is_table=partial(is_list, endings=TABLES)),
    "folder": _reader("folder", open_folder),
    "huggingface": _reader("huggingface", open_huggingface, any_split=True),
    "webdataset": _reader("webdataset", open_webdataset, any_split=True, may_miss=True),
    **{name: _reader(name, partial(open_classified, name)) for name in KINDS},
    "cub": _reader("cub", open_cub, any_split=True),  # by class as well
    "awa2": _reader("awa2", open_awa2),
    "clevr_change": _reader("clevr_change", open_clevr_change, may_miss=True),
    "spot_the_diff": _reader("spot_the_diff", open_spot_the_diff, may_miss=True),
    "image_editing_request": _reader("image_editing_request", open_image_editing_request, may_miss=True),
    "changes": _reader("changes", open_lines, any_split=True, may_miss=True, is_table=partial(is_list, endings=LINES)),
}


def _known(name: str) -> Reader:
    if name not in READERS:
        raise UserError(f"unknown data set {name!r}. {nearest(name, READERS)}")
    return READERS[name]


def open_dataset(
    name: str,
    root: str | Path | None = None,
    split: str | None = None,
    *,
    missing: str = "error",
    upright: bool | None = None,
) -> Dataset:
    """Open a data set by name.

    missing: what a caption file's absent pictures mean, "error", "skip" or "keep" (counted in the note). upright:
    whether pictures are turned as their EXIF says; None for one's own (ONES_OWN) and not for published benchmarks,
    whose figures are of pictures as they are stored.
    Raises UserError for an unknown name or split and for a data set that is not there, with what to fetch.
    """
    check_choice("missing", missing, ("error", "skip", "keep"))
    reader = _known(name)
    split = split or (reader.splits[-1] if reader.splits else "")
    if reader.splits and split not in reader.splits and not reader.any_split:
        raise UserError(f"{name} has no split {split!r}. {nearest(split, reader.splits)}")
    folder = Path(root or reader.root or ".")
    if root or not (reader.is_table and reader.is_table(Path(split))):
        _require(name, reader, folder)
    opener = partial(reader.open, missing=missing) if reader.may_miss else reader.open
    data = opener(reader.folder(folder), split)
    own = name in ONES_OWN and missing != "keep"
    return turned_upright(data) if (own if upright is None else upright) else data


def _require(name: str, reader: Reader, folder: Path) -> None:
    if (state := reader.state(folder)) == "not found":
        raise UserError(f"{name} is not at {folder}. {reader.fetch} Then name the folder with --root (--data.root).")
    if state != "found":
        raise UserError(f"{name} at {folder} is {state}. {reader.fetch}")


def selection_split(data: Dataset) -> str | None:
    """The split to choose settings on: "val", else "train"; None where none is apart from `data`."""
    part = data.part or data.split
    apart = (split for split in (sibling_split(data, "val"), sibling_split(data, "train")) if split not in (None, part))
    return next(apart, None) if part != "all" else None  # every other split is inside that


def sibling_split(data: Dataset, split: str) -> str | None:
    """The split of that name which belongs with `data`: beside reformat_test, "train" is reformat_train.

    None where there is no such, and for a file that was named by its path, of which none can know what belongs with it.
    """
    reader, part = READERS.get(data.name), data.part or data.split
    if reader is None or (reader.is_table and reader.is_table(Path(part))):
        return None
    sibling = f"{part.rpartition('_')[0]}_{split}".lstrip("_")
    return sibling if sibling in reader.splits and (reader.any_split or part in reader.splits) else None


def download(name: str, root: str | Path | None = None) -> Path:
    """Fetch what a data set lacks, and unpack it; the folder it is in. What is there already is not fetched again.

    Raises UserError for a set that cannot be fetched by us, and for a failed or damaged download.
    """
    reader = _known(name)
    if name not in archives.ARCHIVES and name not in KINDS:
        raise UserError(f"{name} cannot be downloaded. {reader.fetch}")
    folder = Path(root or reader.root)
    if name == "coco" or reader.state(folder) != "found":  # captions of coco may be there alone
        folder.mkdir(parents=True, exist_ok=True)
        (download_classified if name in KINDS else archives.fetch)(name, folder)
    _require(name, reader, folder)
    return folder


def main(argv: Sequence[str] | None = None) -> None:
    """List the data sets: found or not, where they are looked for, what to fetch; or download one."""
    parser = argparse.ArgumentParser(prog="python -m pc_clip datasets", description=main.__doc__)
    parser.add_argument("--download", metavar="NAME", help="Fetch this data set and unpack it.")
    parser.add_argument("--root", metavar="FOLDER", help="Where to, unless it is where the list says.")
    arguments = parser.parse_args(argv)
    if arguments.root and not arguments.download:
        raise UserError("--root goes with --download NAME; to read a data set from there, give it to run.py")
    if arguments.download:
        print(f"{arguments.download} is in {download(arguments.download, arguments.root)}")
    else:
        print(table())


def table() -> str:
    """A line a data set, and below it what is absent, how it is fetched, and its licence."""
    lines = [f"{'name':<22}{'state':<12}{'looked for in':<27}size"]
    for name, reader in READERS.items():
        status, _, absent = reader.state().partition(": ")
        lines.append(f"{name:<22}{status:<12}{reader.root or '(embedded)':<27}{reader.size}")
        for text in (absent, reader.fetch if status != "found" else "", f"licence: {reader.licence}"):
            lines += textwrap.wrap(text, 110, initial_indent="    ", subsequent_indent="    ", break_on_hyphens=False)
    return "\n".join(lines)
