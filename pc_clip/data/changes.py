"""Pairs of images with what changed between them: CLEVR-Change, Spot-the-Diff, Image-Editing-Request, your own files.

Spot-the-Diff: {split}.json is a list of {"img_id", "sentences"}; ID.png and ID_2.png are the pictures.
Image-Editing-Request: {split}.json is a list of {"img0", "img1", "sents"} with the names of two pictures.
CLEVR-Change: splits.json has the numbers of the scenes of a split, type_mapping.json the kind of change of each;
change_captions.json the sentences on images/CLEVR_default_N.png and sc_images/CLEVR_semantic_N.png, and
no_change_captions.json those on nsc_images/CLEVR_nonsemantic_N.png, where the view alone is another.
Your own: a JSON a line, {"before": path, "after": path, "sentences": [...]}, with "kind" where it is known.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from pc_clip.core.errors import UserError
from pc_clip.data.dataset import Change, Dataset, NoSplit, digest
from pc_clip.data.picture_files import OR_SKIP, find_list, find_pictures
from pc_clip.data.text_files import Entries, image_name, json_lines, read_json, with_keys, words

SPLITS = ("train", "val", "valid", "test")
JOINED = "reformat_"  # before the name of a split, as in the names of the files that CLIP4IDC makes of these
CLEVR = {"semantic": "change_captions.json", "nonsemantic": "no_change_captions.json"}
CLEVR_FOLDERS = {"default": "images", "semantic": "sc_images", "nonsemantic": "nsc_images"}
LINES = (".jsonl",)


def open_spot_the_diff(root: Path, split: str, missing: str = "error") -> Dataset:
    """Spot-the-Diff as published, an entry a change; several people wrote an entry of the same pair.

    split: with "reformat_" before it all sentences about a pair are one change's, in the order of the file. So CLIP4IDC
    trains and is measured. missing: an absent picture is an "error", or its pair is left out ("skip") or kept ("keep").
    """
    name = split.removeprefix(JOINED)
    path = _find(root, (".", "annotations", "data", "data/annotations"), (split, name))
    changes = []
    for where, entry in _entries(path, ("img_id", "sentences")):
        key = image_name(entry["img_id"], where, "img_id")
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

    split: "val" is read from valid.json or val.json, and may be called either. missing: as for Spot-the-Diff.
    """
    split = "val" if split == "valid" else split
    path = _find(root, (".", "data", "dataset", "dataset/adobe"), ("valid", "val") if split == "val" else (split,))
    changes = [
        _change(entry["img0"], entry["img1"], entry["sents"], where)
        for where, entry in _entries(path, ("img0", "img1", "sents"))
    ]
    folders = [root / inner for inner in ("images", "data/images", "dataset/images", ".")]
    return _data_set(
        "image_editing_request", split, split, path, changes, missing, f"Unpack its pictures in {root / 'images'}",
        lambda key: [folder / key for folder in folders],
    )  # fmt: skip


