"""Evaluations, one file each: `evals/NAME.py` is `--mode NAME`.

Its settings, if it has some, are a dataclass in core/config/evaluate.py, which also lists all evaluations.

Such a file has

    applies(data, config)    -> None, or in words what data set or settings lack
    evaluate(context)        -> Result. Raises UserError where the weights do not allow it
    also_reads(context)      optional: another split that its figures depend on, or None
    BY_NAME_ALONE            optional: whether it runs only when --mode names it

No evaluation encodes an image twice, except average where the image tower was finetuned too.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch.nn.functional as F
from torch import Tensor

from pc_clip.core.config.evaluate import EVALUATIONS, EvaluateConfig
from pc_clip.core.errors import UserError, check_choice
from pc_clip.core.paths import package_data
from pc_clip.core.random import stream
from pc_clip.data import attributes
from pc_clip.data.dataset import Attribute, Dataset, subset
from pc_clip.data.embeddings import embed_images
from pc_clip.data.groups import form_of, read_groups
from pc_clip.data.registry import open_dataset, selection_split
from pc_clip.data.statements import read_statements
from pc_clip.evals.result import Curve, Picture, Result  # noqa: F401  (evaluations have them from here)
from pc_clip.models.clip import SCRATCH, Clip
from pc_clip.models.loading import create_model, load_model

log = logging.getLogger(__name__)

COMPARISONS = package_data(Path(__file__).with_name("comparisons"))  # of classes, a file a data set
VALIDATION_IMAGES = 10_000  # used for choosing settings, at most; drawn by seed


@dataclass
class EvalContext:
    """The model under evaluation, the model it was before finetuning, and the data.

    find_base loads the untrained model when an evaluation first asks for it.
    """

    clip: Clip
    find_base: Callable[[], Clip | None]
    data: Dataset
    config: EvaluateConfig
    _splits: dict[tuple[str, str], Dataset] = field(default_factory=dict, init=False, repr=False)

    def open(self, split: str, missing: str = "") -> Dataset:
        """Another split of the data set, opened once. missing: as the setting, or "keep" where no image is read."""
        key = split, missing or self.config.missing
        if key not in self._splits:
            config = self.config
            self._splits[key] = open_dataset(self.data.name, config.root, split, missing=key[1], upright=config.upright)
        return self._splits[key]

    @cached_property
    def base(self) -> Clip | None:
        """The untrained model; None, and its baselines are left out, when its weights are not known or not at hand."""
        base = self.find_base()
        if base is None:
            log.info("baselines of the untrained model are left out: --model.pretrained names its weights")
        return base

    @cached_property
    def z(self) -> Tensor:
        """Unit image embeddings. [N, D]"""
        return self._embed(self.clip)

    @cached_property
    def base_z(self) -> Tensor | None:
        """Unit image embeddings of the untrained model; those of the model itself where the towers are the same."""
        if self.base is None:
            return None
        same = self.base.image_tower_hash() == self.clip.image_tower_hash()
        return self.z if same else self._embed(self.base)

    @cached_property
    def attributes(self) -> tuple[Attribute, ...]:
        """The data set's own attributes and the tasks of data/attributes/."""
        return attributes.of(self.data, self.config)

    @cached_property
    def statements(self) -> list[Any]:
        """Statements of the named files, else the data set's own; or groups (data/groups.py)."""
        files, config = self.config.statements, self.config
        if not files:
            return list(self.data.statements)
        return read_groups(files) if form_of(files) else read_statements(files, config.seed, config.unconfirmed)

    def selection_data(self) -> Dataset:
        """The split that settings are chosen on, where there is one besides what is reported on."""
        return self.open(selection_split(self.data))

    def validation(self) -> EvalContext:
        """The same model on held-out images, for choosing settings."""
        data = self.selection_data()
        if len(data) > VALIDATION_IMAGES:  # choosing among a few settings needs no more
            rng = stream(self.config.seed, "validation images")
            data = subset(data, np.sort(rng.choice(len(data), VALIDATION_IMAGES, replace=False)))
        return self.on(data)

    def on(self, data: Dataset) -> EvalContext:
        """The same model and settings on other images."""
        return EvalContext(self.clip, self.find_base, data, self.config)

    def _embed(self, clip: Clip) -> Tensor:
        embeddings = embed_images(clip, self.data, batch_size=self.config.batch_size, workers=self.config.workers)
        return F.normalize(embeddings.z, dim=-1)


def find(name: str) -> ModuleType:
    """The module of an evaluation. Raises UserError for an unknown one."""
    check_choice("mode", name, EVALUATIONS)
    return importlib.import_module(f"{__name__}.{name}")


def base_of(clip: Clip) -> Clip | None:
    """The model a checkpoint was finetuned from; None when it cannot be had, or there was none.

    A run remembers the hash of its start. Weights of another one are not taken for it.
    """
    start = clip.start or {}
    if clip.pretrained == SCRATCH and "checkpoint" not in start:
        return None
    try:
        if "checkpoint" in start:
            base = load_model(start["checkpoint"], device=clip.device)
        else:
            transform = dict(clip.model.visual.preprocess_cfg)
            base = create_model(clip.name, clip.pretrained, device=clip.device, preprocess=transform)
    except (UserError, OSError) as error:
        log.info("nothing is compared with the model from before finetuning, which is not at hand: %s", error)
        return None
    if "weights" in start and base.weights_hash() != start["weights"]:
        log.warning(
            "%s is not what this run began with: nothing is compared with it. --model.pretrained FILE names the start",
            start.get("checkpoint") or base.describe(),
        )
        return None
    return base
