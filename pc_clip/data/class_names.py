"""Names of classes: `classnames/NAME.yaml` has those people say for a data set's classes, and its list of prompts."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import yaml

from pc_clip.core.errors import UserError
from pc_clip.core.paths import package_data

FOLDER = package_data(Path(__file__).with_name("classnames"))


@dataclass(frozen=True)
class ClassNames:
    """source: where the names come from and what we changed. several: prompts with {} for the class.

    display_names: the set's own name (a folder or a label) -> the name people say.
    """

    path: Path
    source: str
    several: tuple[str, ...]
    display_names: dict[str, str]

    def say(self, own: Iterable[str]) -> tuple[str, ...]:
        """The names people say, in the order of the set's own. Raises UserError for one the file lacks."""
        own = list(own)
        if unknown := [name for name in own if name not in self.display_names]:
            raise UserError(
                f"{self.path} has no name for {unknown[0]!r} ({len(unknown)} of {len(own)} classes). "
                "Is this the right data set? If so, add a line for each."
            )
        return tuple(self.display_names[name] for name in own)


@cache
def class_names(name: str) -> ClassNames:
    """The class names of a data set."""
    path = FOLDER / f"{name}.yaml"
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    return ClassNames(path, content["source"], tuple(content["templates"]), content["classes"])
