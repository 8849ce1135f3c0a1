"""Where benchmarks put their figures: results.csv (name, ratio, floor, unit), and RESULTS.md for people.

A ratio is taken against a reference in turn with it, in one process, because times on a shared machine drift.
"""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import pandas as pd

from pc_clip import environment

HERE = Path(__file__).parent
COLUMNS = ["name", "ratio", "floor", "unit", "note", "date", "machine"]


@dataclass
class Figure:
    """One figure. floor: what it has to reach, NaN if nothing was asked of it; unit: of the ratio or the amount."""

    name: str
    ratio: float
    floor: float
    unit: str
    note: str = ""


def record(figures: list[Figure]) -> None:
    """Put figures into results.csv, in place of older ones of the same name on this machine, and print them."""
    path, machine = HERE / "results.csv", describe_machine()
    new = pd.DataFrame(
        [(f.name, round(f.ratio, 3), f.floor, f.unit, f.note, date.today().isoformat(), machine) for f in figures],
        columns=COLUMNS,
    )
    old = pd.read_csv(path) if path.is_file() else new.iloc[:0]
    again = (old.machine == machine) & old.name.isin(new.name)
    table = pd.concat([old[~again], new], ignore_index=True) if len(old[~again]) else new
    table.to_csv(path, index=False)
    (HERE / "RESULTS.md").write_text(render(table), encoding="utf-8")
    print(new.drop(columns=["date", "machine"]).to_string(index=False))


def render(table: pd.DataFrame) -> str:
    """results.csv as people read it, a section a machine and day."""
    lines = ["# Benchmarks", "", "Written by the scripts in `bench/`; the same figures are in `results.csv`.", ""]
    for (machine, day), rows in table.groupby(["machine", "date"], sort=False):
        lines += [f"## {machine}, {day}", "", "| what | figure | floor | |", "|---|---|---|---|"]
        for row in rows.itertuples():
            floor = "" if pd.isna(row.floor) else f"{row.floor:g}"
            note = "" if pd.isna(row.note) else row.note
            lines.append(f"| {row.name} | {row.ratio:g} {row.unit} | {floor} | {note} |")
        lines.append("")
    return "\n".join(lines)


def describe_machine() -> str:
    import torch

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    versions = environment.describe()["versions"]
    machine = f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPU cores, {gpu}"
    return f"{machine}, Python {platform.python_version()}, torch {versions['torch']}"
