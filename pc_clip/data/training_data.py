"""The data set a run trains on, built from its settings: captions, mixed-in images, broken images dropped."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import PIL
from accelerate import PartialState
from PIL import Image
from tqdm import tqdm

from pc_clip.core import cache
from pc_clip.core.errors import UserError, check_choice
from pc_clip.core.random import stream
from pc_clip.data.captions import read_captions
from pc_clip.data.dataset import Dataset, digest, subset
from pc_clip.data.images import broken_images
from pc_clip.data.registry import READERS, open_dataset
from pc_clip.data.views import ImageIds
from pc_clip.data.webdataset import has_captions, unopened

if TYPE_CHECKING:
    from pc_clip.core.config.settings import DataConfig, MixConfig


def load_dataset(data: DataConfig, seed: int = 0) -> Dataset:
    """The data a run learns from: its first split, train, unless another is named; with what is mixed into it.

    seed: of the images that are mixed in. The note counts what was mixed in and what was left out.
    Raises UserError for settings that do not fit and for data that are not there.
    """
    check_choice("data.broken", data.broken, ("error", "skip"))
    if data.embeddings and data.mix:
        raise UserError("data.embeddings holds one data set's images, so that data.mix has none to add; drop one")
    if data.embeddings and data.broken == "skip":
        raise UserError("data.embeddings stands in for the pictures: leave data.broken skip out, none is decoded")
    if data.embeddings and data.dataset == "webdataset":
        root = Path(data.root or READERS["webdataset"].root)
        if data.captions or not has_captions(root):  # its tars may be too many to open, or hold images alone
            captions = read_captions(data.captions) if data.captions else {}
            texts = [texts for _, texts in captions.values()] or None
            return dataclasses.replace(unopened(root, data.split), ids=list(captions), captions=texts)
    missing = "keep" if data.embeddings else data.missing  # the pictures are not read
    main = dataset = _open(data.dataset, data.root, data.split, missing, data.upright)
    if data.captions:
        dataset = _with_captions(dataset, data.captions)
    if data.mix:
        dataset = _mixed(dataset, data.mix, missing, seed, main.fingerprint)
    return _without_broken(dataset, data.workers) if data.broken == "skip" else dataset


def _open(name: str, root: str | None, split: str | None, missing: str, upright: bool | None = None) -> Dataset:
    splits = READERS[name].splits if name in READERS else ()
    return open_dataset(name, root, split or next(iter(splits), None), missing=missing, upright=upright)


def _with_captions(data: Dataset, path: str) -> Dataset:
    """The images that a file has captions of, with those captions."""
    captions, ids = read_captions(path), ImageIds(data.ids, data.label)
    texts: dict[int, tuple[str, ...]] = {}
    absent = 0
    for key, (_, of_key) in captions.items():
        if (row := ids.find(key)) is not None:
            texts[row] = texts.get(row, ()) + of_key
        else:
            absent += 1
    if not texts:
        raise UserError(f"{path} has captions of {len(captions)} images, none of which is in {data.label}")
    rows = np.array(sorted(texts), dtype=np.int64)
    note = f"{absent} images of {Path(path).name} are not in {data.label}" if absent else ""
    data = _note(_note(subset(data, rows), captions.note), note)
    return dataclasses.replace(data, captions=[texts[row] for row in rows.tolist()])


def _note(data: Dataset, note: str) -> Dataset:
    return dataclasses.replace(data, note="; ".join(filter(None, (data.note, note))))


def _mixed(main: Dataset, mix: Sequence[MixConfig], missing: str, seed: int, fingerprint: str) -> Dataset:
    """A data set with images of others after its own. What is asked about its own images stays as it was.

    fingerprint: of the data set that `main` was taken from, which is not mixed in again.
    """
    if not main.captions:
        raise UserError(
            f"data.mix adds images with captions, and {main.label} has none; name a file of them with --data.captions"
        )
    parts, names, used = [main], [], {fingerprint}
    for number, entry in enumerate(mix):
        data = _open(entry.dataset, entry.root, entry.split, missing)
        if data.fingerprint in used:
            raise UserError(f"data.mix names {data.label}, which is learnt from already; name another split or set")
        used.add(data.fingerprint)
        names.append(entry.dataset)
        prefix = entry.dataset if names.count(entry.dataset) == 1 else f"{entry.dataset}-{names.count(entry.dataset)}"
        drawn = _drawn(data, entry, stream(seed, "mix", number))
        parts.append(dataclasses.replace(drawn, ids=[f"{prefix}:{key}" for key in drawn.ids]))
    ids = [key for part in parts for key in part.ids]
    if len(set(ids)) < len(ids):
        raise UserError(f"{main.label} has images that are called like some of data.mix, with a colon; rename them")
    unknown = np.full(len(ids) - len(main), np.nan)
    data = dataclasses.replace(
        main,
        ids=ids,
        load=partial(_load_of, [part.load for part in parts], np.cumsum([len(part) for part in parts])),
        fingerprint=digest(*[(part.fingerprint, part.ids) for part in parts]),
        captions=[texts for part in parts for texts in part.captions],
        attributes=tuple(dataclasses.replace(a, value=np.concatenate([a.value, unknown])) for a in main.attributes),
    )
    for part in parts[1:]:
        data = _note(data, f"{len(part)} images of {part.label} mixed in{f' ({part.note})' if part.note else ''}")
    return data


def _drawn(data: Dataset, entry: MixConfig, rng: np.random.Generator) -> Dataset:
    """n images drawn from a data set, with captions. Of the same seed fewer are among more."""
    if entry.caption.count("{}") != 1:
        raise UserError(f"data.mix: the caption {entry.caption!r} needs exactly one {{}}, for the class")
    usable = np.arange(len(data))
    if not data.captions:
        if not data.questions:
            raise UserError(f"data.mix: nothing is known of the images of {data.label}, neither captions nor classes")
        question, captions = data.questions[0], [()] * len(data)
        for row, k in zip(question.rows.tolist(), question.target.tolist()):
            captions[row] = (entry.caption.replace("{}", question.classes[k]),)
        usable = np.unique(question.rows)
        data = dataclasses.replace(data, captions=captions)
    if not 1 <= entry.n <= len(usable):
        raise UserError(f"data.mix asks for {entry.n} images of {data.label}, which has {len(usable)}")
    return subset(data, np.sort(rng.permutation(usable)[: entry.n]))


def _load_of(loads: list[Any], ends: np.ndarray, row: int) -> Image.Image:
    part = int(np.searchsorted(ends, row, side="right"))
    return loads[part](row - int(ends[part - 1]) if part else row)


def _without_broken(data: Dataset, workers: int) -> Dataset:
    """The images that decode. Which do not is remembered, as long as the files stay as they are."""

    def look() -> dict[str, np.ndarray]:
        with tqdm(desc=f"decoding {data.label}", total=len(data), unit=" images", leave=False, disable=None) as bar:
            return {"rows": np.array(list(broken_images(data, workers, bar.update)), dtype=np.int64)}

    key = {"images": data.fingerprint, "Pillow": PIL.__version__}  # another one may decode what this one does not
    with PartialState().main_process_first():  # the others then find it in the cache
        broken = cache.cached("broken", key, look)["rows"]
    if not len(broken):
        return data
    first = next(iter(broken_images(subset(data, broken[:1]), 0).values()), "")
    if len(broken) == len(data):
        raise UserError(f"none of the {len(data)} pictures of {data.label} can be used: {first}")
    whole = subset(data, np.setdiff1d(np.arange(len(data)), broken))
    whole = dataclasses.replace(whole, left_out=data.left_out | {data.ids[row] for row in broken})
    return _note(whole, f"{len(broken)} broken pictures are left out, first: {first}")
