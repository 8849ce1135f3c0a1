"""Pairs of images with what changed between them: CLEVR-Change, Spot-the-Diff, Image-Editing-Request, your own files.

Spot-the-Diff: {split}.json is a list of {"img_id", "sentences"}; ID.png and ID_2.png are the pictures.
Image-Editing-Request: {split}.json is a list of {"img0", "img1", "sents"} with the names of two pictures.
CLEVR-Change: splits.json has the numbers of the scenes of a split, type_mapping.json the kind of change of each;
change_captions.json the sentences on images/CLEVR_default_N.png and sc_images/CLEVR_semantic_N.png, and
no_change_captions.json those on nsc_images/CLEVR_nonsemantic_N.png, where the view alone is another.
Your own: a JSON a line, {"before": path, "after": path, "sentences": [...]}, with "kind" where it is known.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from pc_clip.core.errors import UserError
from pc_clip.data.dataset import Change, Dataset, digest, first_file, read_file, read_text

SPLITS = ("train", "val", "valid", "test")
JOINED = "reformat_"  # before the name of a split, as in the names of the files that CLIP4IDC makes of these
CLEVR = {"semantic": "change_captions.json", "nonsemantic": "no_change_captions.json"}
CLEVR_FOLDERS = {"default": "images", "semantic": "sc_images", "nonsemantic": "nsc_images"}
Entries = Iterator[tuple[str, dict[str, Any]]]  # each with where it stands


class NoSplit(UserError):
    """The data set is there, and a split of it is not."""


def open_spot_the_diff(root: Path, split: str, missing: str = "error") -> Dataset:
    """Spot-the-Diff as published, an entry a change; several people wrote an entry of the same pair.

    split: with "reformat_" before it all sentences about a pair are one change's, in the order of the file. So CLIP4IDC
    trains and is measured. missing: an absent picture is an "error", or its pair is left out ("skip") or kept ("keep").
    """
    name = split.removeprefix(JOINED)
    path = _find(root, (".", "annotations", "data", "data/annotations"), (split, name))
    changes = []
    for where, entry in _entries(path, ("img_id", "sentences")):
        key = _image(entry, "img_id", where)
        changes.append(Change(key, f"{key}_2", _sentences(entry["sentences"], where)))
    if split != name:
        sentences: dict[tuple[str, str], tuple[str, ...]] = {}
        for change in changes:
            pair = change.before, change.after
            sentences[pair] = sentences.get(pair, ()) + change.sentences
        changes = [Change(*pair, texts) for pair, texts in sentences.items()]
    folders = [root / inner for inner in ("images", "resized_images", ".", "data/images", "data/resized_images")]
    return _data_set(
        "spot_the_diff", split, split, path, changes, missing, f"Unpack resized_images of Spot-the-Diff in {root}",
        lambda key: [folder / f"{key}{ending}" for folder in folders for ending in (".png", ".jpg")],
    )  # fmt: skip


def open_image_editing_request(root: Path, split: str, missing: str = "error") -> Dataset:
    """Image-Editing-Request: what was asked for to make the second picture of the first.

    split: "val" is read from val.json or valid.json, and may be called either. missing: as for Spot-the-Diff.
    """
    split = "val" if split == "valid" else split
    path = _find(root, (".", "data", "dataset", "dataset/adobe"), ("valid", "val") if split == "val" else (split,))
    changes = [
        Change(_image(entry, "img0", where), _image(entry, "img1", where), _sentences(entry["sents"], where))
        for where, entry in _entries(path, ("img0", "img1", "sents"))
    ]
    folders = [root / inner for inner in ("images", "data/images", "dataset/images", ".")]
    return _data_set(
        "image_editing_request", split, split, path, changes, missing, f"Unpack its pictures in {root / 'images'}",
        lambda key: [folder / key for folder in folders],
    )  # fmt: skip


def open_clevr_change(folder: Path, split: str, missing: str = "error") -> Dataset:
    """Of every scene of a split two changes: to the picture with the change, and to the one without, of kind "none"."""
    path, kinds = folder / "splits.json", {}
    for kind, names in _json(folder / "type_mapping.json", dict).items():
        for name in names:
            if kinds.setdefault(Path(name).stem, kind) != kind:
                raise UserError(f"{folder / 'type_mapping.json'}: {name} is {kinds[Path(name).stem]} and {kind}")
    captions = {which: _json(folder / file, dict) for which, file in CLEVR.items()}
    splits = _json(path, dict)
    if not isinstance(splits.get(split), list) or not all(type(n) is int for n in splits[split]):
        raise UserError(f"{path} needs a list of numbers of scenes for {split!r}; it has {', '.join(splits)}")
    scenes, changes = [f"{number:06d}" for number in splits[split]], []
    for scene in scenes:
        before = f"CLEVR_default_{scene}.png"
        for which, file in CLEVR.items():
            if before not in captions[which]:
                raise UserError(f"{folder / file} has no sentences for {before}, which splits.json counts to {split}")
            texts = _sentences(captions[which][before], f"{folder / file}, {before}")
            kind = "none" if which == "nonsemantic" else kinds.get(scene, "")
            changes.append(Change(before, f"CLEVR_{which}_{scene}.png", texts, kind))
    unknown = sum(scene not in kinds for scene in scenes)
    return _data_set(
        "clevr_change", split, split, path, changes, missing, f"Unpack clevr_change.tar.gz again over {folder}",
        lambda key: [folder / CLEVR_FOLDERS[key.split("_")[1]] / key],
        f"{unknown} of {len(scenes)} scenes have no kind in type_mapping.json" if unknown else "",
    )  # fmt: skip


def open_lines(root: Path, split: str, missing: str = "error") -> Dataset:
    """Changes from a file of JSON lines, and the pictures that it names, by whole paths or from the file's own folder.

    split: NAME for {root}/NAME.jsonl, or the path of a file that lies anywhere; then six digits of it are in the label,
    so that results of two files of one name are kept apart. missing: as for Spot-the-Diff.
    """
    path = next((p for p in (root / f"{split}.jsonl", Path(split), root / split) if is_lines(p)), None)
    if path is None:
        present = sorted(p.stem for p in root.glob("*") if is_lines(p))
        file = split if split.lower().endswith(".jsonl") else f"{split}.jsonl"
        raise NoSplit(
            f"{root} has no {file}; files found there: {', '.join(present) or 'none'}. "
            "One that lies elsewhere is named by its path: --data.split FILE.jsonl (--split for run.py)."
        )
    label = path.stem
    if path.resolve() != (root / f"{label}.jsonl").resolve():
        label += f"-{digest(str(path.resolve()))[:6]}"
    return _data_set(
        "changes", label, split, path, [_own_change(where, entry) for where, entry in _lines(path)], missing,
        f"Put them where it says, seen from {path.parent}", lambda key: [path.parent / key],
    )  # fmt: skip


def is_lines(path: Path) -> bool:
    """Whether there is a file whose name ends as one of changes does."""
    return path.suffix.lower() == ".jsonl" and path.is_file()


def _own_change(where: str, entry: dict[str, Any]) -> Change:
    if ("sentences" in entry) == ("sentence" in entry):
        raise UserError(f'{where}: wanted either "sentences" or "sentence", found {", ".join(entry)}')
    texts = _sentences(entry["sentences"] if "sentences" in entry else [entry["sentence"]], where)
    kind = entry.get("kind") or ""
    if not texts or not isinstance(kind, str):
        raise UserError(f"{where}: wanted a sentence with a word in it, and a kind that is a text: {str(entry)[:80]}")
    return Change(_image(entry, "before", where), _image(entry, "after", where), texts, kind.strip())


# -- files, read strictly --------------------------------------------------------------------------------


def _find(root: Path, folders: tuple[str, ...], names: tuple[str, ...]) -> Path:
    """The first of some files in the first folder that has one. Raises NoSplit with the splits that have one."""
    places = [root / inner for inner in folders]
    path = next((p for place in places for name in names if (p := place / f"{name}.json").is_file()), None)
    if path is None:
        present = [split for split in SPLITS if any((place / f"{split}.json").is_file() for place in places)]
        raise NoSplit(f"{root} has no {names[0]}.json; splits found there: {', '.join(present) or 'none'}")
    return path


def _json(path: Path, kind: type) -> Any:
    """The content of a file, a list or a dict as `kind` says, that is not empty."""
    try:
        content = json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is not JSON ({error}); fetch it again, it may have been cut short") from error
    if not isinstance(content, kind) or not content:
        wanted = "a list" if kind is list else "an object"
        raise UserError(f"{path} must hold {wanted} with entries, found {json.dumps(content)[:60]}; fetch it again")
    return content


def _entries(path: Path, keys: tuple[str, ...]) -> Entries:
    """A list of objects that have `keys`. Places count from 1."""
    for n, entry in enumerate(_json(path, list), 1):
        if not isinstance(entry, dict) or not set(keys) <= entry.keys():
            raise UserError(f"{path}, entry {n} must be an object with {', '.join(keys)}, found {str(entry)[:80]}")
        yield f"{path}, entry {n}", entry


def _lines(path: Path) -> Entries:
    """The JSON of each line that is not blank."""
    text = read_text(path).replace("\r\n", "\n").replace("\r", "\n")
    for n, line in enumerate(text.split("\n"), 1):  # splitlines splits at U+2028 too
        if line.strip():
            try:
                entry = json.loads(line)
            except json.JSONDecodeError as error:
                raise UserError(
                    f"{path}, line {n} is not JSON ({error.msg} at column {error.colno}); mend it"
                ) from error
            if not isinstance(entry, dict) or not {"before", "after"} <= entry.keys():
                raise UserError(f'{path}, line {n}: wanted {{"before", "after", "sentences"}}, found {line[:80]}')
            yield f"{path}, line {n}", entry


def _image(entry: dict[str, Any], key: str, where: str) -> str:
    """The name of an image, or its number."""
    value = str(entry[key]) if type(entry[key]) is int else entry[key]
    if not isinstance(value, str) or not value.strip():
        raise UserError(f"{where}: {key} must name an image, found {str(value)[:60]!r}")
    return value.strip()


def _sentences(value: object, where: str) -> tuple[str, ...]:
    """Texts with single spaces. Those without a word are left out, so that there may be none."""
    if not isinstance(value, list) or not value or not all(isinstance(text, str) for text in value):
        raise UserError(f"{where}: sentences must be a list of texts, found {str(value)[:60]!r}")
    whole = (text.encode("utf-8", "replace").decode() for text in value)  # JSON may hold half a surrogate pair
    return tuple(text for text in (" ".join(text.split()) for text in whole) if text)


# -- the data set ----------------------------------------------------------------------------------------


def _data_set(
    name: str, split: str, part: str, path: Path, changes: list[Change], missing: str, get: str,
    places: Callable[[str], list[Path]], note: str = "",
) -> Dataset:  # fmt: skip
    """Changes, and the images that they name, each once.

    path: the file that lists them. places: where the picture of an id may be, the first that is there counts. get: how
    the pictures are had, for the error where some are absent. A change without words and one that was there before,
    word for word, are left out and counted. Raises UserError where no change remains.
    """
    worded = [change for change in changes if change.sentences]
    distinct = list(dict.fromkeys(worded))
    if not distinct:
        raise UserError(f"{path} tells of no change: {len(changes)} entries, none with a word")
    files = {key: first_file(places(key)) for change in distinct for key in (change.before, change.after)}
    absent = [key for key, file in files.items() if file is None]
    shown = [c for c in distinct if missing != "skip" or (files[c.before] and files[c.after])]
    if absent and missing != "keep" and (missing == "error" or not shown):
        pair = next(c for c in distinct if files[c.before] is None or files[c.after] is None)
        here, gone = (pair.before, pair.after) if files[pair.after] is None else (pair.after, pair.before)
        raise UserError(
            f"{len(absent)} of the {len(files)} pictures named in {path} are absent, first {places(gone)[0]}, "
            f"the pair of {here}. "
            f"{get}, or use only those that are there with --data.missing skip (--missing for run.py)."
        )
    counted = {
        f"of {len(changes)} changes in {path.name} have no words and are left out": len(changes) - len(worded),
        f"of {len(changes)} changes in {path.name} are there twice and taken once": len(worded) - len(distinct),
        f"pictures named in {path.name} are absent": len(absent),
        f"of {len(distinct)} changes are left out for want of a picture": len(distinct) - len(shown),
    }
    ids = list(dict.fromkeys(key for change in shown for key in (change.before, change.after)))
    return Dataset(
        name=name,
        split=split,
        ids=ids,
        load=partial(read_file, [file.path if (file := files[key]) else places(key)[0] for key in ids]),
        fingerprint=digest([(key, *(files[key] or ())[1:]) for key in ids], shown),
        note="; ".join(filter(None, (note, *(f"{count} {reason}" for reason, count in counted.items() if count)))),
        part=part,
        changes=tuple(shown),
    )
