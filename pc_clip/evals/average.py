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
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pc_clip.core.config.evaluate import EvaluateConfig
from pc_clip.core.errors import UserError
from pc_clip.data.dataset import Dataset
from pc_clip.data.embeddings import pixels
from pc_clip.data.registry import READERS, held_out
from pc_clip.evals import Curve, Result, Subject, difference, mean, zeroshot
from pc_clip.models.clip import Clip, blend

log = logging.getLogger(__name__)

METRICS = ("zeroshot", "difference", "two_way")
JUDGED = ("zeroshot", "difference")  # what alpha is chosen by, each with the same weight
RULE = "the alpha with the largest mean of {} on validation images; of equal ones the smallest"

NEEDS = "a data set with classes and a split to choose alpha on, and --checkpoint a finetuned model"


def applies(data: Dataset, config: EvaluateConfig) -> bool:
    return bool(data.questions and config.checkpoint) and data.name in READERS and held_out(data) is not None


def also_reads(subject: Subject) -> Dataset | None:
    """The split that alpha is chosen on."""
    split = held_out(subject.data)
    return subject.open(split) if split else None


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
    alphas = sorted({0.0, 1.0, *subject.config.average.alphas})
    if alphas[0] < 0 or alphas[-1] > 1:
        raise UserError(f"alphas are {alphas[0]:g} to {alphas[-1]:g}; weights are averaged with 0 to 1")
    chosen_on = Subject(subject.clip, lambda: subject.base, subject.validation().data, subject.config)
    splits = {"validation": chosen_on, "test": subject}
    _check_architecture(subject.base, subject.clip)
    frozen = subject.base.image_tower_hash() == subject.clip.image_tower_hash()
    if not frozen:
        images = sum(len(split.data) for split in splits.values())
        log.info("  the image tower was finetuned too: %d images for each of %d alphas", images, len(alphas) - 2)
    asked = {name: difference.ask(split) if split.attributes else [] for name, split in splits.items()}
    found: dict[float, dict[str, Found]] = {}
    for alpha, clip in _averages(subject.base, subject.clip, alphas):
        at = {name: _at(alpha, clip, split, frozen) for name, split in splits.items()}
        found[alpha] = {name: _measure(at[name], asked[name]) for name in splits}
    return _report(found, subject)


def choose(judged: dict[float, dict[str, float]]) -> tuple[float, str]:
    """The alpha by the rule, and the rule in words. judged: alpha -> metric -> its value on validation images."""
    names = [name for name in JUDGED if all(name in values for values in judged.values())]
    best = max(judged, key=lambda alpha: (mean([judged[alpha][name] for name in names]), -alpha))
    return best, RULE.format(" and ".join(names))


def _report(found: dict[float, dict[str, Found]], subject: Subject) -> Result:
    """The table of all alphas, the one that was chosen, and the curves."""
    table = {a: {split: of.metrics() for split, of in at.items()} for a, at in found.items()}
    best, rule = choose({alpha: at["validation"] for alpha, at in table.items()})
    points = {"average": best, "start": 0.0, "end": 1.0}
    metrics = {f"{point}_{name}": value for point, a in points.items() for name, value in table[a]["test"].items()}
    intervals = {  # of what is reported alone: drawing them takes longer than all else here
        f"{point}_{name}": interval
        for point, a in points.items()
        for name, interval in found[a]["test"].intervals(subject.config.seed).items()
    }
    series = {
        f"{name}, {split}": [(alpha, at[split][name]) for alpha, at in table.items()]
        for split in ("test", "validation")
        for name in METRICS
        if all(name in at[split] for at in table.values())
    }
    curve = Curve("Weights between the start (0) and the finetuned model (1)", "alpha", "accuracy", series, best)
    details = {"alpha": best, "rule": rule, "table": [{"alpha": alpha, **at} for alpha, at in table.items()]}
    return Result(metrics, len(subject.data), details, intervals=intervals, curves=[curve])


class Found(NamedTuple):
    """What one model answered on one split. differences: by task; empty where the data set grades no attributes."""

    zeroshot: zeroshot.Answers
    differences: dict[str, list[difference.Answers]]

    def metrics(self) -> dict[str, float]:
        found = {"zeroshot": self.zeroshot.accuracy}
        return found | difference.overall(self.differences) if self.differences else found

    def intervals(self, seed: int) -> dict[str, tuple[float, float]]:
        interval = self.zeroshot.interval(seed)
        found = {"zeroshot": interval} if interval else {}
        groups = list(self.differences.values())
        return found | dict(zip(groups[0][0].names, difference.interval_of(groups))) if groups else found


def _measure(subject: Subject, asked: list[difference.Asked]) -> Found:
    """Zero-shot accuracy and, where the data set grades attributes, difference accuracy."""
    answers = [difference.answer(subject.clip, subject.z, of) for of in asked]
    return Found(zeroshot.answer(subject), difference.by_task(asked, answers))


def _averages(start: Clip, end: Clip, alphas: list[float]) -> Iterator[tuple[float, Clip]]:
    """The model at each alpha. Each is gone when the next one is there: all but the two ends share one copy."""
    mixed = copy.deepcopy(end.model)
    for alpha in alphas:
        if alpha in (0, 1):
            yield alpha, end if alpha else start
        else:
            _load_blend(mixed, start, end, alpha)
            # A new Clip each time, because one may remember what its weights made of a text.
            yield alpha, dataclasses.replace(end, model=mixed)


def _check_architecture(start: Clip, end: Clip) -> None:
    if start.model.state_dict().keys() != end.model.state_dict().keys():
        raise UserError(f"the weights of {start.describe()} and {end.describe()} are of two architectures")


@torch.no_grad()
def _load_blend(mixed: nn.Module, start: Clip, end: Clip, alpha: float) -> None:
    """Put the average into `mixed`, a weight at a time, so that no further copy of the model is made."""
    a, b = start.model.state_dict(), end.model.state_dict()
    for name, value in mixed.state_dict().items():
        value.copy_(blend({name: a[name]}, {name: b[name]}, alpha)[name])


def _at(alpha: float, clip: Clip, split: Subject, frozen: bool) -> Subject:
    """The averaged model on the images of a split; those are encoded only where its image tower is a new one."""
    subject = Subject(clip, lambda: split.base, split.data, split.config)
    z = split.z if frozen or alpha == 1 else split.base_z if alpha == 0 else _encode(clip, split)
    subject.__dict__["z"] = z  # in place of what the cached property would compute
    return subject


def _encode(clip: Clip, split: Subject) -> Tensor:
    """Unit image embeddings by a model that exists for a moment, and so has no place in the cache.  -> [N, D]"""
    batches = pixels(clip, split.data, split.config.batch_size, split.config.workers)
    with torch.no_grad():
        z = torch.cat([clip.encode_image(batch.to(clip.device)).float().cpu() for batch in batches])
    return F.normalize(z, dim=-1)
