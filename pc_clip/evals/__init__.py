"""What is measured, one file an evaluation: `evals/NAME.py` is `--mode NAME`.

Its settings, if it has some, are a dataclass in core/config/evaluate.py, which also lists all evaluations.

Such a file has

    applies(data, config)    whether data set and settings have what it needs
    NEEDS                    what that is, in words, for the error
    evaluate(subject)        -> Result
    lacks(subject)           optional: why the weights do not allow it, in words; None when they do
    also_reads(subject)      optional: what is known of another split that its figures depend on, or None
    VERSION                  optional: of what its figures mean; results of another one are measured again

All get image embeddings from the cache; none encodes an image twice, except average where the image tower
was finetuned too.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from pc_clip.core.config.evaluate import EVALUATIONS, EvaluateConfig
from pc_clip.core.errors import UserError, check_choice
from pc_clip.core.random import stream
from pc_clip.data import attributes
from pc_clip.data.dataset import Attribute, Dataset, subset
from pc_clip.data.embeddings import embed_images
from pc_clip.data.registry import held_out, open_dataset
from pc_clip.models.clip import SCRATCH, Clip

log = logging.getLogger(__name__)

CHOSEN_ON = 10_000  # images of another split that settings are chosen on, at most; drawn by seed


class Curve(NamedTuple):
    """A figure over a setting: series name -> [(x, y), ...]. `marked` is the x that was chosen, if one was."""

    title: str
    x: str
    y: str
    series: dict[str, list[tuple[float, float]]]
    marked: float | None = None


class Picture(NamedTuple):
    """A picture, and in words what it shows, for those who cannot see it."""

    image: Image.Image
    alt: str


@dataclass
class Result:
    """What an evaluation found.

    metrics: fractions by name; n: how many items they are over; intervals: metric -> its bootstrap 95 %
    interval; details: whatever explains them; curves, and pictures by file name, are for people to look at; items:
    metric -> one number an item, in the data set's order, whose mean is the metric but for rounding, so that two
    checkpoints can be compared item by item. It is a share, or a score like CIDEr; where items were asked about
    unequally often, the share times how often this one was, over the mean of that.
    """

    metrics: dict[str, float]
    n: int
    details: dict[str, Any] = field(default_factory=dict)
    pictures: dict[str, Picture] = field(default_factory=dict)
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict)
    curves: list[Curve] = field(default_factory=list)
    items: dict[str, list[float]] = field(default_factory=dict)


@dataclass
class Subject:
    """The model under evaluation, the model it was before finetuning, and the data.

    find_base loads the untrained model when an evaluation first asks for it.
    """

    clip: Clip
    find_base: Callable[[], Clip | None]
    data: Dataset
    config: EvaluateConfig
    _opened: dict[tuple[str, str], Dataset] = field(default_factory=dict, init=False, repr=False)

    def open(self, split: str, missing: str = "") -> Dataset:
        """Another split of the data set, opened once however many evaluations ask for it.

        missing: what its absent pictures mean, as the settings say unless told otherwise; "keep" where none is read.
        """
        key = split, missing or self.config.missing
        if key not in self._opened:
            self._opened[key] = open_dataset(self.data.name, self.config.root, split, missing=key[1])
        return self._opened[key]

    @cached_property
    def base(self) -> Clip | None:
        """The untrained model; None when it is not known or its weights are not at hand: its baselines are left out."""
        found = self.find_base()
        if found is None:
            log.info("baselines of the untrained model are left out: --model.pretrained names its weights")
        return found

    @cached_property
    def z(self) -> Tensor:
        """Unit image embeddings. [N, D]"""
        return self._embed(self.clip, self.data)

    @cached_property
    def base_z(self) -> Tensor | None:
        """Unit image embeddings of the untrained model; those of the model itself where the towers are the same."""
        if self.base is None:
            return None
        same = self.base.image_tower_hash() == self.clip.image_tower_hash()
        return self.z if same else self._embed(self.base, self.data)

    @cached_property
    def attributes(self) -> tuple[Attribute, ...]:
        """What images are asked about: the data set's own attributes and the tasks of data/attributes/."""
        return attributes.of(self.data, self.config)

    def validation(self) -> Subject:
        """The same model on images that are not reported on, for choosing. Raises UserError where there are none."""
        split = held_out(self.data)
        if split is None:
            whole = self.data.split or "the whole"
            raise UserError(f"{self.data.name} has no split to choose on besides {whole}; --split test may leave one")
        data = self.open(split)
        if len(data) > CHOSEN_ON:  # choosing among a few settings needs no more, and a train split may be large
            rng = stream(self.config.seed, "validation images")
            data = subset(data, np.sort(rng.choice(len(data), CHOSEN_ON, replace=False)))
        return Subject(self.clip, self.find_base, data, self.config)

    def _embed(self, clip: Clip, data: Dataset) -> Tensor:
        found = embed_images(clip, data, batch_size=self.config.batch_size, workers=self.config.workers)
        return F.normalize(found.z, dim=-1)


def find(name: str) -> ModuleType:
    """The module of an evaluation. Raises UserError for an unknown one."""
    check_choice("mode", name, EVALUATIONS)
    return importlib.import_module(f"{__name__}.{name}")


def base_of(clip: Clip) -> Clip | None:
    """The model a checkpoint was finetuned from; None when it cannot be had, or there was none."""
    if clip.pretrained == SCRATCH:
        return None
    try:
        return Clip.create(clip.name, clip.pretrained, device=clip.device)
    except UserError:
        return None


def mean(values: list[float]) -> float:
    return float(torch.tensor(values, dtype=torch.float64).mean())


def results_folder(config: EvaluateConfig, label: str) -> Path:
    return Path(config.out) / (config.label or label)
