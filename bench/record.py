"""Where benchmarks put their figures: results.csv, and RESULTS.md for people.

A ratio is taken against a reference in turn with it, in one process, because times on a shared machine drift.
A figure may have limits; `record` says which were missed, and a script that missed one exits with 1.
"""

from __future__ import annotations

import math
import os
import platform
import sys
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import torch

from pc_clip.core import environment
from pc_clip.core.files import write_text

HERE = Path(__file__).parent
COLUMNS = ["name", "ratio", "floor", "most", "unit", "note", "date", "machine"]
DIGITS = 6  # significant ones: enough to tell a cosine of 0.99989 from one of 0.9999


@dataclass
class Figure:
    """One figure.

    ratio: the ratio or the amount, in `unit`. floor: what it has to reach; most: what it must not pass; NaN where
    nothing was asked of it.
    """

    name: str
    ratio: float
    floor: float
    unit: str
    note: str = ""
    most: float = math.nan


class Missed(NamedTuple):
    """A figure that missed a limit: which, what it was, and what was asked of it ("at least 5 x")."""

    name: str
    value: float
    limit: str


def record(figures: list[Figure]) -> list[Missed]:
    """Put figures into results.csv, in place of older ones of the same name on this machine, and print them.

    Returns those that missed a limit. What is judged is what is written, six digits of it; NaN misses every limit.
    """
    path, machine, day = HERE / "results.csv", describe_machine(), date.today().isoformat()
    rows = [
        (f.name, float(f"{f.ratio:.{DIGITS}g}"), float(f.floor), float(f.most), f.unit, f.note, day, machine)
        for f in figures
    ]
    new = pd.DataFrame(rows, columns=COLUMNS)
    old = pd.read_csv(path).reindex(columns=COLUMNS) if path.is_file() else new.iloc[:0]
    kept = old[~((old.machine == machine) & old.name.isin(new.name))]
    table = pd.concat([kept, new], ignore_index=True) if len(kept) else new
    write_text(path, table.to_csv(index=False))
    write_text(HERE / "RESULTS.md", render(table))
    for row in new.itertuples():
        print(f"{row.name}: {row.ratio:.{DIGITS}g} {row.unit}{_verdict(row)}{f' ({row.note})' if row.note else ''}")
    return [Missed(row.name, row.ratio, f"{_limit(row)} {row.unit}") for row in new.itertuples() if _met(row) is False]


def exit_if_missed(missed: list[Missed]) -> None:
    """Name the limits that were missed, and leave with 1. Returns where none was."""
    for name, value, limit in missed:
        print(f"missed: {name} is {value:.{DIGITS}g}, asked was {limit}", file=sys.stderr)
    if missed:
        sys.exit(1)


def render(table: pd.DataFrame) -> str:
    """results.csv as people read it, a section a machine and day."""
    lines = ["# Benchmarks", "", "Written by the scripts in `bench/`; the same figures are in `results.csv`.", ""]
    for (machine, day), rows in table.groupby(["machine", "date"], sort=False):
        lines += [f"## {machine}, {day}", "", "| what | figure | asked | met | |", "|---|---|---|---|---|"]
        for row in rows.itertuples():
            met = {True: "yes", False: "**no**", None: ""}[_met(row)]
            note = "" if pd.isna(row.note) else row.note
            lines.append(f"| {row.name} | {row.ratio:.{DIGITS}g} {row.unit} | {_limit(row)} | {met} | {note} |")
        lines.append("")
    return "\n".join(lines)


def _limit(row: tuple) -> str:
    """What was asked of a row of the table, in words; empty where nothing was."""
    limits = {"at least": row.floor, "at most": row.most}
    return ", ".join(f"{word} {value:g}" for word, value in limits.items() if not pd.isna(value))


def _met(row: tuple) -> bool | None:
    """Whether a row keeps its limits; None without any."""
    if pd.isna(row.floor) and pd.isna(row.most):
        return None
    return bool((pd.isna(row.floor) or row.ratio >= row.floor) and (pd.isna(row.most) or row.ratio <= row.most))


def _verdict(row: tuple) -> str:
    return "" if _met(row) is None else f", {_limit(row)}: {'met' if _met(row) else 'MISSED'}"


def describe_machine() -> str:
    """What figures depend on: system, processor, GPU, versions."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    versions = environment.describe()["versions"]
    machine = f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPU cores ({_processor()}), {gpu}"
    return f"{machine}, Python {platform.python_version()}, torch {versions['torch']}"


def _processor() -> str:
    """The processor's name, and whether it multiplies in bf16 by itself, on which all ratios in bf16 depend."""
    known = torch.cpu.get_capabilities()
    name = " ".join((known.get("cpu_name") or platform.processor() or "unknown processor").split())
    return ", ".join([name, *(f"{kind} {'yes' if known.get(kind) else 'no'}" for kind in ("avx512_bf16", "amx_bf16"))])
