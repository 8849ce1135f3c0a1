"""Settings from YAML and flags, strict about names and types: `configure` is the one way in.

`--config FILE.yaml` comes first, then any setting again as a flag (`--train.lr 1e-8`). core/config says which settings
there are. Nothing here imports torch, so that --help and a wrong flag answer at once.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import jsonargparse
import yaml

from pc_clip.core.config.settings import is_group
from pc_clip.core.errors import UserError, check_at_least, check_choice, nearest
from pc_clip.core.paths import configs_folder, shipped

Config = TypeVar("Config")


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
    shown: Iterable[str] | None = None,
    only: bool = False,
) -> Config:
    """Settings from `--config` and flags; `--help` prints them and exits.

    default: the config taken when none is named. options: further groups by name, each a dataclass; the result has
    them as attributes of the same name. shown: the groups that `--help` lists, all unless given; only: these alone,
    without the settings outside groups. `--help-all` lists everything.
    Raises UserError for an unknown key or flag (with the nearest known), a wrong type, or broken YAML.
    """
    options = dict(options or {})
    if {"-h", "--help", "--help-all"} & set(argv):
        every = {f.name for f in dataclasses.fields(kind)}
        hidden = every if only else _groups(kind)
        hidden = set() if shown is None or "--help-all" in argv else hidden - set(shown)
        _parser(kind, program, description, options, hidden).print_help()
        sys.exit(0)
    files, flags = _split(argv)
    files = files or ([default] if default else [])
    known = {key: type_of for key, type_of in _keys(kind, options)}
    for path in files:
        _check_file(path, known, getattr(kind, "MOVED", {}))
    flags = _complete_lists(_complete_switches(flags, known), known)
    words = [word for path in files for word in ("--config", str(path))] + flags  # flags win wherever they stood
    parser = _parser(kind, program, description, options)
    try:
        found = parser.instantiate(parser.parse_args(words))
    except (argparse.ArgumentError, TypeError) as error:
        raise UserError(_explain(str(error), known, getattr(kind, "MOVED", {}))) from error
    config = kind(**{f.name: getattr(found, f.name) for f in dataclasses.fields(kind)})
    for name in options:
        setattr(config, name, getattr(found, name))
    _check_shared(config)
    return config


def _parser(
    kind: type, program: str, description: str, options: Mapping[str, type], hidden: Iterable[str] = ()
) -> jsonargparse.ArgumentParser:
    parser = jsonargparse.ArgumentParser(
        prog=program, usage=f"{program} [--config FILE] [--SETTING VALUE ...]", description=description,
        formatter_class=_Formatter, allow_abbrev=False, exit_on_error=False,
    )  # fmt: skip
    parser.add_argument("--config", action="config", help="A YAML file with any of these settings.")
    parser.add_class_arguments(kind, None, skip=set(hidden))
    for name, group in options.items():
        parser.add_class_arguments(group, name)
    return parser


def _check_shared(config: Any) -> None:
    """What settings of the same name mean everywhere."""
    if hasattr(config, "device"):
        check_choice("device", config.device or "cpu", ("cpu", "cuda"))
    if hasattr(config, "batch_size"):
        check_at_least("batch_size", config.batch_size, 1)
    if hasattr(config, "seed"):
        check_at_least("seed", config.seed, 0)


def peek(argv: Sequence[str], key: str, default: Path | None, otherwise: str) -> str:
    """The value a top-level setting will have, before the parser that needs to know it is built."""
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    finder.add_argument(f"--{key}")
    found, _ = finder.parse_known_args(argv)
    if (named := getattr(found, key)) is not None:
        return named
    for path in reversed(_split(argv)[0] or [default]):
        try:
            content = yaml.safe_load(Path(path).read_text()) if path else None
        except (OSError, yaml.YAMLError):
            continue  # the full parser will say what is wrong with it
        if isinstance(content, dict) and isinstance(content.get(key), str):
            return content[key]
    return otherwise


def dump(config: Any) -> str:
    """Resolved settings as YAML that `--config` reads back."""

    def plain(value: Any) -> Any:
        if dataclasses.is_dataclass(value):
            return {name: plain(v) for name, v in vars(value).items()}
        return [plain(v) for v in value] if isinstance(value, list | tuple) else value

    return yaml.safe_dump(plain(config), sort_keys=False)


def _complete_switches(flags: list[str], known: Mapping[str, str]) -> list[str]:
    """`--resume` alone means `--resume true`, for every setting that is true or false."""
    following = [*flags[1:], "--"]
    return [
        word
        for flag, after in zip(flags, following)
        for word in (
            (flag, "true")
            if known.get(flag.removeprefix("--"), "").startswith("bool") and after.startswith("--")
            else (flag,)
        )
    ]


def _complete_lists(flags: list[str], known: Mapping[str, str]) -> list[str]:
    """`--probe.shots 1,4,16` means `[1,4,16]`; a prompt may hold commas, so that `--templates` takes one as it is."""
    found = []
    for before, word in zip(["", *flags], flags):
        key = before.removeprefix("--")
        of = known.get(key, "") if before.startswith("--") else ""
        if of.startswith("list[") and not word.startswith("["):
            whole = key == "templates" or key.endswith("server.stop")
            parts = [word] if whole else [part.strip() for part in word.split(",")]
            word = json.dumps(parts) if of == "list[str]" else f"[{word}]"
        found.append(word)
    return found


def _split(argv: Sequence[str]) -> tuple[list[Path], list[str]]:
    """The config files named in a command line, and the rest of it."""
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    finder.add_argument("--config", action="append", type=Path, default=[])
    found, rest = finder.parse_known_args(argv)
    return [shipped(path) for path in found.config], rest


def _check_file(path: Path, known: Mapping[str, str], moved: Mapping[str, str]) -> None:
    """Names in a config file, before their values are looked at: each must be a setting."""
    if not path.is_file():
        there = sorted(p.name for p in configs_folder().glob("*.yaml"))
        raise UserError(f"no config at {path}; in configs/: {', '.join(there)}")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no settings: expected lines like `name: example`")
    _check_group(path, content, "", known, moved)


def _check_group(
    path: Path, content: Mapping[str, Any], prefix: str, known: Mapping[str, str], moved: Mapping[str, str]
) -> None:
    for name, value in content.items():
        key = f"{prefix}{name}"
        if any(other.startswith(f"{key}.") for other in known):
            if not isinstance(value, dict):
                raise UserError(f"{path}: {key} is a group of settings, not {value!r}; put them below it, indented")
            _check_group(path, value, f"{key}.", known, moved)
        elif key not in known:
            raise UserError(f"{path}: {_unknown(key, known, moved)}")


def _groups(kind: type) -> set[str]:
    return {f.name for f in dataclasses.fields(kind) if is_group(f)}


def _keys(kind: type, options: Mapping[str, type], prefix: str = "") -> Iterator[tuple[str, str]]:
    """(dotted name, type as it is written) of every setting."""
    for f in dataclasses.fields(kind):
        if is_group(f):
            yield from _keys(f.default_factory, {}, f"{prefix}{f.name}.")
        else:
            yield f"{prefix}{f.name}", str(f.type)
    for name, group in options.items():
        yield from _keys(group, {}, f"{name}.")


def _unknown(key: str, known: Mapping[str, str], moved: Mapping[str, str]) -> str:
    if key in moved:
        return f"{key} is called {moved[key]} now"
    return f"there is no setting {key}. {nearest(key, known)}"


def _explain(message: str, known: Mapping[str, str], moved: Mapping[str, str]) -> str:
    """jsonargparse's message on one line, with the nearest known setting where a name was wrong."""
    message = " ".join(message.split())
    if found := re.search(r"unrecognized arguments: (.*)", message):
        word = found.group(1).split()[0]
        return _unknown(word.split("=")[0].lstrip("-"), known, moved)
    message = message.replace("<class '", "").replace("'>", "")
    if found := re.search(r'key "data\.mix[^"]*": (?:Problem with given class_path \S+: )?(.*)', message):
        why = found.group(1).replace("Expected a dot import path string:", "found")
        return f"""data.mix takes a list: '[{{"dataset": "mnist", "n": 500}}]' ({why})"""
    return message
