"""Averaging the weights of the model before and after finetuning (WiSE-FT, Wortsman et al. 2022).

    weights(alpha) = (1 - alpha) * start + alpha * end

alpha = 0 is the untrained model, alpha = 1 the finetuned one. Gains and losses of finetuning often do
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
from torch import Tensor

from pc_clip.core.config.evaluate import EvaluateConfig
from pc_clip.core.errors import UserError
from pc_clip.data.dataset import Dataset
from pc_clip.data.embeddings import pixels
from pc_clip.data.registry import READERS, held_out
from pc_clip.evals import Curve, EvalContext, Result, difference, mean, zeroshot
from pc_clip.models.clip import Clip
from pc_clip.models.loading import blend

log = logging.getLogger(__name__)

METRICS = ("zeroshot", "difference", "two_way")
JUDGED = ("zeroshot", "difference")  # alpha is chosen by these, each with the same weight
RULE = "the alpha with the largest mean of {} on validation images; of equal ones the smallest"


def applies(data: Dataset, config: EvaluateConfig) -> str | None:
    if data.questions and config.checkpoint and data.name in READERS and held_out(data) is not None:
        return None
    return "a data set with classes and a split to choose alpha on, and --checkpoint a finetuned model"


def also_reads(context: EvalContext) -> Dataset | None:
    """The split that alpha is chosen on."""
    split = held_out(context.data)
    return context.open(split) if split else None


class Measured(NamedTuple):
    """The answers of one model on one split. differences: by task; empty without graded attributes."""

    zeroshot: zeroshot.Answers
    differences: dict[str, list[difference.Answers]]

    def metrics(self) -> dict[str, float]:
        accuracy = {"zeroshot": self.zeroshot.accuracy}
        return accuracy | difference.overall(self.differences) if self.differences else accuracy

    def intervals(self, seed: int) -> dict[str, tuple[float, float]]:
        interval, groups = self.zeroshot.interval(seed), list(self.differences.values())
        known = {"zeroshot": interval} if interval else {}
        return known | dict(zip(groups[0][0].names, difference.interval_of(groups))) if groups else known


def evaluate(context: EvalContext) -> Result:
    """Zero-shot and difference accuracy at each alpha of the settings, and at 0 and 1.

    Metrics: average_* at the chosen alpha, start_* at 0, end_* at 1, all on the images that are reported on.
    Where the data set has no graded attributes there is zeroshot alone. Besides the two models one copy of
    the weights is held. Raises UserError when there is nothing to average or to choose on.
    """
    alphas = sorted({0.0, 1.0, *context.config.average.alphas})
    _check(context, alphas)
    frozen = context.base.image_tower_hash() == context.clip.image_tower_hash()
    held_out_data = context.validation().data
    splits = {
        "validation": EvalContext(context.clip, lambda: context.base, held_out_data, context.config),
        "test": context,
    }
    if not frozen:
        images = sum(len(split.data) for split in splits.values())
        log.info("  the image tower was finetuned too: %d images for each of %d alphas", images, len(alphas) - 2)
    claims = {name: difference.ask(split) if split.attributes else [] for name, split in splits.items()}
    measured: dict[float, dict[str, Measured]] = {}
    for alpha, clip in _averages(context.base, context.clip, alphas):
        measured[alpha] = {}
        for name, split in splits.items():
            averaged = EvalContext(clip, lambda: context.base, split.data, split.config)
            z = split.z if frozen or alpha == 1 else split.base_z if alpha == 0 else _encode(clip, split)
            vars(averaged)["z"] = z  # in place of what the cached property would compute
            answers = [difference.answer(clip, z, each) for each in claims[name]]
            measured[alpha][name] = Measured(zeroshot.answer(averaged), difference.by_task(claims[name], answers))
    return _report(measured, context)


def _check(context: EvalContext, alphas: list[float]) -> None:
    start, end = context.base, context.clip
    if start is None:
        raise UserError(
            "mode average needs the weights from before finetuning, and those of "
            f"{end.describe()} are not at hand; name them with --model.pretrained"
        )
    if start.weights_hash() == end.weights_hash():
        raise UserError(
            f"mode average needs a finetuned model, and the weights are those of {start.describe()} "
            "itself; name another one with --checkpoint"
        )
    if start.model.state_dict().keys() != end.model.state_dict().keys():
        raise UserError(f"the weights of {start.describe()} and {end.describe()} are of two architectures")
    if alphas[0] < 0 or alphas[-1] > 1:
        raise UserError(f"alphas are {alphas[0]:g} to {alphas[-1]:g}; weights are averaged with 0 to 1")


def _averages(start: Clip, end: Clip, alphas: list[float]) -> Iterator[tuple[float, Clip]]:
    """The model at each alpha, valid until the next one: all but the two ends share one copy of the weights."""
    mixed = copy.deepcopy(end.model)
    a, b = start.model.state_dict(), end.model.state_dict()
    for alpha in alphas:
        if alpha in (0, 1):
            yield alpha, end if alpha else start
            continue
        with torch.no_grad():
            for name, value in mixed.state_dict().items():  # a weight at a time, so that no further copy is made
                value.copy_(blend({name: a[name]}, {name: b[name]}, alpha)[name])
        # A new Clip each time, because one may remember embeddings of texts.
        yield alpha, dataclasses.replace(end, model=mixed)


def _encode(clip: Clip, split: EvalContext) -> Tensor:
    """Unit image embeddings by a short-lived model, which has no place in the cache.  -> [N, D]"""
    batches = pixels(clip, split.data, split.config.batch_size, split.config.workers)
    with torch.no_grad():
        z = torch.cat([clip.encode_image(batch.to(clip.device)).float().cpu() for batch in batches])
    return F.normalize(z, dim=-1)


def choose(judged: dict[float, dict[str, float]]) -> tuple[float, str]:
    """The alpha by the rule, and the rule in words. judged: alpha -> metric -> its value on validation images."""
    names = [name for name in JUDGED if all(name in values for values in judged.values())]
    best = max(judged, key=lambda alpha: (mean([judged[alpha][name] for name in names]), -alpha))
    return best, RULE.format(" and ".join(names))


def _report(measured: dict[float, dict[str, Measured]], context: EvalContext) -> Result:
    """The table of all alphas, the one that was chosen, and the curves."""
    table = {a: {split: answers.metrics() for split, answers in at.items()} for a, at in measured.items()}
    best, rule = choose({alpha: at["validation"] for alpha, at in table.items()})
    details = {"alpha": best, "rule": rule, "table": [{"alpha": alpha, **at} for alpha, at in table.items()]}
    result = Result({}, len(context.data), details)
    for point, alpha in (("average", best), ("start", 0.0), ("end", 1.0)):  # intervals of these alone: they take long
        result.metrics |= {f"{point}_{name}": value for name, value in table[alpha]["test"].items()}
        known = measured[alpha]["test"].intervals(context.config.seed)
        result.intervals |= {f"{point}_{name}": interval for name, interval in known.items()}
    series = {
        f"{name}, {split}": [(alpha, at[split][name]) for alpha, at in table.items()]
        for split in ("test", "validation")
        for name in METRICS
        if all(name in at[split] for at in table.values())
    }
    title = "Weights between the start (0) and the finetuned model (1)"
    result.curves = [Curve(title, "alpha", "accuracy", series, best)]
    return result
