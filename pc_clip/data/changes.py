"""Pairs of images with what changed between them: Spot-the-Diff, Image-Editing-Request, and files of your own.

Spot-the-Diff: {split}.json is a list of {"img_id", "sentences"}, and ID.png and ID_2.png are the pictures.
Image-Editing-Request: {split}.json is a list of {"img0", "img1", "sents", "uid"} with the names of two pictures.
Your own: a JSON a line, {"before": path, "after": path, "sentences": [...]}, with "kind" where it is known.
"""

from __future__ import annotations

import json
import os
from functools import partial
from pathlib import Path

from pc_clip.core.errors import UserError
from pc_clip.data import change_table
from pc_clip.data.change_table import NoSplit, Source
from pc_clip.data.dataset import Change, Dataset, digest
from pc_clip.data.layout import Layout

LINES = (".jsonl",)  # the ending of your own files, in any case

SPOT_THE_DIFF = Layout((), ("*.json|annotations/*.json|data/*.json|data/annotations/*.json",))
IMAGE_EDITING_REQUEST = Layout((), ("*.json|data/*.json|dataset/*.json|dataset/adobe/*.json",))

SPLITS = ("train", "val", "test")
JOINED = "reformat_"  # before the name of a split, as in the names of the files that CLIP4IDC makes of these


# -- Spot-the-Diff -------------------------------------------------------------------------------------


def open_spot_the_diff(root: Path, split: str, missing: str = "error") -> Dataset:
    """Spot-the-Diff as published, an entry a change; several people wrote an entry of the same pair.

    split: with "reformat_" before it all sentences about a pair are one change's, in the order of the file. So CLIP4IDC
    trains and is measured. missing: an absent picture is an "error", or its pair is left out ("skip") or kept ("keep").
    """
    name = split.removeprefix(JOINED)
    folders = [root, root / "annotations", root / "data", root / "data" / "annotations"]
    path = change_table.find(folders, dict.fromkeys((f"{split}.json", f"{name}.json")), SPLITS)
    changes = []
    for where, entry in change_table.read_entries(path, ("img_id", "sentences")):
        key = change_table.image_name(entry["img_id"], where, "img_id")
        changes.append(Change(key, f"{key}_2", change_table.sentences(entry["sentences"], where, "sentences")))
    if split != name:
        changes = _joined(changes)
    places = partial(_spot_places, str(root))
    source = Source("spot_the_diff", split, split, path, f"Unpack resized_images of Spot-the-Diff in {root}")
    return change_table.data_set(source, changes, places, missing)


def _joined(changes: list[Change]) -> list[Change]:
    """A change a pair of images, with the sentences of all."""
    said: dict[tuple[str, str], tuple[str, ...]] = {}
    for change in changes:
        pair = change.before, change.after
        said[pair] = said.get(pair, ()) + change.sentences
    return [Change(*pair, sentences) for pair, sentences in said.items()]


def _spot_places(root: str, key: str) -> list[str]:
    folders = ("images", "resized_images", "", "data/images", "data/resized_images")
    return [os.path.join(root, folder, key + ending) for folder in folders for ending in (".png", ".jpg")]


# -- Image-Editing-Request -----------------------------------------------------------------------------


def open_image_editing_request(root: Path, split: str, missing: str = "error") -> Dataset:
    """Image-Editing-Request: what was asked for to make the second picture of the first.

    split: "val" is read from val.json or valid.json, and may be called either. missing: as for Spot-the-Diff.
    """
    split = "val" if split == "valid" else split
    names = ("valid.json", "val.json") if split == "val" else (f"{split}.json",)
    folders = [root, root / "data", root / "dataset", root / "dataset" / "adobe"]
    path = change_table.find(folders, names, ("train", "val", "valid", "test"))
    changes = []
    for where, entry in change_table.read_entries(path, ("img0", "img1", "sents")):
        before, after = (change_table.image_name(entry[key], where, key) for key in ("img0", "img1"))
        changes.append(Change(before, after, change_table.sentences(entry["sents"], where, "sents")))
    places = partial(_edited_places, str(root))
    source = Source("image_editing_request", split, split, path, f"Unpack its pictures in {root / 'images'}")
    return change_table.data_set(source, changes, places, missing)


def _edited_places(root: str, key: str) -> list[str]:
    return [os.path.join(root, folder, key) for folder in ("images", "data/images", "dataset/images", "")]


# -- files of your own ---------------------------------------------------------------------------------


def open_lines(root: Path, split: str, missing: str = "error") -> Dataset:
    """Changes from a file of JSON lines, and the pictures that it names, by whole paths or from the file's own folder.

    split: NAME for {root}/NAME.jsonl, or the path of a file that lies anywhere; then six digits of it are in the label,
    so that results of two files of one name are kept apart. missing: as for Spot-the-Diff.
    """
    path = next((p for p in (root / f"{split}.jsonl", Path(split), root / split) if is_lines(p)), None)
    if path is None:
        present = sorted(p.stem for p in root.glob("*") if is_lines(p))
        file = split if split.lower().endswith(LINES) else f"{split}.jsonl"
        raise NoSplit(
            f"{root} has no {file}; files found there: {', '.join(present) or 'none'}. "
            "One that lies elsewhere is named by its path: --data.split FILE.jsonl (--split for run.py)."
        )
    label = path.stem
    if path.resolve() != (root / f"{label}.jsonl").resolve():
        label += f"-{digest(str(path.resolve()))[:6]}"
    places = partial(_beside, str(path.parent))
    source = Source("changes", label, split, path, f"Put them where it says, seen from {path.parent}")
    return change_table.data_set(source, _read_lines(path), places, missing)


def is_lines(path: Path) -> bool:
    """Whether there is a file whose name ends as one of changes does."""
    return path.suffix.lower() in LINES and path.is_file()


def _beside(folder: str, key: str) -> list[str]:
    return [os.path.join(folder, key)]


def _read_lines(path: Path) -> list[Change]:
    try:
        text = path.read_bytes().decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start})") from error
    lines = [(n, line) for n, line in enumerate(text.split("\n"), 1) if line.strip()]  # splitlines splits at U+2028 too
    if not lines:
        raise UserError(f"{path} is empty; write a line of JSON for each change")
    return [_line(line, f"{path}, line {n}") for n, line in lines]


def _line(line: str, where: str) -> Change:
    try:
        entry = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{where} is not JSON ({error.msg} at column {error.colno}); mend or remove it") from error
    if not isinstance(entry, dict) or not {"before", "after"} <= entry.keys():
        raise UserError(f'{where}: wanted {{"before", "after", "sentences"}}, found {line[:80]}')
    if ("sentences" in entry) == ("sentence" in entry):
        raise UserError(f'{where}: wanted either "sentences" or "sentence", found {", ".join(entry)}')
    before, after = (change_table.image_name(entry[key], where, key) for key in ("before", "after"))
    if "sentence" in entry:
        if not isinstance(entry["sentence"], str):
            raise UserError(f"{where}: sentence must be a text, found {str(entry['sentence'])[:60]!r}")
        said = change_table.sentences([entry["sentence"]], where, "sentence")
    else:
        said = change_table.sentences(entry["sentences"], where, "sentences")
    if not said:
        raise UserError(f"{where} has no sentence with a word in it; say what changed, or remove it")
    kind = entry.get("kind") or ""
    if not isinstance(kind, str):
        raise UserError(f"{where}: kind must be a text, found {str(kind)[:60]!r}")
    return Change(before, after, said, kind.strip())
