"""WebDatasets of CLIP_benchmark's layout: images and labels in tar files, read where they are.

ROOT/classnames.txt                             a line a class, by label
ROOT/zeroshot_classification_templates.txt      a line a prompt, with {c} for the class (may be absent)
ROOT/dataset_type.txt                           classification or retrieval (absent: retrieval without classnames)
ROOT/SPLIT/0.tar, 1.tar, ...                    members KEY.jpg, .jpeg, .png or .webp, and KEY.cls or KEY.txt
ROOT/SPLIT/nshards.txt                          how many shards there are (may be absent: then all of them)

The folder of img2dataset's tars is a split: --root ITS_PARENT --split ITS_NAME.
To be embedded (`python -m pc_clip embeddings`) images alone will do, and tar files that lie in ROOT itself. The package
webdataset reads tar files from front to back; an index of offsets lets images be read in any order.
"""

from __future__ import annotations

import dataclasses
import logging
import re
import tarfile
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from pc_clip.core.errors import UserError, check_choice
from pc_clip.data.dataset import Dataset, Question, decode_image, digest, unreadable
from pc_clip.data.text_files import read_text

log = logging.getLogger(__name__)

IMAGES = ("webp", "png", "jpg", "jpeg")  # in the order in which CLIP_benchmark looks for them
MEMBER = re.compile(r"((?:.*/)?[^./][^./]*)\.([^/]*)")  # key and ending, which begins at a name's first dot


class Sample(NamedTuple):
    """Where the bytes of an image are, and the text of the .cls or .txt beside it."""

    shard: Path
    name: str
    offset: int
    size: int
    text: str

    def __str__(self) -> str:
        return f"{self.shard}: {self.name}"


def open_webdataset(root: Path, split: str, missing: str = "error") -> Dataset:
    """One split: a question by class for classification, captions for retrieval.

    missing: what a sample without its picture or its text means, "error", or "skip": left out and counted.
    """
    retrieval = has_captions(root)
    shards, skipped = _shards(root, split), [] if missing != "error" else None
    samples = [sample for shard in shards for sample in read_shard(shard, "txt" if retrieval else "cls", skipped)]
    if not samples:
        raise UserError(f"the shards in {root / split} hold no images")
    data = _data_set(f"{root.resolve().name}-{split}", samples, fingerprint(root, shards))
    if skipped:
        note = f"{len(skipped)} samples without a picture or a text are left out, first: {skipped[0]}"
        data = dataclasses.replace(data, note=note)
    if not retrieval:
        return dataclasses.replace(data, questions=(_question(root, samples),), part=split)
    captions = [tuple(" ".join(t.split()) for t in sample.text.splitlines() if t.strip()) for sample in samples]
    if () in captions:
        raise UserError(f"{samples[captions.index(())]} has no caption")
    return dataclasses.replace(data, captions=captions, part=split)


def _data_set(label: str, samples: list[Sample], known_by: str) -> Dataset:
    ids = [f"{sample.shard.stem}/{sample.name}" for sample in samples]
    return Dataset("webdataset", label, ids, partial(_load, samples), known_by)


def fingerprint(root: Path, shards: list[Path]) -> str:
    """Digest of a split: its kind, and the names, sizes and times of its tar files."""
    return digest("retrieval" if has_captions(root) else "classification", [stamp(shard) for shard in shards])


def stamp(shard: Path) -> tuple[str, int, int]:
    """A tar file's name, size and time of change (ns)."""
    status = shard.stat()
    return shard.name, status.st_size, status.st_mtime_ns


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
    return f"{root.resolve().name}-{split or 'train'}", _shards(root, split or "train")


def open_tar(shard: Path) -> Dataset:
    """The images of one tar file, whatever stands beside them. Raises UserError as `read_shard` does."""
    return _data_set(shard.stem, read_shard(shard, None), digest(*stamp(shard)))


def unopened(root: Path, split: str | None) -> Dataset:
    """A WebDataset without images, of which no tar file is opened, for use with precomputed embeddings.

    The files are listed, and their sizes and times looked at. Raises UserError as `find_tars` does.
    """
    label, shards = find_tars(root, split)
    return dataclasses.replace(_data_set(label, [], fingerprint(root, shards)), part=split or "")


