"""The images that a run learns from, and what is said of them: a data set as its settings ask for it."""

from __future__ import annotations

import dataclasses
import re
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import PIL
from accelerate import PartialState
from PIL import Image
from tqdm import tqdm

from pc_clip.core import cache
from pc_clip.core.errors import UserError, check_at_least, check_choice
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
    if data.embeddings:
        _check_needs_no_picture(data)
    if data.embeddings and data.dataset == "webdataset":
        root = Path(data.root or READERS["webdataset"].root)
        if data.captions or not has_captions(root):  # its tars may be too many to open, or hold images alone
            return _about(unopened(root, data.split), data.captions)
    missing = "keep" if data.embeddings else data.missing  # nobody will look at the pictures
    found = _open(data.dataset, data.root, data.split, missing)
    if data.captions:
        found = _with_captions(found, data.captions)
    if data.mix:
        found = _mixed(found, data, missing, seed)
    return _without_broken(found, data.workers) if data.broken == "skip" else found


def _check_needs_no_picture(data: DataConfig) -> None:
    if data.mix:
        raise UserError(
            "data.embeddings holds one data set's images, so that data.mix has none to add; leave one of the two out"
        )
    if data.broken == "skip":
        raise UserError("data.embeddings stands in for the pictures: leave data.broken skip out, none is decoded")


def _open(name: str, root: str | None, split: str | None, missing: str) -> Dataset:
    splits = READERS[name].splits if name in READERS else ()
    return open_dataset(name, root, split or next(iter(splits), None), missing=missing)


def _about(data: Dataset, path: str | None) -> Dataset:
    """A data set whose images nobody has listed: those that a file has captions of, with these; or none."""
    captions = read_captions(path) if path else {}
    return dataclasses.replace(data, ids=list(captions), captions=[texts for _, texts in captions.values()] or None)


def _with_captions(data: Dataset, path: str) -> Dataset:
    """The images that a file has captions of, with those captions."""
    captions, ids = read_captions(path), ImageIds(data.ids, data.label)
    texts: dict[int, tuple[str, ...]] = {}
    for key, (_, of_key) in captions.items():
        if (row := ids.find(key)) is not None:
            texts[row] = texts.get(row, ()) + of_key
    if not texts:
        raise UserError(f"{path} has captions of {len(captions)} images, none of which is in {data.label}")
    rows = np.array(sorted(texts), dtype=np.int64)
    absent = sum(ids.find(key) is None for key in captions)
    note = f"{absent} images of {Path(path).name} are not in {data.label}" if absent else ""
    data = _note(_note(subset(data, rows), captions.note), note)
    return dataclasses.replace(data, captions=[texts[row] for row in rows.tolist()])


def _note(data: Dataset, said: str) -> Dataset:
    return dataclasses.replace(data, note="; ".join(filter(None, (data.note, said))))


# -- images of other data sets -------------------------------------------------------------------------


def _mixed(main: Dataset, data: DataConfig, missing: str, seed: int) -> Dataset:
    """A data set with images of others after its own. What is asked about its own images stays as it was."""
    if not main.captions:
        raise UserError(
            f"data.mix adds images with captions, and {main.label} has none; name a file of them with --data.captions"
        )
    parts, own, places = [main], _place(main, data.root), set()
    for number, entry in enumerate(data.mix):
        entry = _mix_config(entry)
        drawn = _drawn(entry, missing, stream(seed, "mix", number))
        place = _place(drawn, entry.root)
        if place == own:
            raise UserError(f"data.mix names {drawn.label}, which is learnt from already; name another split or set")
        if place in places:
            raise UserError(f"data.mix names {drawn.label} twice; ask once for as many images as there shall be")
        same = sum(name == entry.dataset for name, _, _ in places)
        places.add(place)
        prefix = f"{entry.dataset}{f'-{same + 1}' if same else ''}:"
        parts.append(dataclasses.replace(drawn, ids=[prefix + key for key in drawn.ids]))
    return _joined(parts)


def _place(data: Dataset, root: str | None) -> tuple[str, str, str]:
    """What a data set is of and where, the same however its folder is written."""
    usual = READERS[data.name].root
    return data.name, str(Path(root or usual).resolve()) if usual else "", data.split or ""


