"""WebDatasets of CLIP_benchmark's layout: images and labels in tar files, read where they are.

ROOT/classnames.txt                             a line a class, by label
ROOT/zeroshot_classification_templates.txt      a line a prompt, with {c} for the class (may be absent)
ROOT/dataset_type.txt                           classification (or absent), or retrieval
ROOT/SPLIT/0.tar, 1.tar, ...                    members KEY.jpg, .jpeg, .png or .webp, and KEY.cls or KEY.txt
ROOT/SPLIT/nshards.txt                          how many shards there are (may be absent: then all of them)

To be embedded (`python -m pc_clip embeddings`) images alone will do, and tar files that lie in ROOT itself.
"""

from __future__ import annotations

import logging
import re
import tarfile
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from pc_clip.core.errors import UserError, check_choice
from pc_clip.data.dataset import Dataset, Question, decode_image, digest, stat, unreadable
from pc_clip.data.layout import Layout

log = logging.getLogger(__name__)

LAYOUT = Layout((), ("*/*.tar",))
IMAGES = ("webp", "png", "jpg", "jpeg")  # in the order in which CLIP_benchmark looks for them
END = 2 * tarfile.BLOCKSIZE + tarfile.RECORDSIZE  # bytes of zeros that a tar file ends with, at most


class Place(NamedTuple):
    """Where the bytes of a member are."""

    shard: Path
    name: str
    offset: int
    size: int


class Members(NamedTuple):
    """What a tar file holds. places: key -> ending -> where; texts: by key; images: names of all that end as one."""

    places: dict[str, dict[str, Place]]
    texts: dict[str, str]
    images: list[str]


class Sample(NamedTuple):
    """An image, and what stands beside it: the text of its .cls or .txt."""

    image: Place
    text: str


def open_webdataset(root: Path, split: str) -> Dataset:
    """One split: a question by class for classification, captions for retrieval."""
    kind = _kind(root)
    shards = _shards(root, split)
    beside = "txt" if kind == "retrieval" else "cls"
    samples = [sample for shard in shards for sample in read_shard(shard, beside)]
    if not samples:
        raise UserError(f"the shards in {root / split} hold no images")
    captions = None
    if kind == "retrieval":
        captions = [tuple(" ".join(t.split()) for t in sample.text.splitlines() if t.strip()) for sample in samples]
        if () in captions:
            raise UserError(f"{_name(samples[captions.index(())].image)} has no caption")
    return Dataset(
        name="webdataset",
        split=f"{root.resolve().name}-{split}",
        ids=_ids(samples),
        load=partial(_load, [sample.image for sample in samples]),
        fingerprint=fingerprint(root, shards),
        captions=captions,
        questions=() if captions else (_question(root, samples),),
        part=split,
    )


def fingerprint(root: Path, shards: list[Path]) -> str:
    """Of a split: its kind, and the names, sizes and times of its tar files."""
    return digest(_kind(root), [(shard.name, *stat(shard)) for shard in shards])


def find_tars(root: Path, split: str | None) -> tuple[str, list[Path]]:
    """The tar files to embed, in order, and how the set is called; none of them is opened.

    split: a folder in ROOT; None or empty for the tar files in ROOT itself, or where there are none, for "train".
    Raises UserError where there are none.
    """
    if not root.is_dir():
        raise UserError(f"webdataset is not at {root}; name the folder of the tar files with --data.root")
    loose = _in_order(root.glob("*.tar"))
    if loose and not split:
        return root.resolve().name, loose
    split = split or "train"
    if loose and not any((root / split).glob("*.tar")):
        raise UserError(f"{root} has no split {split!r}; its tar files lie in {root} itself: --data.split null")
    return f"{root.resolve().name}-{split}", _shards(root, split)


def open_tar(shard: Path) -> Dataset:
    """The images of one tar file, whatever stands beside them. Raises UserError as `read_shard` does."""
    samples = read_shard(shard, None)
    return Dataset(
        name="webdataset",
        split=shard.stem,
        ids=_ids(samples),
        load=partial(_load, [sample.image for sample in samples]),
        fingerprint=digest(shard.name, *stat(shard)),
    )


def unopened(root: Path, split: str | None) -> Dataset:
    """What can be said of a WebDataset without opening a tar file, for those who have its embeddings already.

    The files are listed, and their sizes and times looked at. Raises UserError as `find_tars` does.
    """
    label, shards = find_tars(root, split)
    return Dataset("webdataset", label, [], _not_opened, fingerprint(root, shards), part=split or "")


def _not_opened(row: int) -> Image.Image:
    raise UserError("the tar files of this data set were not opened, because its embeddings were given")


def _ids(samples: list[Sample]) -> list[str]:
    return [f"{place.shard.stem}/{place.name}" for place, _ in samples]


def read_shard(shard: Path, beside: str | None) -> list[Sample]:
    """The samples of a tar file in their order; only headers and texts are read.

    beside: the ending of the text that each image needs; None: they need none, and their texts are empty. Images that
    the layout does not know are counted in the log. Raises UserError for a tar file that does not end where it must,
    and for an image without its text or the other way round.
    """
    places, texts, images = _read_members(shard, beside)
    samples = []
    for key, endings in places.items():
        image = next((endings[e] for e in IMAGES if e in endings), None)
        if image is None and beside not in endings:
            continue
        if beside is None:
            samples.append(Sample(image, ""))
            continue
        if image is None or beside not in endings:
            lacks = f"{key}.{beside}" if image else f"the image of {key} ({', '.join(IMAGES)})"
            raise UserError(f"{shard} lacks {lacks}; it has {key}.{next(iter(endings))}")
        samples.append(Sample(image, texts[key]))
    _say_what_is_left(shard, images, samples)
    return samples


