"""CLEVR-Change: rendered scenes before and after one change, and each again with another camera and light alone.

splits.json                 {"train": [numbers], "val": [...], "test": [...]}
change_captions.json        {"CLEVR_default_000000.png": [sentences on sc_images/CLEVR_semantic_000000.png]}
no_change_captions.json     {"CLEVR_default_000000.png": [sentences on nsc_images/CLEVR_nonsemantic_000000.png]}
type_mapping.json           {"color": ["000000.png", ...], "material": ..., "add": ..., "drop": ..., "move": ...}
images/                     the pictures before
"""

from __future__ import annotations

import os
import re
from functools import partial
from pathlib import Path
from typing import Any

from pc_clip.core.errors import UserError
from pc_clip.data import change_table
from pc_clip.data.change_table import Source
from pc_clip.data.dataset import Change, Dataset
from pc_clip.data.layout import Layout

LAYOUT = Layout(
    ("data", "clevr_change/data"),  # what the archive unpacks to
    ("change_captions.json", "no_change_captions.json", "splits.json", "type_mapping.json"),
)
SAID = {"semantic": "change_captions.json", "nonsemantic": "no_change_captions.json"}
FOLDERS = {"default": "images", "semantic": "sc_images", "nonsemantic": "nsc_images"}
NONE = "none"  # the kind of a pair in which nothing was changed but the view


def open_clevr_change(root: Path, split: str, missing: str = "error") -> Dataset:
    """Of every scene of a split two changes: to the picture with the change, and to the one without, of kind "none".

    missing: an absent picture is an "error", or its pairs are left out ("skip") or kept until looked at ("keep").
    """
    folder = LAYOUT.folder(root)
    numbers, kinds = _numbers(folder / "splits.json", split), _kinds(folder / "type_mapping.json")
    captions = {which: change_table.read_json(folder / file, dict) for which, file in SAID.items()}
    changes = [
        Change(
            _name("default", number),
            _name(which, number),
            _said(folder / SAID[which], captions[which], number, split),
            NONE if which == "nonsemantic" else kinds.get(number, ""),
        )
        for number in numbers
        for which in SAID
    ]
    unknown = sum(number not in kinds for number in numbers)
    return change_table.data_set(
        Source("clevr_change", split, split, folder / "splits.json", f"Unpack clevr_change.tar.gz again in {root}"),
        changes,
        partial(_places, str(folder)),
        missing,
        f"{unknown} of {len(numbers)} scenes have no kind in type_mapping.json" if unknown else "",
    )


def _name(which: str, number: int) -> str:
    return f"CLEVR_{which}_{number:06d}.png"


def _places(folder: str, name: str) -> list[str]:
    return [os.path.join(folder, FOLDERS[name.split("_")[1]], name)]


def _said(path: Path, captions: dict[str, Any], number: int, split: str) -> tuple[str, ...]:
    key = _name("default", number)
    if key not in captions:
        raise UserError(f"{path} has no sentences for {key}, which splits.json counts to {split}; unpack both again")
    return change_table.sentences(captions[key], str(path), key)


def _numbers(path: Path, split: str) -> list[int]:
    splits = change_table.read_json(path, dict)
    if split not in splits:
        raise UserError(f"{path} has no split {split!r}; it has {', '.join(splits)}")
    numbers = splits[split]
    if not isinstance(numbers, list) or not numbers:
        raise UserError(f"{path}: {split} must be a list of numbers of images, found {str(numbers)[:60]!r}")
    if wrong := [n for n in numbers if not isinstance(n, int) or isinstance(n, bool)]:
        raise UserError(f"{path}: {split} must be a list of numbers of images, but one is {str(wrong[0])[:60]!r}")
    return numbers


def _kinds(path: Path) -> dict[int, str]:
    """Number of a scene -> what kind of change was made. Raises UserError for one that has two."""
    kinds: dict[int, str] = {}
    for kind, names in change_table.read_json(path, dict).items():
        if not isinstance(names, list):
            raise UserError(f"{path}: {kind} must be a list of names as 000000.png, found {str(names)[:60]!r}")
        for name in names:
            found = re.fullmatch(r"(\d+)\.png", name) if isinstance(name, str) else None
            if not found:
                raise UserError(f"{path}: {kind} must be a list of names as 000000.png, but one is {str(name)[:60]!r}")
            if kinds.setdefault(int(found[1]), kind) != kind:
                raise UserError(f"{path}: {name} is said to be {kinds[int(found[1])]} and {kind}; fetch it again")
    return kinds
