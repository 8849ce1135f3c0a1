"""What a study's YAML says: its variants, one by one or as grids, and how they are judged."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from itertools import product
from pathlib import Path
from typing import Any

import yaml

from pc_clip.core.errors import UserError, nearest
from pc_clip.core.paths import configs_folder

STUDIES = configs_folder() / "studies"
_PLACEHOLDER = re.compile(r"\{(\w+)\}")
_RUN = re.compile(r"\{([\w.+-]+)\}")  # names of variants have hyphens and numbers


@dataclass
class Grid:
    """Variants that differ in a few settings, one for each combination of values; the last value changes fastest.

    variant: their name; arguments: those of finetune.py. Both hold placeholders such as {k}. values: placeholder ->
    what stands in its place. The first placeholder is what the picture is coloured by.
    """

    variant: str
    arguments: list[Any]
    values: dict[str, list[Any]]

    def expand(self) -> Iterator[tuple[str, list[str], str]]:
        """(name, arguments, group) of each variant. Raises UserError for an unknown placeholder, or for no values."""
        if not isinstance(self.values, dict) or not self.values:
            raise UserError(f"values of the grid {self.variant!r} must name each placeholder with a list of values")
        for name, values in self.values.items():
            if not isinstance(values, list) or not values:
                raise UserError(f"{name} of the grid {self.variant!r} is {values!r}; it must be a list of values")
        first = next(iter(self.values))
        for combination in product(*self.values.values()):
            chosen = {str(name): value for name, value in zip(self.values, combination)}
            arguments = [self._filled(str(argument), chosen) for argument in self.arguments]
            yield self._filled(self.variant, chosen), arguments, f"{first} {chosen[str(first)]}"

    def _filled(self, text: str, chosen: dict[str, Any]) -> str:
        for name in _PLACEHOLDER.findall(text):
            if name not in chosen:
                raise UserError(f"the grid {self.variant!r} has no values for {{{name}}}. {nearest(name, chosen)}")
        return _PLACEHOLDER.sub(lambda match: str(chosen[match[1]]), text)


@dataclass
class Study:
    """What a study's YAML says.

    variants: name -> arguments of finetune.py, or null for the model as it was. {NAME} among these stands for the run
    of the variant NAME with the same seed, which is then trained first; it must come earlier. grid: more of them, as
    combinations.
    evaluations: lists of arguments of run.py. metrics: the figures of the table. prepare: commands run once before,
    each a list. runs: the study whose runs are evaluated; its own unless named. baselines: variants that do not
    compete. chosen_on: the data set the best of the others is chosen on, by the mean of the metrics choose_by; it is
    then left out of table and picture. against: the variant that all others are compared with, image by image.
    intervals: whether the table shows 95 % intervals.
    """

    name: str
    evaluations: list[list[str]]
    metrics: list[str]
    variants: dict[str, list[str] | None] = field(default_factory=dict)
    grid: list[Grid] = field(default_factory=list)
    prepare: list[list[str]] = field(default_factory=list)
    runs: str = ""
    baselines: list[str] = field(default_factory=list)
    chosen_on: str = ""
    choose_by: list[str] = field(default_factory=list)
    against: str = ""
    intervals: bool = False
    groups: dict[str, str] = field(default_factory=dict, init=False)  # variant of a grid -> its first value

    def __post_init__(self) -> None:
        self.variants = dict(self.variants)
        self.grid = [each if isinstance(each, Grid) else Grid(**each) for each in self.grid]
        for grid in self.grid:
            for name, arguments, group in grid.expand():
                if name in self.variants:
                    raise UserError(f"two variants of study {self.name} are called {name!r}; see the grid's `variant`")
                self.variants[name], self.groups[name] = arguments, group
        if not self.variants:
            raise UserError(f"study {self.name} has no variants; it needs `variants` or `grid`")
        if bool(self.chosen_on) != bool(self.choose_by):
            raise UserError(f"study {self.name} needs both `chosen_on` and `choose_by`, or neither")
        trained: list[str] = []
        for name, arguments in self.variants.items():
            self._check(f"variant {name!r}", self.needs(name), trained)
            trained += [name] if arguments is not None else []
        self._check("choose_by", self.choose_by, self.metrics)
        self._check("baselines", self.baselines, self.variants)
        self._check("against", [self.against] if self.against else [], self.variants)

    def _check(self, key: str, found: Any, known: Any) -> None:
        if not isinstance(found, list):
            raise UserError(f"{key} of study {self.name} is {found!r}; it must be a list")
        for name in found:
            if name not in known:
                raise UserError(f"{key} of study {self.name} names {name!r}. {nearest(str(name), known)}")

    def needs(self, variant: str) -> list[str]:
        """The variants whose runs its arguments name."""
        return [name for argument in self.variants[variant] or [] for name in _RUN.findall(str(argument))]

    def arguments(self, variant: str, runs: Callable[[str], Path]) -> list[str]:
        """Its arguments with the runs of others in their places. runs: where that of a variant is."""
        return [_RUN.sub(lambda match: str(runs(match[1])), str(a)) for a in self.variants[variant]]

    @property
    def results(self) -> Path:
        return Path("results") / self.name

    @property
    def competitors(self) -> list[str]:
        return [name for name in self.variants if name not in self.baselines]

    def members(self, seeds: list[int]) -> list[tuple[str, int | None]]:
        """(variant, seed) of all that is measured, in order. The model as it was has no seed."""
        every = self.variants.items()
        return [(name, seed) for name, arguments in every for seed in (seeds if arguments is not None else [None])]

    def only(self, patterns: list[str]) -> Study:
        """The same with those variants alone whose name matches a pattern, and what these begin with.

        Raises UserError when none does.
        """
        chosen = {n for n in self.variants if any(fnmatchcase(n, pattern) for pattern in patterns)}
        for name in reversed(self.variants):
            chosen |= set(self.needs(name)) if name in chosen else set()
        kept = {n: a for n, a in self.variants.items() if n in chosen}
        if not kept:
            known = nearest(patterns[0], self.variants)
            raise UserError(f"--only {' '.join(patterns)} matches no variant of study {self.name}. {known}")
        baselines = [name for name in self.baselines if name in kept]
        against = self.against if self.against in kept else ""
        found = replace(self, variants=kept, grid=[], baselines=baselines, against=against)
        found.groups = {name: group for name, group in self.groups.items() if name in kept}
        return found

    @classmethod
    def read(cls, path: Path) -> Study:
        """Raises UserError for a file that is absent or is no study."""
        if not path.is_file():
            known = ", ".join(sorted(p.name for p in STUDIES.glob("*.yaml")))
            raise UserError(f"no study at {path}; in configs/studies: {known}")
        try:
            return cls(**yaml.safe_load(path.read_text(encoding="utf-8")))
        except (TypeError, ValueError, yaml.YAMLError) as error:
            raise UserError(
                f"{path} is no study ({error}); it needs name, evaluations, metrics, and variants or grid"
            ) from error


def label(variant: str, seed: int | None) -> str:
    """What a variant's run and results are called."""
    return variant if seed is None else f"{variant}-seed{seed}"