def read_shard(shard: Path, beside: str | None, skipped: list[str] | None = None) -> list[Sample]:
    """The samples of a tar file in their order; only headers and texts are read.

    beside: the ending of the text that each image needs; None: they need none, and their texts are empty. skipped: gets
    what is said of samples that lack one of the two, instead of an error. Images that
    the layout does not know are counted in the log. Raises UserError for a tar file that does not end where it must,
    and for an image without its text or the other way round.
    """
    members, texts, images = {}, {}, []  # key -> ending -> member; key -> text; names of all that end as images
    try:
        with tarfile.open(shard, "r:") as tar:
            for member in tar:
                parts = MEMBER.fullmatch(member.name)
                if parts is None or member.isdir():
                    continue
                key, ending = parts[1], parts[2].lower()
                if ending.rpartition(".")[2] in IMAGES:
                    images.append(member.name)
                if member.isreg():
                    if ending in members.setdefault(key, {}):
                        raise UserError(f"{shard} has two members {member.name}; write the tar with each name once")
                    members[key][ending] = member
                    if ending == beside:
                        texts[key] = read_text(shard / member.name, tar.extractfile(member).read())
            tar.fileobj.seek(tar.offset)
            end = tar.fileobj.read(2 * tarfile.BLOCKSIZE)
            if len(end) < tarfile.BLOCKSIZE or any(end):  # tarfile takes anything there for the end
                raise tarfile.ReadError(f"no end where one must be, at byte {tar.offset}")
    except (tarfile.TarError, EOFError, ValueError) as error:
        raise UserError(f"{shard} is cut short or no tar file ({error}); fetch it again") from error
    except OSError as error:
        raise unreadable(shard, error) from error
    samples = []
    for key, endings in members.items():
        image = next((endings[ending] for ending in IMAGES if ending in endings), None)
        if beside and (image is None) != (beside not in endings):
            lacks = f"{key}.{beside}" if image else f"the image of {key} ({', '.join(IMAGES)})"
            fault = f"{shard} lacks {lacks}; it has {key}.{next(iter(endings))}"
            if skipped is None:
                raise UserError(f"{fault}. --data.missing skip (--missing for run.py) leaves such samples out")
            skipped.append(fault)
        elif image and beside == "txt" and not texts[key].strip() and skipped is not None:
            skipped.append(f"{shard}: {key}.txt is empty")
        elif image:
            samples.append(Sample(shard, image.name, image.offset_data, image.size, texts.get(key, "")))
    if passed := sorted(set(images) - {sample.name for sample in samples}):
        log.warning(
            "%s: %d images are passed over, first %s. A WebDataset has one image a key, with one dot in its name, "
            "and no links.", shard, len(passed), passed[0],
        )  # fmt: skip
    return samples


def _load(samples: list[Sample], row: int) -> Image.Image:
    sample = samples[row]
    try:
        with sample.shard.open("rb") as file:
            file.seek(sample.offset)
            content = file.read(sample.size)
    except OSError as error:
        raise unreadable(sample.shard, error) from error
    if len(content) < sample.size:
        raise UserError(f"{sample.shard} has become shorter since it was opened; run the same command again")
    return decode_image(content, str(sample))


def _question(root: Path, samples: list[Sample]) -> Question:
    path = root / "classnames.txt"
    classes = [line.strip() for line in read_text(path).splitlines()]
    if not all(classes):
        raise UserError(f"{path} line {classes.index('') + 1} is blank; each line names a class")
    for sample in samples:
        if not sample.text.strip().isdecimal() or int(sample.text) >= len(classes):
            label = sample.text.strip()[:20]
            raise UserError(f"{sample} has the label {label!r}; {path} names 0 to {len(classes) - 1}")
    target = np.array([int(sample.text) for sample in samples], dtype=np.int64)
    path = root / "zeroshot_classification_templates.txt"
    lines = [line.strip() for line in read_text(path).splitlines()] if path.is_file() else []
    prompts = tuple(line.replace("{c}", "{}") for line in lines if line)
    if wrong := [prompt for prompt in prompts if prompt.count("{}") != 1 or prompt.count("{") + prompt.count("}") != 2]:
        raise UserError(f"{path}: {wrong[0]!r} needs {{c}} once, for the class, and no other braces")
    return Question("class", tuple(classes), np.arange(len(samples)), target, several=prompts)


def has_captions(root: Path) -> bool:
    """Whether images have captions: as dataset_type.txt says, or without it, where no classnames.txt names classes.

    Raises UserError for a kind it cannot be.
    """
    path, usual = root / "dataset_type.txt", "classification" if (root / "classnames.txt").is_file() else "retrieval"
    kind = read_text(path).strip().lower() if path.is_file() else usual
    check_choice(str(path), kind, ("classification", "retrieval"))
    return kind == "retrieval"


def _shards(root: Path, split: str) -> list[Path]:
    folder = root / split
    shards = _in_order(folder.glob("*.tar"))
    if not shards:
        splits = sorted({path.parent.name for path in root.glob("*/*.tar")})
        loose = "; to embed the tar files in the folder itself, --data.split null" if any(root.glob("*.tar")) else ""
        raise UserError(f"{root} has no split {split!r}; splits found there: {', '.join(splits) or 'none'}{loose}")
    counted = folder / "nshards.txt"
    if counted.is_file() and read_text(counted).strip() != str(len(shards)):
        raise UserError(f"{folder} has {len(shards)} tar files, and {counted} says {read_text(counted).strip()[:20]!r}")
    return shards


def _in_order(shards: Iterable[Path]) -> list[Path]:
    return sorted(shards, key=lambda path: (len(path.name), path.name))  # 2.tar before 10.tar
