"""Data sets of labelled images, most of which torchvision reads. Their classes are named by `classnames/`."""

from __future__ import annotations

import gzip
import hashlib
import json
import math
import zlib
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pc_clip.core.errors import UserError
from pc_clip.data import hash_split
from pc_clip.data.classnames import class_names
from pc_clip.data.dataset import Dataset, Question, digest, read_file, stat_images, unreadable
from pc_clip.data.layout import Layout

BATCHES = tuple(f"data_batch_{n}" for n in range(1, 6))
MNIST_FILES = tuple(f"{part}-{kind}-ubyte" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1"))
MNIST_PROMPT = 'a photo of the number: "{}".'  # CLIP's own for this set
LAYOUTS = {
    "cifar10": Layout(("cifar-10-batches-py",), (*BATCHES, "test_batch", "batches.meta")),
    "cifar100": Layout(("cifar-100-python",), ("train", "test", "meta")),
    "mnist": Layout(("MNIST/raw", "raw"), tuple(f"{name}|{name}.gz" for name in MNIST_FILES)),
    "eurosat": Layout(("2750", "eurosat/2750", "EuroSAT_RGB"), ("*/*.jpg",)),
    "sun397": Layout(("SUN397",), ("ClassName.txt", "*/*")),
    "flowers102": Layout(("flowers-102",), ("jpg", "imagelabels.mat", "setid.mat")),
    "food101": Layout(("food-101",), ("images", "meta/train.json", "meta/test.json")),
}


def open_cifar(kind: str, root: Path, split: str) -> Dataset:
    """CIFAR10 or CIFAR100 in the pickles they are published as, whose checksums torchvision checks first."""
    from pc_clip.models.torchvision_compat import torchvision

    name = kind.lower()
    folder = LAYOUTS[name].folder(root)
    try:
        data = getattr(torchvision.datasets, kind)(_above(name, folder), train=split == "train", download=False)
    except RuntimeError as error:
        raise UserError(f"a file in {folder} is damaged: its checksum is wrong. Fetch {name} again.") from error
    names = class_names(name)
    target = np.asarray(data.targets, dtype=np.int64)
    question = Question("class", names.say(data.classes), np.arange(len(data)), target, several=names.several)
    return Dataset(
        name=name,
        split=split,
        ids=[str(i) for i in range(len(data))],
        load=partial(_read_torchvision, data),
        fingerprint=digest(kind, split, len(data), hashlib.sha256(data.data.tobytes()).hexdigest(), data.targets),
        questions=(question,),
        part=split,
    )


def _read_torchvision(data: Any, row: int) -> Image.Image:
    return data[row][0].convert("RGB")


def open_mnist(root: Path, split: str) -> Dataset:
    """MNIST in the four files it is published as, packed or unpacked. Its classes are the digits, "0" to "9"."""
    folder = LAYOUTS["mnist"].folder(root)
    part = "train" if split == "train" else "t10k"
    images, path = _read_idx(folder, f"{part}-images-idx3-ubyte", 3)
    labels, labels_path = _read_idx(folder, f"{part}-labels-idx1-ubyte", 1)
    if len(images) != len(labels) or not len(labels):
        raise UserError(f"{path} has {len(images)} images and {labels_path} {len(labels)} labels; fetch both again")
    if labels.max() > 9:
        raise UserError(f"{labels_path} has the label {labels.max()}; the digits are 0 to 9")
    digits = tuple(map(str, range(10)))
    target = labels.astype(np.int64)
    return Dataset(
        name="mnist",
        split=split,
        ids=[str(i) for i in range(len(images))],
        load=partial(_read_array, images),
        fingerprint=digest(split, images.shape, hashlib.sha256(images.tobytes()).hexdigest(), target.tolist()),
        questions=(Question("class", digits, np.arange(len(target)), target, several=(MNIST_PROMPT,)),),
        part=split,
    )


def _read_idx(folder: Path, name: str, dimensions: int) -> tuple[np.ndarray, Path]:
    """An array in MNIST's format (0, 0, 8, how many dimensions, each as four bytes, the values), and its file."""
    path = next(p for p in (folder / name, folder / f"{name}.gz") if p.exists())
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise UserError(f"{path} is damaged ({error}); fetch it again") from error
    except OSError as error:
        raise unreadable(path, error) from error
    start = 4 + 4 * dimensions
    shape = [int.from_bytes(content[n : n + 4], "big") for n in range(4, start, 4)]
    if content[:4] != bytes((0, 0, 8, dimensions)) or len(content) != start + math.prod(shape):
        raise UserError(f"{path} is damaged, or no file of MNIST; fetch it again")
    return np.frombuffer(content, dtype=np.uint8, offset=start).reshape(shape), path


def _read_array(images: np.ndarray, row: int) -> Image.Image:
    return Image.fromarray(images[row]).convert("RGB")


def open_eurosat(root: Path, split: str) -> Dataset:
    """A part of our own 90/10 split: the set has none. Its ten folders are the classes."""
    from pc_clip.models.torchvision_compat import torchvision

    folder = LAYOUTS["eurosat"].folder(root)
    try:
        data = torchvision.datasets.ImageFolder(str(folder), loader=Path)
    except FileNotFoundError as error:  # a class folder without images
        raise UserError(f"{folder}: {str(error).split('. Supp')[0]}. Unpack the archive again.") from error
    files = [Path(file) for file, _ in data.samples]
    return _random_tenth("eurosat", split, folder, folder, files, data.targets, data.classes)


def open_sun397(root: Path, split: str) -> Dataset:
    """A part of our own 90/10 split, as the paper made one; the classes are the lines of ClassName.txt."""
    from pc_clip.models.torchvision_compat import torchvision

    folder = LAYOUTS["sun397"].folder(root)
    listed_in = folder / "ClassName.txt"
    try:
        data = torchvision.datasets.SUN397(_above("sun397", folder), loader=Path)
    except KeyError as error:
        raise UserError(f"{folder} has images of {error.args[0]!r}, which is no class of {listed_in}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{listed_in} is no text ({error})") from error
    files, target = _without_reading(data)
    if empty := set(range(len(data.classes))) - set(target):
        line = min(empty)
        raise UserError(
            f"{listed_in} line {line + 1}: {data.classes[line] or 'a blank line'} has no images in {folder}"
        )
    own = [f"/{name[0]}/{name}" for name in data.classes]  # torchvision takes the letter away
    return _random_tenth("sun397", split, folder, listed_in, files, target, own)


def open_flowers102(root: Path, split: str) -> Dataset:
    """The official split; the labels' names are those torchvision lists."""
    from pc_clip.models.torchvision_compat import torchvision

    folder = LAYOUTS["flowers102"].folder(root)
    try:
        data = torchvision.datasets.Flowers102(_above("flowers102", folder), split, loader=Path)
    except RuntimeError as error:
        raise UserError(
            f"imagelabels.mat or setid.mat in {folder} is damaged: its checksum is wrong. Fetch it again."
        ) from error
    except KeyError as error:
        raise UserError(
            f"{folder / 'setid.mat'} puts image {error.args[0]} into {split}, but {folder / 'imagelabels.mat'} has no "
            "label of that image. Fetch both again."
        ) from error
    files, target = _without_reading(data)
    if wrong := [label for label in target if not 0 <= label < len(data.classes)]:
        raise UserError(f"{folder / 'imagelabels.mat'} has the label {wrong[0] + 1}; there are {len(data.classes)}")
    return _photographs("flowers102", split, folder, folder / "setid.mat", files, target, data.classes)


def open_food101(root: Path, split: str) -> Dataset:
    """The official split, from meta/train.json and meta/test.json."""
    from pc_clip.models.torchvision_compat import torchvision

    folder = LAYOUTS["food101"].folder(root)
    listed = {part: _read_food(folder / "meta" / f"{part}.json") for part in ("train", "test")}
    if one_sided := listed["train"].keys() ^ listed["test"].keys():
        raise UserError(f"{folder / 'meta'}: {min(one_sided)} is in train.json or test.json alone")
    twice = {i for images in listed["train"].values() for i in images} & {
        i for images in listed["test"].values() for i in images
    }
    if twice:
        raise UserError(f"{folder / 'meta'}: {min(twice)} is in train.json and in test.json")
    data = torchvision.datasets.Food101(_above("food101", folder), split, loader=Path)
    files, target = _without_reading(data)
    return _photographs("food101", split, folder, folder / "meta" / f"{split}.json", files, target, data.classes)


def _read_food(path: Path) -> dict[str, list[str]]:
    """class -> its images "CLASS/NUMBER"."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not JSON ({error}); fetch the archive again") from error
    if not isinstance(found, dict) or not all(isinstance(images, list) and images for images in found.values()):
        raise UserError(f"{path} must say for each class which images it has, at least one")
    for name, images in found.items():
        if wrong := [i for i in images if not isinstance(i, str) or i.split("/")[0] != name]:
            raise UserError(f"{path} counts {wrong[0]} among the images of {name}")
    return found


# -- what they share ----------------------------------------------------------------------------------


def _above(name: str, folder: Path) -> Path:
    """What torchvision calls the root. Raises UserError when the folder has another name than it insists on."""
    if folder.name not in LAYOUTS[name].folders:
        raise UserError(f"{folder} must be called {LAYOUTS[name].folders[0]}, as the archive has it; rename it")
    return folder.parent


def _without_reading(data: Any) -> tuple[list[Path], list[int]]:
    """Files and labels of a torchvision data set that was made with `loader=Path`."""
    pairs = [data[row] for row in range(len(data))]
    return [path for path, _ in pairs], [int(label) for _, label in pairs]


def _random_tenth(
    name: str, part: str, folder: Path, listed_in: Path, files: Sequence[Path], target: Sequence[int], own: list[str]
) -> Dataset:
    """As `_photographs`, for a set that is split by us."""
    order = sorted(range(len(files)), key=lambda row: files[row].relative_to(folder).as_posix())
    kept = hash_split.split_rows([files[row].relative_to(folder).as_posix() for row in order], part)
    rows = [order[n] for n in kept]
    return _photographs(name, part, folder, listed_in, [files[r] for r in rows], [target[r] for r in rows], own, True)


def _photographs(
    name: str, part: str, folder: Path, listed_in: Path, files: Sequence[Path], target: Sequence[int], own: list[str],
    ours: bool = False,
) -> Dataset:  # fmt: skip
    """A data set of image files with a label each. own: the set's names of the labels; ours: whether we split it."""
    if not files:
        raise UserError(f"{listed_in} puts no image into {part}")
    names = class_names(name)
    rows, labels = np.arange(len(files)), np.array(target, dtype=np.int64)
    ids = [path.relative_to(folder).as_posix() for path in files]
    return Dataset(
        name=name,
        split=hash_split.split_label(part) if ours else part,
        ids=ids,
        load=partial(read_file, list(files)),
        fingerprint=digest(part, own, list(target), *zip(ids, stat_images(files, listed_in))),
        questions=(Question("class", names.say(own), rows, labels, several=names.several),),
        note=hash_split.split_note(part) if ours else "",
        part=part,
    )
