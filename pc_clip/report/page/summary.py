"""Results side by side: which variants there are, and each figure's mean, spread and interval.

NAME-seed0, NAME-seed1, ... are seeds of one variant, as study.py labels them. One question asked of one data
set by one evaluation is a block.
"""

from __future__ import annotations

import math
import os
import re
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pc_clip.core.errors import check_choice
from pc_clip.report.page.gather import Found, Gathered, Run
from pc_clip.report.page.words import is_share

_SEED = re.compile(r"(.+)-seed(\d+)")
_ORDER = (
    "zeroshot",
    "difference",
    "rank",
    "comparative",
    "extended",
    "probe",
    "retrieve",
    "batches",
    "relations",
    "compositional",
)  # to read
MOST_MAIN = 8  # figures of an evaluation that are shown at once; the others are behind a click


@dataclass(frozen=True)
class Variant:
    """style: the number of its colour and dashes, 0 for the baseline."""

    name: str
    baseline: bool
    style: int


@dataclass(frozen=True)
class Figure:
    """mean over the seeds; std of the sample, None for one seed; low and high, the interval of a single result."""

    mean: float
    std: float | None
    low: float | None
    high: float | None
    seeds: int
    n: int | None


@dataclass
class Block:
    """One evaluation on one data set about one thing. results: variant -> its results, a seed each, in order."""

    evaluation: str
    dataset: str
    about: str
    metrics: list[str] = field(default_factory=list)
    main: list[str] = field(default_factory=list)
    shares: dict[str, bool] = field(default_factory=dict)
    figures: dict[tuple[str, str], Figure] = field(default_factory=dict)
    results: dict[str, list[Found]] = field(default_factory=dict)

    @property
    def title(self) -> str:
        return f"{self.evaluation} on {self.dataset}" + (f": {self.about.replace('_', ' ')}" if self.about else "")

    @property
    def n(self) -> int | None:
        counts = [figure.n for figure in self.figures.values() if figure.n is not None]
        return max(counts) if counts else None


@dataclass
class Summary:
    """blocks in reading order; variants, the baseline first; runs: variant -> its runs."""

    variants: list[Variant]
    blocks: list[Block]
    runs: dict[str, list[Run]]

    def measured(self) -> dict[str, int]:
        """Variants that have results, and of how many seeds."""
        seeds = {v.name: [len(block.results.get(v.name, ())) for block in self.blocks] for v in self.variants}
        return {name: max(counts) for name, counts in seeds.items() if any(counts)}

    def variant(self, name: str) -> Variant:
        return next(v for v in self.variants if v.name == name)

    def baselines(self) -> list[Variant]:
        return [v for v in self.variants if v.baseline]

    def before(self, block: Block, name: str) -> str | None:
        """The baseline that a variant is compared with: its study's own where there are several."""
        known = [v.name for v in self.baselines() if v.name in block.results and v.name != name]
        near = [b for b in known if b.rpartition("/")[0] == name.rpartition("/")[0]]
        return (near or known or [None])[0]


def summarise(found: Gathered, baseline: str | None = None) -> Summary:
    """baseline: a variant's name; the pretrained model's when not given. Raises UserError when it names none."""
    named = _names([(r.file.resolve().parent.parent, r.content["model"]) for r in found.results])
    ran = _names([(run.folder.resolve().parent, run.folder.resolve().name) for run in found.runs])
    names = list(dict.fromkeys(variant for variant, _ in named + ran))
    if baseline is not None:
        check_choice("--baseline", baseline, names)
    is_base = {name: name == baseline if baseline is not None else _is_pretrained(name) for name in names}
    names.sort(key=lambda name: not is_base[name])  # stable: else in the order they came
    style, variants = 0, []
    for name in names:
        style += not is_base[name]
        variants.append(Variant(name, is_base[name], 0 if is_base[name] else style))
    runs: dict[str, list[Run]] = {}
    for run, (variant, _) in sorted(zip(found.runs, ran), key=lambda pair: pair[1][1] or 0):
        runs.setdefault(variant, []).append(run)
    blocks = _blocks(list(zip(found.results, named)), found)
    for block in blocks:
        block.results = {name: block.results[name] for name in names if name in block.results}
        _measure(block)
    return Summary(variants, blocks, runs)


def split(label: str) -> tuple[str, int | None]:
    """A label's variant and seed: "pc-seed2" is ("pc", 2), "base" is ("base", None)."""
    match = _SEED.fullmatch(label)
    return (match[1], int(match[2])) if match else (label, None)


