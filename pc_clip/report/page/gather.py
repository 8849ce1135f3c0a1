"""What lies in the files given: results of run.py, runs of finetune.py, and what could not be read.

A file that is cut short stops nothing: it is kept by name, with the reason, to be shown to the user.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from pc_clip.core.errors import UserError

METRICS = "metrics.jsonl"
RESULT_KEYS = {"model", "evaluation", "dataset", "metrics"}

# Characters that no page, and often no file, can hold: control characters, halves of surrogate pairs.
_UNPRINTABLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")


@dataclass(frozen=True)
class Found:
    """A result: its file, the name it goes by on the page (no path of the machine), and what it holds."""

    file: Path
    shown: str
    content: dict[str, Any]


@dataclass(frozen=True)
class Run:
    """A finetuning: what it logged, a dict a line; its settings and surroundings, empty where they are not known."""

    folder: Path
    shown: str
    rows: list[dict[str, float]]
    config: dict[str, Any]
    about: dict[str, Any]


@dataclass
class Gathered:
    """skipped: (file, why) of all that could not be used."""

    results: list[Found] = field(default_factory=list)
    runs: list[Run] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)


def gather(paths: Iterable[Path]) -> Gathered:
    """Results and runs in files and below folders. Raises UserError for a path that is not there, or for nothing."""
    paths, found, seen = list(paths), Gathered(), set()
    for given in paths:
        for file, shown in files_below(given):
            if file.resolve() in seen:
                continue
            seen.add(file.resolve())
            try:
                _take(found, file, shown, named=file == given)
            except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
                found.skipped.append((shown, _reason(error)))
    if not found.results and not found.runs:
        broken = "".join(f"; {name}: {why}" for name, why in found.skipped[:3])
        raise UserError(f"no results and no runs in {', '.join(map(str, paths))}; run.py writes them{broken}")
    return found


def files_below(given: Path) -> Iterator[tuple[Path, str]]:
    """Every file that may be a result or a run's log, with a name that begins at what was given."""
    if not given.exists():
        raise UserError(f"no such file or folder: {given}; give a folder of results or of runs")
    if given.is_file():
        yield given, clean(given.name)
        return
    for file in sorted(given.rglob("*.json"), key=natural) + sorted(given.rglob(METRICS), key=natural):
        if file.is_file():
            yield file, clean(str(Path(given.resolve().name) / file.relative_to(given)))


def natural(path: Path) -> tuple[list[list[str | int]], str]:
    """A key that sorts names as people count: k2 comes before k16."""
    parts = [re.split(r"(\d+)", part) for part in path.parts]
    return [[int(piece) if piece.isdecimal() else piece for piece in part] for part in parts], str(path)


def read_result(file: Path) -> dict[str, Any] | None:
    """The result in a JSON file; None for a JSON of another kind. Raises ValueError for one that is broken."""
    content = clean(_load(file.read_text(encoding="utf-8")))
    if not isinstance(content, dict) or not content.keys() >= RESULT_KEYS:
        return None
    if not isinstance(content["metrics"], dict) or not all(
        value is None or (isinstance(value, int | float) and not isinstance(value, bool))
        for value in content["metrics"].values()
    ):
        raise ValueError("its metrics are not all numbers")
    for name in ("model", "evaluation", "dataset"):
        if not isinstance(content[name], str):
            raise ValueError(f"its {name} is no text")
    return content


def clean(content: Any) -> Any:
    """The same with unprintable characters replaced in every text, so that what is written from it can be read."""
    if isinstance(content, str):
        return _UNPRINTABLE.sub("\N{REPLACEMENT CHARACTER}", content)
    if isinstance(content, dict):
        return {clean(key): clean(value) for key, value in content.items()}
    return [clean(value) for value in content] if isinstance(content, list) else content


def _take(found: Gathered, file: Path, shown: str, named: bool) -> None:
    if file.name == METRICS:
        found.runs.append(_run(found, file, shown))
        return
    content = read_result(file)
    if content is not None:
        found.results.append(Found(file, shown, content))
    elif named:
        found.skipped.append((shown, "it is no result of run.py"))


def _run(found: Gathered, file: Path, shown: str) -> Run:
    """A run from its log; lines that are cut short are left out and counted."""
    rows, lines = [], [line for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    for line in lines:
        try:
            row = _load(line)
        except ValueError:
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int | float) and math.isfinite(row["step"]):
            rows.append({clean(key): value for key, value in row.items() if isinstance(value, int | float)})
    if len(rows) < len(lines):
        found.skipped.append((shown, f"{len(lines) - len(rows)} of its {len(lines)} lines are broken"))
    config, about = file.with_name("config.yaml"), file.with_name("environment.json")
    return Run(
        file.parent,
        str(Path(shown).parent) if Path(shown).parent != Path() else clean(file.resolve().parent.name),
        sorted(rows, key=lambda row: row["step"]),
        _dict(yaml.safe_load(config.read_text(encoding="utf-8")) if config.is_file() else None),
        _dict(_load(about.read_text(encoding="utf-8")) if about.is_file() else None),
    )


def _load(text: str) -> Any:
    """JSON whose integers are no longer than a float can hold."""
    return json.loads(text, parse_int=lambda digits: int(digits) if len(digits) < 16 else float(digits))


def _dict(content: Any) -> dict[str, Any]:
    return clean(content) if isinstance(content, dict) else {}


def _reason(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return "it is cut short or no JSON"
    if isinstance(error, UnicodeDecodeError):
        return "it is no UTF-8 text"
    if isinstance(error, OSError):
        return error.strerror or "it cannot be read"
    return clean(str(error)).split("\n")[0]
