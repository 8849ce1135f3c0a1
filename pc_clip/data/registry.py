"""Every data set behind one table: `open_dataset(name, ...)`. `python -m pc_clip datasets` lists them.

Nothing is downloaded unless it is asked for: `python -m pc_clip datasets --download NAME`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from pc_clip.core.errors import UserError, check_choice, nearest
from pc_clip.data import archives
from pc_clip.data.archives import ARCHIVES
from pc_clip.data.awa2 import LAYOUT as AWA2
from pc_clip.data.awa2 import open_awa2
from pc_clip.data.captions import is_table, open_coco, open_tsv, read_captions, read_coco_captions, read_simclip_tsv
from pc_clip.data.changes import (
    IMAGE_EDITING_REQUEST,
    SPOT_THE_DIFF,
    is_lines,
    open_image_editing_request,
    open_lines,
    open_spot_the_diff,
)
from pc_clip.data.classification import (
    LAYOUTS,
    open_cifar,
    open_eurosat,
    open_flowers102,
    open_food101,
    open_mnist,
    open_sun397,
)
from pc_clip.data.classnames import ClassNames, class_names
from pc_clip.data.clevr_change import LAYOUT as CLEVR_CHANGE
from pc_clip.data.clevr_change import open_clevr_change
from pc_clip.data.cub import LAYOUT as CUB
from pc_clip.data.cub import open_cub
from pc_clip.data.dataset import Attribute, Dataset, Question, read_image
from pc_clip.data.example_sets import open_changes, open_example, open_relations
from pc_clip.data.folder import open_folder
from pc_clip.data.layout import NO_FILES, Layout
from pc_clip.data.webdataset import LAYOUT as SHARDS
from pc_clip.data.webdataset import open_webdataset

__all__ = [
    "ARCHIVES", "READERS", "Attribute", "ClassNames", "Dataset", "Question", "Reader", "class_names", "download",
    "held_out", "open_dataset", "read_captions", "read_coco_captions", "read_image", "read_simclip_tsv",
]  # fmt: skip


@dataclass(frozen=True)
class Reader:
    """How a data set is opened, and what a user has to fetch for it.

    root: where it is looked for unless told otherwise; None: it needs no files. splits: the last is the default of
    an evaluation, the first of training. any_split: whether others may be named, since the files decide. may_miss:
    whether pictures may be absent that a file lists; `open` then takes `missing` as well. is_table: whether a split is
    the path of a file, which may name pictures anywhere, so that nothing need be at `root`.
    """

    open: Callable[[Path, str], Dataset]
    root: str | None
    splits: tuple[str, ...]
    fetch: str
    size: str
    licence: str
    layout: Layout = NO_FILES
    any_split: bool = False
    may_miss: bool = False
    is_table: Callable[[Path], bool] | None = None


def _command(name: str, of: str, makes: str) -> str:
    return f"Fetch it: python -m pc_clip datasets --download {name} (or unpack {of} there; it makes {makes})."


READERS: dict[str, Reader] = {
    "example": Reader(
        open_example, None, ("train", "val", "test"), "Nothing to fetch.", "none", "MIT, as this project",
    ),
    "example_relations": Reader(
        open_relations, None, ("train", "val", "test"), "Nothing to fetch.", "none", "MIT, as this project",
    ),
    "example_changes": Reader(
        open_changes, None, ("train", "val", "test"), "Nothing to fetch.", "none", "MIT, as this project",
    ),
    "coco": Reader(
        open_coco, "data/coco", ("train2017", "val2017"),
        _command("coco", "train2017.zip, val2017.zip and annotations_trainval2017.zip of cocodataset.org",
                 "train2017/, val2017/ and annotations/"),
        "20 GB", "pictures: Flickr's terms; captions: CC BY 4.0",
        Layout((), ("annotations/captions_*.json|captions_*.json",)), any_split=True, may_miss=True,
    ),
    "tsv": Reader(
        open_tsv, "data/tsv", ("train", "test"),
        "Put SPLIT.tsv there (columns image, caption1, caption2, ...), and the pictures there, in SPLIT/ or images/.",
        "yours", "yours", any_split=True, may_miss=True, is_table=is_table,
    ),
    "folder": Reader(open_folder, "data/images", (), "Put images there, in a folder a class.", "yours", "yours"),
    "webdataset": Reader(
        open_webdataset, "data/webdataset", ("train", "test"),
        "Put a WebDataset of CLIP_benchmark's layout there: classnames.txt and SPLIT/0.tar, 1.tar, ...",
        "yours", "yours", SHARDS, any_split=True,
    ),
    "cifar10": Reader(
        partial(open_cifar, "CIFAR10"), "data/cifar10", ("train", "test"),
        _command("cifar10", "cifar-10-python.tar.gz of www.cs.toronto.edu/~kriz", "cifar-10-batches-py/"),
        "170 MB", "not stated", LAYOUTS["cifar10"],
    ),
    "cifar100": Reader(
        partial(open_cifar, "CIFAR100"), "data/cifar100", ("train", "test"),
        _command("cifar100", "cifar-100-python.tar.gz of www.cs.toronto.edu/~kriz", "cifar-100-python/"),
        "169 MB", "not stated", LAYOUTS["cifar100"],
    ),
    "mnist": Reader(
        open_mnist, "data/mnist", ("train", "test"),
        "Fetch it: python -m pc_clip datasets --download mnist (or put its four *-ubyte.gz there, in MNIST/raw/).",
        "12 MB", "CC BY-SA 3.0", LAYOUTS["mnist"],
    ),
    "eurosat": Reader(
        open_eurosat, "data/eurosat", ("train", "test"),
        _command("eurosat", "EuroSAT.zip, the RGB version, of github.com/phelber/EuroSAT", "2750/"),
        "94 MB", "MIT", LAYOUTS["eurosat"],
    ),
    "sun397": Reader(
        open_sun397, "data/sun397", ("train", "test"),
        _command("sun397", "SUN397.tar.gz of vision.princeton.edu/projects/2010/SUN", "SUN397/"),
        "39 GB", "not stated", LAYOUTS["sun397"],
    ),
    "flowers102": Reader(
        open_flowers102, "data/flowers102", ("train", "val", "test"),
        _command("flowers102", "102flowers.tgz of www.robots.ox.ac.uk/~vgg/data/flowers/102, with imagelabels.mat and "
                 "setid.mat beside it, in flowers-102/", "flowers-102/jpg/"),
        "345 MB", "not stated", LAYOUTS["flowers102"],
    ),
    "food101": Reader(
        open_food101, "data/food101", ("train", "test"),
        _command("food101", "food-101.tar.gz of data.vision.ee.ethz.ch/cvl", "food-101/"),
        "5.0 GB", "see license_agreement.txt in the archive", LAYOUTS["food101"],
    ),
    "cub": Reader(
        open_cub, "data/cub", ("train", "test"),
        _command("cub", "CUB_200_2011.tgz of data.caltech.edu/records/65de6-vp158",
                 "CUB_200_2011/ and attributes.txt"),
        "1.2 GB", "see its record at data.caltech.edu", CUB,
    ),
    "awa2": Reader(
        open_awa2, "data/awa2", ("train", "all", "test"),
        _command("awa2", "AwA2-data.zip of cvml.ista.ac.at/AwA2", "Animals_with_Attributes2/"),
        "13 GB", "each picture its own: see cvml.ista.ac.at/AwA2", AWA2,
    ),
    "clevr_change": Reader(
        open_clevr_change, "data/clevr_change", ("train", "val", "test"),
        "Fetch clevr_change.tar.gz by the link in README.md of github.com/Seth-Park/RobustChangeCaptioning and "
        "unpack it there; it makes data/.",
        "not stated", "not stated", CLEVR_CHANGE, may_miss=True,
    ),
    "spot_the_diff": Reader(
        open_spot_the_diff, "data/spot_the_diff",
        ("train", "val", "reformat_train", "reformat_val", "reformat_test", "test"),
        "Fetch train.json, val.json and test.json of data/annotations of github.com/harsh19/spot-the-diff, and "
        "resized_images by the link in its data/get_images.txt, and put them there.",
        "not stated", "not stated", SPOT_THE_DIFF, may_miss=True,
    ),
    "image_editing_request": Reader(
        open_image_editing_request, "data/image_editing_request", ("train", "val", "valid", "test"),
        "Fetch train.json, valid.json and test.json of data of github.com/airsplay/VisualRelationships, and the "
        "pictures by the link in its README.md, and put them there, the pictures in images/.",
        "not stated", "not stated", IMAGE_EDITING_REQUEST, may_miss=True,
    ),
    "changes": Reader(
        open_lines, "data/changes", ("train", "val", "test"),
        'Put SPLIT.jsonl there, a line {"before": path, "after": path, "sentences": [...]} for each change, with paths '
        "that are whole or begin in its own folder.",
        "yours", "yours", any_split=True, may_miss=True, is_table=is_lines,
    ),
}  # fmt: skip


def _reader(name: str) -> Reader:
    if name not in READERS:
        raise UserError(f"unknown data set {name!r}. {nearest(name, READERS)}")
    return READERS[name]


def open_dataset(
    name: str, root: str | Path | None = None, split: str | None = None, *, missing: str = "error"
) -> Dataset:
    """Open a data set by name.

    missing: what a caption file's absent pictures mean, "error", "skip" or "keep" (counted in the note).
    Raises UserError for an unknown name or split and for a data set that is not there, with what to fetch.
    """
    check_choice("missing", missing, ("error", "skip", "keep"))
    reader = _reader(name)
    split = split or (reader.splits[-1] if reader.splits else "")
    if reader.splits and split not in reader.splits and not reader.any_split:
        raise UserError(f"{name} has no split {split!r}. {nearest(split, reader.splits)}")
    folder = Path(root or reader.root or ".")
    lone = reader.is_table is not None and root is None and reader.is_table(Path(split))
    if reader.root is not None and not folder.is_dir() and not lone:
        raise UserError(f"{name} is not at {folder}. {reader.fetch} Then name the folder with --root (--data.root).")
    reader.layout.require(name, folder, reader.fetch)
    opener = partial(reader.open, missing=missing) if reader.may_miss else reader.open
    return opener(folder, split)


def held_out(data: Dataset) -> str | None:
    """The split to choose settings on: "val", else "train"; None where none is apart from `data`."""
    part = data.part or data.split
    if part == "all":
        return None  # every other split is inside it
    return next((s for s in (beside(data, "val"), beside(data, "train")) if s not in (None, part)), None)


def beside(data: Dataset, split: str) -> str | None:
    """The split of that name which belongs with `data`: beside reformat_test, "train" is reformat_train.

    None where there is no such, and for a file that was named by its path, of which none can know what belongs with it.
    """
    reader, part = READERS.get(data.name), data.part or data.split
    if reader is None or (reader.is_table and reader.is_table(Path(part))):
        return None
    found = f"{part.rpartition('_')[0]}_{split}".lstrip("_")
    return found if found in reader.splits and (reader.any_split or part in reader.splits) else None


def state(name: str, root: str | Path | None = None) -> str:
    """Whether a data set is there: "found", "not found", or "incomplete" with what is absent."""
    reader = _reader(name)
    if reader.root is None:
        return "found"
    folder = Path(root or reader.root)
    if not folder.is_dir():
        return "not found"
    missing = reader.layout.missing(folder)
    return f"incomplete: no {', '.join(missing)}" if missing else "found"


def download(name: str, root: str | Path | None = None) -> Path:
    """Fetch what a data set lacks, and unpack it; the folder it is in. What is there already is not fetched again.

    Raises UserError for a set that cannot be fetched by us, for a failed or damaged download, and where an
    incomplete copy is in the way.
    """
    reader = _reader(name)
    if name not in ARCHIVES:
        raise UserError(f"{name} cannot be downloaded. {reader.fetch} Known: {', '.join(sorted(ARCHIVES))}.")
    folder = Path(root or reader.root)
    if name != "coco" and folder.is_dir() and not reader.layout.missing(folder):
        return folder  # perhaps laid out in another way than our archives do it
    for archive in ARCHIVES[name]:
        archives.bring(archive, folder)
    reader.layout.require(name, folder, "What was fetched is not all; move it away and run the same command again.")
    return folder