def _mix_config(entry: MixConfig | dict[str, Any]) -> MixConfig:
    """An entry of data.mix, which may be a plain dict. Raises UserError for one that means nothing."""
    from pc_clip.core.config.settings import MixConfig

    known = "dataset and n (a whole number), and takes root, split and caption"
    wrong = UserError(f"an entry of data.mix is {entry!r}; it needs {known}")
    try:
        entry = MixConfig(**entry) if isinstance(entry, dict) else entry
    except TypeError as error:
        raise wrong from error
    if not isinstance(entry, MixConfig) or not isinstance(entry.dataset, str):
        raise wrong
    if not isinstance(entry.n, int) or isinstance(entry.n, bool):
        raise wrong
    if not all(value is None or isinstance(value, str) for value in (entry.root, entry.split)):
        raise wrong
    check_at_least(f"n of {entry.dataset} in data.mix", entry.n, 1)
    if not isinstance(entry.caption, str) or entry.caption.count("{}") != 1:
        raise UserError(f"data.mix: the caption {entry.caption!r} needs exactly one {{}}, for the class")
    return entry


def _drawn(entry: MixConfig, missing: str, rng: np.random.Generator) -> Dataset:
    """n images drawn from a data set, with captions. Of the same seed fewer are among more."""
    data = _open_mixed(entry, missing)
    usable = np.arange(len(data))
    if not data.captions:
        if not data.questions:
            raise UserError(f"data.mix: nothing is known of the images of {data.label}, neither captions nor classes")
        question = data.questions[0]
        said = {row: question.classes[k] for row, k in zip(question.rows.tolist(), question.target.tolist())}
        usable = np.array(sorted(said))
        captions = [(entry.caption.replace("{}", said[row]),) if row in said else () for row in range(len(data))]
        data = dataclasses.replace(data, captions=captions)
    if entry.n > len(usable):
        raise UserError(f"data.mix asks for {entry.n} images of {data.label}, which has {len(usable)}")
    return subset(data, np.sort(rng.permutation(usable)[: entry.n]))


def _open_mixed(entry: MixConfig, missing: str) -> Dataset:
    """The data set of an entry. Its errors name the entry's settings: flags are about the set that is mixed into."""
    try:
        return _open(entry.dataset, entry.root, entry.split, missing)
    except UserError as error:
        said = re.sub(r" \(--[^)]*\)", "", str(error))  # the other script's flag
        said = re.sub(r"--(?:data\.)?(root|split)\b", lambda flag: f"{flag[1]} of {entry.dataset} in data.mix", said)
        raise UserError(said if "data.mix" in said else f"data.mix: {said}") from error


def _joined(parts: list[Dataset]) -> Dataset:
    """The first data set with the images and captions of the others, and its own questions and attributes alone."""
    main, *others = parts
    ids = [key for part in parts for key in part.ids]
    if len(set(ids)) < len(ids):
        raise UserError(f"{main.label} has images that are called like some of data.mix, with a colon; rename them")
    added = len(ids) - len(main)
    data = dataclasses.replace(
        main,
        ids=ids,
        load=partial(_load_of, [part.load for part in parts], np.cumsum([len(part) for part in parts])),
        fingerprint=digest(*[(part.fingerprint, part.ids) for part in parts]),
        captions=[texts for part in parts for texts in part.captions],
        attributes=tuple(
            dataclasses.replace(a, value=np.concatenate([a.value, np.full(added, np.nan)])) for a in main.attributes
        ),
    )
    for part in others:
        data = _note(data, f"{len(part)} images of {part.label} mixed in{f' ({part.note})' if part.note else ''}")
    return data


def _load_of(loads: list[Any], ends: np.ndarray, row: int) -> Image.Image:
    part = int(np.searchsorted(ends, row, side="right"))
    return loads[part](row - int(ends[part - 1]) if part else row)


# -- pictures that do not decode -----------------------------------------------------------------------


def _without_broken(data: Dataset, workers: int) -> Dataset:
    """The images that decode. Which do not is remembered, as long as the files stay as they are."""
    key = {"images": data.fingerprint, "Pillow": PIL.__version__}  # another one may decode what this one does not
    with PartialState().main_process_first():  # the others then find it in the cache
        found = cache.cached("broken", key, partial(_look, data, workers))
    broken = found["rows"]
    if not len(broken):
        return data
    why = next(iter(broken_images(subset(data, broken[:1]), 0).values()), "")
    if len(broken) == len(data):
        raise UserError(f"none of the {len(data)} pictures of {data.label} can be used: {why}")
    kept = subset(data, np.setdiff1d(np.arange(len(data)), broken))
    return _note(kept, f"{len(broken)} broken pictures are left out, first: {why}")


def _look(data: Dataset, workers: int) -> dict[str, np.ndarray]:
    """rows: [K] int64, of the images that do not decode."""
    what = f"decoding {data.label}"
    with tqdm(desc=what, total=len(data), unit=" images", leave=False, disable=None) as bar:
        return {"rows": np.array(list(broken_images(data, workers, bar.update)), dtype=np.int64)}
