"""Settings from YAML and flags, strict about names and types: `configure` is the one way in.

`--config FILE.yaml` comes first, then any setting again as a flag (`--train.lr 1e-8`). pc_clip/config.py says which
settings there are.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import jsonargparse
import torch
import yaml

from pc_clip.errors import UserError, check_at_least, check_choice, nearest

Config = TypeVar("Config")


def configure(
    kind: type[Config],
    parser: jsonargparse.ArgumentParser,
    argv: Sequence[str] | None = None,
    *,
    default: Path | None = None,
    options: dict[str, type] | None = None,
) -> Config:
    """Settings from `--config` and flags.

    default: the config taken when none is named. options: further groups by name, each a dataclass; the
    result has them as attributes of the same name.
    Raises UserError for an unknown key or flag (with the nearest known), a wrong type, or broken YAML.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    parser.exit_on_error = False
    parser.add_argument("--config", action="config", help="A YAML file with any of these settings.")
    parser.add_class_arguments(kind, None)
    for name, group in (options or {}).items():
        parser.add_class_arguments(group, name)
    files, flags = _split(argv)
    files = files or ([default] if default else [])
    for path in files:
        _check_file(path, _keys(kind, options or {}))
    flags = _complete_lists(_complete_switches(flags, kind, options or {}), kind)
    argv = [word for path in files for word in ("--config", str(path))] + flags  # flags win wherever they stood
    try:
        found = parser.instantiate(parser.parse_args(argv))
    except (argparse.ArgumentError, TypeError) as error:
        raise UserError(_explain(str(error), _keys(kind, options or {}))) from error
    groups = {name: getattr(found, name) for name in options or {}}
    config = kind(**{f.name: getattr(found, f.name) for f in dataclasses.fields(kind)})
    for name, group in groups.items():
        setattr(config, name, group)
    if hasattr(config, "device"):
        config.device = _device(config.device)
    if hasattr(config, "batch_size"):
        check_at_least("batch_size", config.batch_size, 1)
    if hasattr(config, "seed"):
        check_at_least("seed", config.seed, 0)
    return config


def _device(asked: str) -> str:
    check_choice("device", asked or "cpu", ("cpu", "cuda"))
    if asked == "cuda" and not torch.cuda.is_available():
        raise UserError("device is cuda, but torch finds no GPU here; leave it out, or install a CUDA build of torch")
    return asked or ("cuda" if torch.cuda.is_available() else "cpu")


def peek(argv: Sequence[str] | None, key: str, default: Path | None, otherwise: str) -> str:
    """The value a top-level setting will have, before the parser that needs to know it is built."""
    argv = list(sys.argv[1:] if argv is None else argv)
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


def _complete_switches(flags: list[str], kind: type, options: dict[str, type]) -> list[str]:
    """`--resume` alone means `--resume true`, for every setting that is true or false."""
    groups = [("", kind), *((f"{name}.", group) for name, group in options.items())]
    switches = {
        f"--{prefix}{f.name}"
        for prefix, group in groups
        for f in dataclasses.fields(group)
        if f.type in ("bool", "bool | None")
    }
    following = [*flags[1:], "--"]
    return [
        word
        for flag, after in zip(flags, following)
        for word in ((flag, "true") if flag in switches and after.startswith("--") else (flag,))
    ]


def _complete_lists(flags: list[str], kind: type) -> list[str]:
    """`--shots 1,4,16` means `--shots [1,4,16]`; a prompt may hold commas, so that `--templates` takes one as it is."""
    groups = {f"{f.name}.": f.default_factory for f in dataclasses.fields(kind)}
    named = {prefix: group for prefix, group in groups.items() if dataclasses.is_dataclass(group)}
    inner = [(prefix, f) for prefix, group in named.items() for f in dataclasses.fields(group)]
    types = {f"--{prefix}{f.name}": f.type for prefix, f in [*(("", f) for f in dataclasses.fields(kind)), *inner]}
    of_words = {flag for flag, of in types.items() if of == "list[str]"}
    lists = of_words | {flag for flag, of in types.items() if of.startswith("list[")}
    found = []
    for before, word in zip(["", *flags], flags):
        if before in lists and not word.startswith("["):
            parts = [word] if before in ("--templates", "--server.stop") else [part.strip() for part in word.split(",")]
            word = json.dumps(parts) if before in of_words else f"[{word}]"
        found.append(word)
    return found


def _split(argv: list[str]) -> tuple[list[Path], list[str]]:
    """The config files named in a command line, and the rest of it."""
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    finder.add_argument("--config", action="append", type=Path, default=[])
    found, rest = finder.parse_known_args(argv)
    return found.config, rest


def _check_file(path: Path, known: list[str]) -> None:
    """Names in a config file, before their values are looked at: each must be a setting."""
    if not path.is_file():
        there = sorted(p.name for p in (Path(__file__).parents[1] / "configs").glob("*.yaml"))
        raise UserError(f"no config at {path}; in configs/: {', '.join(there)}")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no settings: expected lines like `name: example`")
    groups = {key.split(".")[0] for key in known if "." in key}
    for name, value in content.items():
        if name in groups and not isinstance(value, dict):
            raise UserError(f"{path}: {name} is a group of settings, not {value!r}; put them below it, indented")
        for key in [f"{name}.{inner}" for inner in value] if name in groups else [name]:
            if key not in known:
                raise UserError(f"{path}: there is no setting {key}. {nearest(key, known)}")


def _keys(kind: type, options: dict[str, type]) -> list[str]:
    keys = []
    for prefix, group in [("", kind), *((f"{name}.", group) for name, group in options.items())]:
        for f in dataclasses.fields(group):
            inner = f.default_factory if dataclasses.is_dataclass(f.default_factory) else None
            keys += [f"{prefix}{f.name}.{g.name}" for g in dataclasses.fields(inner)] if inner else [prefix + f.name]
    return keys


def _explain(message: str, known: list[str]) -> str:
    """jsonargparse's message on one line, with the nearest known setting where a name was wrong."""
    message = " ".join(message.split())
    if found := re.search(r"unrecognized arguments: (.*)", message):
        word = found.group(1).split()[0]
        return f"there is no setting {word.split('=')[0]}. {nearest(word.lstrip('-').split('=')[0], known)}"
    message = message.replace("<class '", "").replace("'>", "")
    if found := re.search(r'key "data\.mix[^"]*": (?:Problem with given class_path \S+: )?(.*)', message):
        why = found.group(1).replace("Expected a dot import path string:", "found")
        return f"""data.mix takes a list: '[{{"dataset": "mnist", "n": 500}}]' ({why})"""
    return message
