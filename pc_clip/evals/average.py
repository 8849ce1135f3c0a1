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

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pc_clip.core.config.evaluate import EvaluateConfig
from pc_clip.core.errors import UserError
from pc_clip.data.dataset import Dataset
from pc_clip.data.embeddings import pixels
from pc_clip.data.registry import READERS, selection_split
from pc_clip.evals import Curve, EvalContext, Result, difference, zeroshot
from pc_clip.metrics import intervals
from pc_clip.models.clip import Clip
from pc_clip.models.loading import blend

log = logging.getLogger(__name__)

METRICS = ("zeroshot", "difference", "two_way")
JUDGED = ("zeroshot", "difference")  # alpha is chosen by these, each with the same weight


def applies(data: Dataset, config: EvaluateConfig) -> str | None:
    if data.questions and config.checkpoint and data.name in READERS and selection_split(data) is not None:
        return None
    return "a data set with classes and a split to choose alpha on, and --checkpoint a finetuned model"


also_reads = EvalContext.selection_data  # alpha is chosen on it


def evaluate(context: EvalContext) -> Result:
    """Zero-shot and difference accuracy at each alpha of the settings, and at 0 and 1.

    Metrics: average_* at the chosen alpha, start_* at 0, end_* at 1, all on the images that are reported on.
    Where the data set has no graded attributes there is zeroshot alone. Besides the two models one copy of
    the weights is held. Raises UserError when there is nothing to average or to choose on.
    """
    alphas = sorted({0.0, 1.0, *context.config.average.alphas})
    _check(context, alphas)
    frozen = context.base.image_tower_hash() == context.clip.image_tower_hash()
    splits = {"validation": context.validation(), "test": context}
    if not frozen:
        images = sum(len(split.data) for split in splits.values())
        log.info("  the image tower was finetuned too: %d images for each of %d alphas", images, len(alphas) - 2)
    measured: dict[float, dict[str, Result]] = {}
    for alpha, clip in _averages(context.base, context.clip, alphas):
        measured[alpha] = {}
        for name, split in splits.items():
            averaged = EvalContext(clip, context.find_base, split.data, split.config)
            z = split.z if frozen or alpha == 1 else split.base_z if alpha == 0 else _encode(clip, split)
            vars(averaged)["z"] = z  # in place of what the cached property would compute
            measured[alpha][name] = _measure(averaged)
    return _report(measured, len(context.data), context.config.seed)


def _check(context: EvalContext, alphas: list[float]) -> None:
    start, end = context.base, context.clip
    if start is None:
        raise UserError(
            "mode average needs the weights from before finetuning, and those of "
            f"{end.describe()} are not at hand; name them with --model.pretrained TAG or FILE"
        )
    if start.weights_hash() == end.weights_hash():
        raise UserError(
            f"mode average needs a finetuned model, and the weights are those of {start.describe()} "
            "itself; name another one with --checkpoint"
        )
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
        # With a memory of its own: what one model remembers of texts and weights is wrong of another.
        yield alpha, dataclasses.replace(end, model=mixed).remembering()


def _encode(clip: Clip, split: EvalContext) -> Tensor:
    """Unit image embeddings by a short-lived model, which has no place in the cache.  -> [N, D]"""
    batches = pixels(clip, split.data, split.config.batch_size, split.config.workers)
    with torch.no_grad():
        z = torch.cat([clip.encode_image(batch.to(clip.device)).float().cpu() for batch in batches])
    return F.normalize(z, dim=-1)


def _measure(context: EvalContext) -> Result:
    """METRICS as far as the data set has what they need; details: which images of each question were right."""
    details, right = zeroshot.answer(context)
    result = Result({"zeroshot": zeroshot.accuracy(details)}, len(context.data), right)
    if context.attributes:
        of_differences = difference.about_attributes(context, companions=False)
        for name in METRICS[1:]:
            result.metrics[name], result.intervals[name] = of_differences.metrics[name], of_differences.intervals[name]
    return result


def _report(measured: dict[float, dict[str, Result]], n: int, seed: int) -> Result:
    """The table of all alphas, the one that was chosen, and the curves."""
    table = {alpha: {split: result.metrics for split, result in at.items()} for alpha, at in measured.items()}
    judged = [name for name in JUDGED if name in table[0.0]["validation"]]
    best = max(table, key=lambda alpha: (np.mean([table[alpha]["validation"][name] for name in judged]), -alpha))
    rule = f"the alpha with the largest mean of {' and '.join(judged)} on validation images; of equal ones the smallest"
    result = Result(
        {}, n, {"alpha": best, "rule": rule, "table": [{"alpha": alpha, **at} for alpha, at in table.items()]}
    )
    for point, alpha in (("average", best), ("start", 0.0), ("end", 1.0)):
        at_point = measured[alpha]["test"]
        result.metrics |= {f"{point}_{name}": value for name, value in at_point.metrics.items()}
        result.intervals |= {f"{point}_{name}": interval for name, interval in at_point.intervals.items()}
        if len(at_point.details) == 1:  # of one question; of these alphas alone, because it takes long
            (right,) = at_point.details.values()
            result.intervals[f"{point}_zeroshot"] = intervals.of_mean(right, seed)
    series = {
        f"{name}, {split}": [(alpha, at[split][name]) for alpha, at in table.items()]
        for split in ("test", "validation")
        for name in table[0.0][split]
    }
    title = "Weights between the start (0) and the finetuned model (1)"
    result.curves = [Curve(title, "alpha", "accuracy", series, best)]
    return result