def open_clevr_change(folder: Path, split: str, missing: str = "error") -> Dataset:
    """Two pairs a scene: with its changed picture, and with its unchanged one, of kind "none"."""
    path, types = folder / "splits.json", read_json(folder / "type_mapping.json", dict)
    kinds = {Path(name).stem: kind for kind, names in types.items() for name in names}
    if len(kinds) < sum(map(len, types.values())):
        raise UserError(f"{folder / 'type_mapping.json'} names a scene twice; unpack it again")
    captions = {which: read_json(folder / file, dict) for which, file in CLEVR.items()}
    numbers = with_keys(read_json(path, dict), str(path), (split,))[split]
    if not isinstance(numbers, list) or not all(type(number) is int for number in numbers):
        raise UserError(f"{path} needs a list of numbers of scenes for {split!r}")
    scenes, changes = [f"{number:06d}" for number in numbers], []
    for scene in scenes:
        before = f"CLEVR_default_{scene}.png"
        for which, file in CLEVR.items():
            texts = _sentences(captions[which].get(before), f"{folder / file}, {before}")
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

    split: as for `find_list`; missing: as for Spot-the-Diff.
    """
    path, label = find_list(root, split, LINES)
    changes = []
    for where, entry in json_lines(path, ("before", "after")):
        if ("sentences" in entry) == ("sentence" in entry):
            raise UserError(f'{where}: wanted either "sentences" or "sentence", found {", ".join(entry)}')
        texts = entry["sentences"] if "sentences" in entry else [entry["sentence"]]
        kind = words(entry.get("kind") or "", where, "kind", may_be_empty=True)
        changes.append(_change(entry["before"], entry["after"], texts, where, kind))
    get = f"Put them where it says, seen from {path.parent}"
    return _data_set("changes", label, split, path, changes, missing, get, lambda key: [path.parent / key])


def _find(root: Path, folders: tuple[str, ...], names: tuple[str, ...]) -> Path:
    """The first of some files in the first folder that has one. Raises NoSplit with the splits that have one."""
    places = [root / inner for inner in folders]
    path = next((p for place in places for name in names if (p := place / f"{name}.json").is_file()), None)
    if path is None:
        present = [split for split in SPLITS if any((place / f"{split}.json").is_file() for place in places)]
        raise NoSplit(f"{root} has no {names[0]}.json; splits found there: {', '.join(present) or 'none'}")
    return path


def _entries(path: Path, keys: tuple[str, ...]) -> Entries:
    """A list of objects that have `keys`. Places count from 1."""
    for number, entry in enumerate(read_json(path, list), 1):
        where = f"{path}, entry {number}"
        yield where, with_keys(entry, where, keys)


def _change(before: Any, after: Any, sentences: Any, where: str, kind: str = "") -> Change:
    names = image_name(before, where, "the first image"), image_name(after, where, "the second image")
    return Change(*names, _sentences(sentences, where), kind)


def _sentences(value: object, where: str) -> tuple[str, ...]:
    """Texts with single spaces. Those without a word are left out, so that there may be none."""
    if not isinstance(value, list) or not value:
        raise UserError(f"{where}: sentences must be a list of texts, found {str(value)[:60]!r}")
    return tuple(filter(None, (words(text, where, "a sentence", may_be_empty=True) for text in value)))


def _data_set(
    name: str, split: str, part: str, path: Path, changes: list[Change], missing: str, get: str,
    places: Callable[[str], list[Path]], note: str = "",
) -> Dataset:  # fmt: skip
    """Changes, and the images that they name, each once.

    path: the file that lists them. places, get: as for `find_pictures`. A change without words and one that was there
    before, word for word, are left out and counted. Raises UserError where no change remains.
    """
    worded = [change for change in changes if change.sentences]
    distinct = list(dict.fromkeys(worded))
    named = [key for change in distinct for key in (change.before, change.after)]
    pictures = find_pictures(named, places, path, missing, f"{get}, {OR_SKIP}")
    files = pictures.files
    shown = [c for c in distinct if missing != "skip" or (files[c.before] and files[c.after])]
    if not shown:
        raise UserError(f"{path} tells of no change with words and both pictures; it has {len(changes)} entries")
    counted = {
        f"of {len(changes)} changes in {path.name} have no words and are left out": len(changes) - len(worded),
        f"of {len(changes)} changes in {path.name} are there twice and taken once": len(worded) - len(distinct),
        f"pictures named in {path.name} are absent": pictures.absent,
        f"of {len(distinct)} changes are left out for want of a picture": len(distinct) - len(shown),
    }
    ids = list(dict.fromkeys(key for change in shown for key in (change.before, change.after)))
    return Dataset(
        name=name,
        split=split,
        ids=ids,
        load=pictures.load(ids),
        fingerprint=digest(pictures.stamps(ids), shown),
        note="; ".join(filter(None, (note, *(f"{count} {reason}" for reason, count in counted.items() if count)))),
        part=part,
        changes=tuple(shown),
    )
