"""Settings from YAML files and flags, strict about names and types; `configure` is the entry point.

`--config FILE.yaml` comes first, then any setting again as a flag (`--train.lr 1e-8`). core/config says which settings
there are. Nothing here imports torch, so that --help and a wrong flag answer at once.
"""

from __future__ import annotations

import argparse
import dataclasses
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import jsonargparse
import yaml

from pc_clip.core.config.settings import as_dict, is_group
from pc_clip.core.errors import UserError, check_at_least, check_choice, nearest
from pc_clip.core.paths import configs_folder, shipped

Config = TypeVar("Config")
LISTS = ("list[str]", "list[int]", "list[float]")  # written with commas
RENAMED = {  # settings of earlier configs
    "pairwise.anchor": "retain.texts", "pairwise.anchor_batch": "retain.batch",
    "pairwise.anchor_captions": "retain.captions", "change.clip_rate": "change.clip_lr_scale",
    "change.counterparts": "change.aligned_tokens", "change.told": "change.references",
}  # fmt: skip
WHOLE = ("templates", "server.stop")  # texts that may hold commas: a flag gives one, as it is


class _Formatter(jsonargparse.DefaultHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Examples keep their lines."""


def configure(
    kind: type[Config],
    program: str,
    description: str,
    argv: Sequence[str],
    *,
    default: Path | None = None,
    options: Mapping[str, type] | None = None,
    hidden: Iterable[str] = (),
) -> Config:
    """Settings from `--config` and flags; `--help` prints them and exits.

    default: the config taken when none is named. options: further groups by name, each a dataclass; the result has
    them as attributes of the same name. hidden: settings and groups that `--help` leaves out, and `--help-all` lists.
    Raises UserError for an unknown key or flag (with the nearest known), a wrong type, or broken YAML.
    """
    options = dict(options or {})
    if {"-h", "--help", "--help-all"} & set(argv):
        _parser(kind, program, description, options, () if "--help-all" in argv else hidden).print_help()
        sys.exit(0)
    types = dict(_types(kind, options))
    nested: dict[str, Any] = {}
    for key, value in given(argv, default).items():
        if key in RENAMED:
            raise UserError(f"{key} is called {RENAMED[key]} now")
        if key not in types:
            raise UserError(f"there is no setting {key}. {nearest(key, types)}")
        if types[key] in LISTS and isinstance(value, str) and not value.startswith("["):
            value = [value] if key.endswith(WHOLE) else [part.strip() for part in value.split(",")]
        *groups, name = key.split(".")
        place = nested
        for group in groups:
            place = place.setdefault(group, {})
        place[name] = value
    parser = _parser(kind, program, description, options)
    try:
        parsed = parser.instantiate(parser.parse_object(nested))
    except (argparse.ArgumentError, TypeError) as error:
        raise UserError(" ".join(str(error).split()).replace("<class '", "").replace("'>", "")) from error
    config = kind(**{f.name: getattr(parsed, f.name) for f in dataclasses.fields(kind)})
    for name in options:
        setattr(config, name, getattr(parsed, name))
    _check_shared(config)
    _check_effect(config, [word.removeprefix("--").partition("=")[0] for word in argv if word.startswith("--")])
    return config


def given(argv: Sequence[str], default: Path | None = None) -> dict[str, Any]:
    """Settings of a command line by dotted name: the files of --config (or the default one), then its flags.

    A flag without a value means true.
    """
    files: list[Path] = []
    flags: dict[str, Any] = {}
    words = list(argv)
    while words:
        key, equals, value = words.pop(0).removeprefix("--").partition("=")
        if not equals:
            value = words.pop(0) if words and not words[0].startswith("--") else True
        if key == "config":
            files.append(shipped(Path(str(value))))
        else:
            flags[key] = value
    settings: dict[str, Any] = {}
    for path in files or ([default] if default else []):
        settings |= _flat(_read(path))
    return settings | flags


def dump(config: Any) -> str:
    """Resolved settings as YAML that `--config` reads back."""
    return yaml.safe_dump(as_dict(config), sort_keys=False)


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        there = sorted(p.name for p in configs_folder().glob("*.yaml"))
        raise UserError(f"no config at {path}; in configs/: {', '.join(there)}")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no settings: expected lines like `name: example`")
    return content


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"train": {"lr": 1}} -> {"train.lr": 1}"""
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat


def _types(kind: type, options: Mapping[str, type], prefix: str = "") -> Iterator[tuple[str, str]]:
    """(dotted name, type as it is written) of every setting."""
    for f in dataclasses.fields(kind):
        if is_group(f):
            yield from _types(f.default_factory, {}, f"{prefix}{f.name}.")
        else:
            yield f"{prefix}{f.name}", str(f.type)
    for name, group in options.items():
        yield from _types(group, {}, f"{name}.")


def _parser(
    kind: type, program: str, description: str, options: Mapping[str, type], hidden: Iterable[str] = ()
) -> jsonargparse.ArgumentParser:
    parser = jsonargparse.ArgumentParser(
        prog=program, usage=f"{program} [--config FILE] [--SETTING VALUE ...]", description=description,
        formatter_class=_Formatter, exit_on_error=False,
    )  # fmt: skip
    parser.add_argument("--config", metavar="FILE", help="A YAML file with any of these settings.")
    parser.add_class_arguments(kind, None, skip=set(hidden))
    for name, group in options.items():
        parser.add_class_arguments(group, name)
    for action in parser._actions:  # jsonargparse also takes a file for each group, which `given` does not
        if action.help == "Path to a configuration file.":
            action.help = argparse.SUPPRESS
    return parser


def _check_effect(config: Any, flags: Iterable[str]) -> None:
    """Raises UserError for a flag that another setting leaves without effect, as its `needs` says."""
    for flag in (flag for flag in flags if flag != "config"):
        place, groups = config, ""
        for name in flag.split("."):
            known = {f.name: f.metadata for f in dataclasses.fields(place)}
            if need := known.get(name, {}).get("needs"):
                other, sign, wanted = re.fullmatch(r"(\w+)(=|!=|)(.*)", need).groups()
                value = getattr(place, other)
                met = (str(value) in wanted.split("|")) == (sign == "=") if sign else bool(value)
                if not met:
                    raise UserError(f"--{flag} has no effect with {groups}{other} {value}; leave it out")
            place, groups = getattr(place, name), f"{groups}{name}."


def _check_shared(config: Any) -> None:
    """Check the settings that all scripts share."""
    if hasattr(config, "device"):
        check_choice("device", config.device or "cpu", ("cpu", "cuda"))
    for name, least in (("batch_size", 1), ("seed", 0)):
        if hasattr(config, name):
            check_at_least(name, getattr(config, name), least)
