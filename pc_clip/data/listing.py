"""`python -m pc_clip datasets`: the data sets, found or not; `--download NAME` fetches one."""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Sequence

from pc_clip.core.errors import UserError
from pc_clip.data.registry import READERS, download, state


def main(argv: Sequence[str] | None = None) -> None:
    """List the data sets: found or not, where they are looked for, what to fetch; or download one."""
    parser = argparse.ArgumentParser(prog="python -m pc_clip datasets", description=main.__doc__)
    parser.add_argument("--download", metavar="NAME", help="Fetch this data set and unpack it.")
    parser.add_argument("--root", metavar="FOLDER", help="Where to, unless it is where the list says.")
    asked = parser.parse_args(argv)
    if asked.download:
        print(f"{asked.download} is in {download(asked.download, asked.root)}")
    elif asked.root:
        raise UserError("--root goes with --download NAME; to read a data set from there, give it to run.py")
    else:
        print(table())


def table() -> str:
    """A line a data set, and below it what is absent, how it is fetched, and its licence."""
    rows = [("name", "state", "looked for in", "size")]
    rows += [
        (name, state(name).split(":")[0], reader.root or "(embedded)", reader.size) for name, reader in READERS.items()
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
    listed = [lines[0]]
    for line, (name, reader) in zip(lines[1:], READERS.items()):
        listed.append(line)
        found = state(name)
        if found != "found":
            absent = found.partition(": ")[2]
            listed += _below(absent) + _below(reader.fetch)
        listed += _below(f"licence: {reader.licence}")
    return "\n".join(listed)


def _below(text: str) -> list[str]:
    return textwrap.wrap(
        text, 110, initial_indent="    ", subsequent_indent="    ", break_long_words=False, break_on_hyphens=False
    )
