"""What people call the classes of a data set, and prompts that suit it: `classnames/NAME.yaml`, one file a set."""

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
    """path: the file; source: where the names come from and what we changed; several: prompts with {} for the class.

    said: the set's own name (a folder or a label) -> the name people say.
    """

    path: Path
    source: str
    several: tuple[str, ...]
    said: dict[str, str]

    def say(self, own: Iterable[str]) -> tuple[str, ...]:
        """The names people say, in the order of the set's own. Raises UserError for one the file lacks."""
        own = list(own)
        if unknown := [name for name in own if name not in self.said]:
            raise UserError(
                f"{self.path} has no name for {unknown[0]!r} ({len(unknown)} of {len(own)} classes). "
                "Is this the right data set? If so, add a line for each."
            )
        return tuple(self.said[name] for name in own)


@cache
def class_names(name: str) -> ClassNames:
    """The file of a data set. Raises UserError for one that is absent or not as it must be."""
    path = FOLDER / f"{name}.yaml"
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
        names = ClassNames(path, found["source"], tuple(found["templates"]), dict(found["classes"]))
    except FileNotFoundError as error:
        raise UserError(f"no class names at {path}") from error
    except (yaml.YAMLError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} needs source, templates and classes: {' '.join(str(error).split())}") from error
    if wrong := [t for t in names.several if t.count("{}") != 1]:
        raise UserError(f"{path}: the template {wrong[0]!r} needs exactly one {{}}")
    if wrong := [f"{k}: {v}" for k, v in names.said.items() if not isinstance(k, str) or not isinstance(v, str)]:
        raise UserError(f"{path}: {wrong[0]!r} is no pair of names; put them in quotes")
    return names
