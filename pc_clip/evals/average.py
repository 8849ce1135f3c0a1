"""Averaging the weights of the model before and after finetuning (WiSE-FT, Wortsman et al. 2022).

    weights(alpha) = (1 - alpha) * start + alpha * end

alpha = 0 is the untrained model, alpha = 1 the finetuned one. What finetuning wins and what it costs often do
not move together along that line, so a point between can have most of one at little of the other. The point is
chosen on validation images and reported on test images.
"""

from __future__ import annotations

import copy
import dataclasses
import logging

import torch
import torch.nn.functional as F
from torch import Tensor

from pc_clip.clip import Clip, blend
from pc_clip.config import EvaluateConfig
from pc_clip.datasets import READERS, Dataset, held_out
from pc_clip.embeddings import pixels
from pc_clip.errors import UserError
from pc_clip.evals import Curve, Result, Subject, difference, mean, zeroshot

log = logging.getLogger(__name__)

METRICS = ("zeroshot", "difference", "two_way")
JUDGED = ("zeroshot", "difference")  # what alpha is chosen by, each with the same weight
RULE = "the alpha with the largest mean of {} on validation images; of equal ones the smallest"

NEEDS = "a data set with classes and a split to choose alpha on, and --checkpoint a finetuned model"


def applies(data: Dataset, config: EvaluateConfig) -> bool:
    return bool(data.questions and config.checkpoint) and data.name in READERS and held_out(data) is not None


def also_reads(data: Dataset) -> str | None:
    """The split that alpha is chosen on."""
    return held_out(data)


def lacks(subject: Subject) -> str | None:
    """Why there is nothing to average, which only the weights can tell; None when there is."""
    if subject.base is None:
        return (
            "mode average needs the weights from before finetuning, and those of "
            f"{subject.clip.describe()} are not at hand; name them with --model.pretrained"
        )
    if subject.base.weights_hash() == subject.clip.weights_hash():
        return (
            f"mode average needs a finetuned model, and the weights are those of {subject.base.describe()} "
            "itself; name another one with --checkpoint"
        )
    return None


def evaluate(subject: Subject) -> Result:
    """Zero-shot and difference accuracy at each alpha of the settings, and at 0 and 1.

    Metrics: average_* at the chosen alpha, start_* at 0, end_* at 1, all on the images that are reported on.
    Where the data set has no graded attributes there is zeroshot alone. Besides the two models one copy of
    the weights is held. Raises UserError when there is nothing to average or to choose on.
    """
    if why := lacks(subject):
        raise UserError(why)
    alphas = sorted({0.0, 1.0, *subject.config.alphas})
    if alphas[0] < 0 or alphas[-1] > 1:
        raise UserError(f"alphas are {alphas[0]:g} to {alphas[-1]:g}; weights are averaged with 0 to 1")
    chosen_on = Subject(subject.clip, lambda: subject.base, subject.validation().data, subject.config)
    splits = {"validation": chosen_on, "test": subject}
    frozen = subject.base.image_tower_hash() == subject.clip.image_tower_hash()
    if not frozen:
        images = sum(len(split.data) for split in splits.values())
        log.info("  the image tower was finetuned too: %d images for each of %d alphas", images, len(alphas) - 2)
    found: dict[float, dict[str, Result]] = {}
    mixed = dataclasses.replace(subject.clip, model=copy.deepcopy(subject.clip.model))
    for alpha in alphas:
        _load_blend(mixed, subject.base, subject.clip, alpha)
        found[alpha] = {name: _measure(_at(alpha, mixed, split, frozen)) for name, split in splits.items()}
    return _report(found, len(subject.data))


def choose(judged: dict[float, dict[str, float]]) -> tuple[float, str]:
    """The alpha by the rule, and the rule in words. judged: alpha -> metric -> its value on validation images."""
    names = [name for name in JUDGED if all(name in values for values in judged.values())]
    best = max(judged, key=lambda alpha: (mean([judged[alpha][name] for name in names]), -alpha))
    return best, RULE.format(" and ".join(names))


def _report(found: dict[float, dict[str, Result]], n: int) -> Result:
    """The table of all alphas, the one that was chosen, and the curves."""
    table = {a: {split: result.metrics for split, result in at.items()} for a, at in found.items()}
    best, rule = choose({alpha: at["validation"] for alpha, at in table.items()})
    points = {"average": best, "start": 0.0, "end": 1.0}
    metrics = {f"{point}_{name}": value for point, a in points.items() for name, value in table[a]["test"].items()}
    intervals = {
        f"{point}_{name}": interval
        for point, a in points.items()
        for name, interval in found[a]["test"].intervals.items()
    }
    series = {
        f"{name}, {split}": [(alpha, at[split][name]) for alpha, at in table.items()]
        for split in ("test", "validation")
        for name in METRICS
        if all(name in at[split] for at in table.values())
    }
    curve = Curve("Weights between the start (0) and the finetuned model (1)", "alpha", "accuracy", series, best)
    details = {"alpha": best, "rule": rule, "table": [{"alpha": alpha, **at} for alpha, at in table.items()]}
    return Result(metrics, n, details, intervals=intervals, curves=[curve])


def _measure(subject: Subject) -> Result:
    """Zero-shot accuracy and, where the data set grades attributes, difference accuracy."""
    parts = [zeroshot.evaluate(subject)]
    if subject.attributes:
        parts.append(difference.evaluate(subject))
    metrics = {name: part.metrics[name] for part in parts for name in METRICS if name in part.metrics}
    intervals = {name: part.intervals[name] for part in parts for name in METRICS if name in part.intervals}
    return Result(metrics, len(subject.data), intervals=intervals)


@torch.no_grad()
def _load_blend(mixed: Clip, start: Clip, end: Clip, alpha: float) -> None:
    """Put the average into `mixed`, a weight at a time, so that no further copy of the model is made."""
    a, b = start.model.state_dict(), end.model.state_dict()
    if a.keys() != b.keys():
        raise UserError(f"the weights of {start.describe()} and {end.describe()} are of two architectures")
    for name, value in mixed.model.state_dict().items():
        value.copy_(blend({name: a[name]}, {name: b[name]}, alpha)[name])


def _at(alpha: float, mixed: Clip, split: Subject, frozen: bool) -> Subject:
    """The averaged model on the images of a split; those are encoded only where its image tower is a new one."""
    config = dataclasses.replace(split.config, differences=None)  # sentences of a file have no validation split
    subject = Subject(mixed, lambda: split.base, split.data, config)
    z = split.z if frozen or alpha == 1 else split.base_z if alpha == 0 else _encode(mixed, split)
    subject.__dict__.update(z=z, base_z=split.base_z)  # in place of what the cached properties would compute
    return subject


def _encode(clip: Clip, split: Subject) -> Tensor:
    """Unit image embeddings by a model that exists for a moment, and so has no place in the cache.  -> [N, D]"""
    batches = pixels(clip, split.data, split.config.batch_size, split.config.workers)
    with torch.no_grad():
        z = torch.cat([clip.encode_image(batch.to(clip.device)).float().cpu() for batch in batches])
    return F.normalize(z, dim=-1)