def _is_pretrained(name: str) -> bool:
    """The model before finetuning: study.py calls it base, run.py MODEL-pretrained."""
    own = name.rpartition("/")[2]
    return own in ("base", "pretrained") or own.endswith("-pretrained")


def _names(labels: Sequence[tuple[Path, str]]) -> list[tuple[str, int | None]]:
    """Variant and seed of each (folder, label). Two folders that use one name have theirs put before it."""
    parts = [(folder, *split(label)) for folder, label in labels]
    folders: dict[str, set[Path]] = {}
    for folder, variant, _ in parts:
        folders.setdefault(variant, set()).add(folder)
    if all(len(used) == 1 for used in folders.values()):
        return [(variant, seed) for _, variant, seed in parts]
    every = {folder for folder, _, _ in parts}
    short = {folder: folder.name for folder in every}
    if len(set(short.values())) < len(every):  # results/photo here and results/photo there
        common = os.path.commonpath(every)
        short = {folder: os.path.relpath(folder, common) for folder in every}
    return [(f"{short[folder]}/{variant}", seed) for folder, variant, seed in parts]


def _blocks(named: Iterable[tuple[Found, tuple[str, int | None]]], found: Gathered) -> list[Block]:
    """Results by what was asked. Of two answers of one model and seed the newer counts, the other is named."""
    blocks: dict[tuple[str, str, str], Block] = {}
    newest: dict[tuple, Found] = {}
    for result, (variant, seed) in named:
        content = result.content
        key = (content["evaluation"], content["dataset"], str(content.get("about") or ""))
        other = newest.get((key, variant, seed))
        if other is not None:
            older, result = sorted((other, result), key=lambda r: str(r.content.get("date") or ""))
            found.skipped.append((older.shown, f"{result.shown} answers the same question and is newer"))
        newest[key, variant, seed] = result
    for (key, variant, _), result in sorted(newest.items(), key=lambda item: item[0][2] or 0):
        block = blocks.setdefault(key, Block(*key))
        block.results.setdefault(variant, []).append(result)
    order = list(dict.fromkeys(key for key, _, _ in newest))
    order.sort(key=lambda key: _ORDER.index(key[0]) if key[0] in _ORDER else len(_ORDER))
    return [blocks[key] for key in order]


def _measure(block: Block) -> None:
    every = [result.content for results in block.results.values() for result in results]
    block.metrics = list(dict.fromkeys(metric for content in every for metric in content["metrics"]))
    parts = {part for content in every for part in _parts(content.get("details"))}
    whole = [m for m in block.metrics if not any(m.endswith(f"_{part}") for part in parts)]
    block.main = (whole or block.metrics)[:MOST_MAIN]
    for metric in block.metrics:
        values = [content["metrics"].get(metric) for content in every]
        block.shares[metric] = is_share(metric, [v for v in values if v is not None])
    for variant, results in block.results.items():
        for metric in block.metrics:
            figure = _figure([result.content for result in results], metric)
            if figure is not None:
                block.figures[variant, metric] = figure


def _parts(details: Any) -> list[str]:
    """What an evaluation split its figures by: questions, attributes, kinds of rows; the keys of its details."""
    if not isinstance(details, dict):
        return []
    rows = details.get("rows")
    return [key for key, value in details.items() if isinstance(value, dict)] + list(
        rows if isinstance(rows, dict) else []
    )


def _figure(contents: Sequence[dict[str, Any]], metric: str) -> Figure | None:
    values = [content["metrics"].get(metric) for content in contents]
    values = [float(value) for value in values if value is not None and math.isfinite(value)]
    if not values:
        return None
    std = statistics.stdev(values) if len(values) > 1 else None
    low, high = interval(contents[0], metric) if len(contents) == 1 else (None, None)
    counts = [content.get("n") for content in contents]
    n = max((c for c in counts if isinstance(c, int)), default=None)
    return Figure(statistics.fmean(values), std, low, high, len(values), n)


def interval(content: dict[str, Any], metric: str) -> tuple[float | None, float | None]:
    """A figure's interval, where the result has one."""
    known = content.get("intervals")
    found = known.get(metric) if isinstance(known, dict) else None
    if isinstance(found, list) and len(found) == 2 and all(isinstance(v, int | float) for v in found):
        low, high = map(float, found)
        if math.isfinite(low) and math.isfinite(high):
            return low, high
    return None, None


def distinct(results: Iterable[Found | Run], read: Callable[[dict[str, Any]], Any]) -> list[str]:
    """What results say of themselves, each answer once, in order; nothing for those that do not say."""
    contents = (item.about if isinstance(item, Run) else item.content for item in results)
    return list(dict.fromkeys(str(value) for content in contents if (value := read(content))))