def _read_members(shard: Path, beside: str | None) -> Members:
    """The members of a tar file by key and ending, as webdataset has them: an ending begins at a name's first dot."""
    places, texts, images = found = Members({}, {}, [])
    try:
        with tarfile.open(shard, "r:") as tar:
            for member in tar:
                parts = re.fullmatch(r"((?:.*/)?[^./][^./]*)\.([^/]*)", member.name)
                if member.isdir() or parts is None or re.match(r"__[^/]*__($|/)", member.name):
                    continue
                key, ending = parts[1], parts[2].lower()
                images += [member.name] if ending.rpartition(".")[2] in IMAGES else []
                if not member.isreg():
                    continue
                if ending in places.setdefault(key, {}):
                    raise UserError(f"{shard} has two members {member.name}; write the tar again with each name once")
                places[key][ending] = Place(shard, member.name, member.offset_data, member.size)
                if ending == beside:
                    texts[key] = tar.extractfile(member).read().decode("utf-8")
            _check_end(tar)
    except (tarfile.TarError, EOFError, ValueError) as error:
        raise UserError(f"{shard} is cut short or no tar file ({error}); fetch it again") from error
    except OSError as error:
        raise unreadable(shard, error) from error
    return found


def _check_end(tar: tarfile.TarFile) -> None:
    """Raises ReadError unless zeros end a tar file where its members do. tarfile takes anything there for the end."""
    tar.fileobj.seek(tar.offset)
    rest = tar.fileobj.read(END + 1)
    if len(rest) < tarfile.BLOCKSIZE or any(rest):
        raise tarfile.ReadError(f"no end where one must be, at byte {tar.offset}")
    if len(rest) > END:  # a download that had its space set aside
        raise tarfile.ReadError(f"nothing but zeros from byte {tar.offset}, more than tar writes at an end")


def _say_what_is_left(shard: Path, images: Sequence[str], samples: list[Sample]) -> None:
    used = {sample.image.name for sample in samples}
    if left := [name for name in images if name not in used]:
        log.warning(
            "%s: %d images are passed over, first %s. A WebDataset has one image a key, with one dot in its name, "
            "and no links.", shard, len(left), left[0],
        )  # fmt: skip


def _load(places: list[Place], row: int) -> Image.Image:
    place = places[row]
    try:
        with place.shard.open("rb") as file:
            file.seek(place.offset)
            content = file.read(place.size)
    except FileNotFoundError as error:
        raise UserError(f"no file at {place.shard}") from error
    except OSError as error:
        raise unreadable(place.shard, error) from error
    if len(content) < place.size:
        raise UserError(f"{place.shard} has become shorter since it was opened; run the same command again")
    return decode_image(content, _name(place))


def _name(place: Place) -> str:
    return f"{place.shard}: {place.name}"


def _question(root: Path, samples: list[Sample]) -> Question:
    path = root / "classnames.txt"
    if not path.is_file():
        raise UserError(f"no class names at {path}: a line a class, in the order of the labels")
    classes = [line.strip() for line in _text(path).splitlines()]
    if "" in classes or not classes:
        raise UserError(f"{path} line {classes.index('') + 1 if classes else 1} is blank; each line names a class")
    target = []
    for image, text in samples:
        if not text.strip().isdecimal() or int(text) >= len(classes):
            raise UserError(f"{_name(image)} has the label {text.strip()[:20]!r}; {path} names 0 to {len(classes) - 1}")
        target.append(int(text))
    return Question(
        "class", tuple(classes), np.arange(len(samples)), np.array(target, dtype=np.int64), several=_templates(root)
    )


def _templates(root: Path) -> tuple[str, ...]:
    """The set's own prompts, with {} where the file has {c}; none where there is no file."""
    path = root / "zeroshot_classification_templates.txt"
    if not path.is_file():
        return ()
    found = [(n, line.strip().replace("{c}", "{}")) for n, line in enumerate(_text(path).splitlines(), 1)]
    for n, template in found:
        if template and (template.count("{}") != 1 or re.search(r"[{}]", template.replace("{}", ""))):
            raise UserError(f"{path} line {n}: a prompt needs {{c}} once, for the class, and no other braces")
    return tuple(template for _, template in found if template)


def has_captions(root: Path) -> bool:
    """Whether a WebDataset says that captions stand beside its images. Raises UserError for a kind it cannot be."""
    return _kind(root) == "retrieval"


def _kind(root: Path) -> str:
    path = root / "dataset_type.txt"
    kind = _text(path).strip().lower() if path.is_file() else "classification"
    check_choice(str(path), kind, ("classification", "retrieval"))
    return kind


def _shards(root: Path, split: str) -> list[Path]:
    folder = root / split
    there = {path.name: path for path in folder.glob("*.tar")}
    if not there:
        splits = sorted({path.parent.name for path in root.glob("*/*.tar")})
        raise UserError(f"{root} has no split {split!r}; splits found there: {', '.join(splits) or 'none'}")
    counted = folder / "nshards.txt"
    if not counted.is_file():
        return _in_order(there.values())
    text = _text(counted).strip()
    if not text.isdecimal() or not int(text):
        raise UserError(f"{counted} must hold the number of shards, found {text[:20]!r}")
    names = [f"{n}.tar" for n in range(int(text))]
    if absent := [name for name in names if name not in there]:
        raise UserError(f"{len(absent)} of the {len(names)} shards that {counted} counts are absent, first {absent[0]}")
    return [there[name] for name in names]


def _in_order(shards: Iterable[Path]) -> list[Path]:
    return sorted(shards, key=lambda path: (len(path.name), path.name))  # 2.tar before 10.tar


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is no text ({error})") from error
