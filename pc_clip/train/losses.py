"""Losses as pure functions of embeddings. Each docstring says whether the inputs are normalised."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from pc_clip.core import distributed

BLOCK = 2048  # rows of similarities held at a time


def info_nce(a: Tensor, b: Tensor, temperature: float | Tensor, own: slice = slice(None)) -> Tensor:
    """Symmetric InfoNCE: row n of `a` belongs to row n of `b`, all other rows are negatives.

    a, b: [G, D], any length: they are normalised here. own: the rows whose loss is returned, for batches that several
    processes share. Returns a scalar; equal to log G when all similarities are equal. Similarities are held a block of
    rows at a time, so memory grows with G and not with its square. Radford et al. 2021, figure 3; PC-CLIP
    (arXiv 2409.09721) uses it between text embeddings and image differences with temperature 1.
    """
    with torch.autocast(a.device.type, enabled=False):  # bf16 would round cosines by more than a step changes them
        a, b = F.normalize(a, dim=-1), F.normalize(b, dim=-1)
        return (_find(a, b, temperature, own) + _find(b, a, temperature, own)) / 2


def _find(rows: Tensor, among: Tensor, temperature: float | Tensor, own: slice) -> Tensor:
    """Mean cross entropy of finding row n of `among` for row n of `rows`, over `own`."""
    target = torch.arange(len(rows), device=rows.device)[own]
    rows = rows[own]
    if len(rows) <= BLOCK:
        return _cross_entropy(rows, among, temperature, target) / len(rows)
    total = rows.new_zeros(())
    for some, wanted in zip(rows.split(BLOCK), target.split(BLOCK)):  # each computed again in the backward pass
        total = total + checkpoint(
            _cross_entropy, some, among, temperature, wanted, use_reentrant=False, preserve_rng_state=False
        )
    return total / len(rows)


def _cross_entropy(rows: Tensor, among: Tensor, temperature: float | Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(rows @ among.T / temperature, target, reduction="sum")


def info_nce_of_several(
    pair: Tensor, text: Tensor, positives: Tensor, number: Tensor, logit_scale: float | Tensor, own: slice = slice(None)
) -> Tensor:
    """Symmetric InfoNCE where several texts belong to each row, of which `text` has one: none of them is its negative.

    pair, text: [G, D], any length: they are normalised here; row n of both belong together. number: [G] int64, which
    text each row has; positives: [G, S] int64, all texts of row n's pair, padded with -1. own: the rows whose loss
    is returned, for batches that several processes share.
    """
    with torch.autocast(pair.device.type, enabled=False):
        pair, text = F.normalize(pair.float(), dim=-1), F.normalize(text.float(), dim=-1)
        belongs = (positives[:, :, None] == number).any(1)  # [G, G]: whether text m describes pair n
        belongs.fill_diagonal_(False)
        target = torch.arange(len(pair), device=pair.device)[own]
        find_text = (logit_scale * pair[own] @ text.T).masked_fill(belongs[own], -torch.inf)
        find_pair = (logit_scale * text[own] @ pair.T).masked_fill(belongs.T[own], -torch.inf)
        return (F.cross_entropy(find_text, target) + F.cross_entropy(find_pair, target)) / 2


def squared_distance(a: Tensor, b: Tensor) -> Tensor:
    """Mean over rows of |a - b|^2 between unit vectors, which is 2 - 2 cos(a, b).

    a, b: [B, D], any length: they are normalised here. The MSE ablation of PC-CLIP up to the constant
    factor 1/D; without it the learning rates of InfoNCE fit.
    """
    return (F.normalize(a, dim=-1) - F.normalize(b, dim=-1)).pow(2).sum(-1).mean()


def anchor(now: Tensor, start: Tensor) -> Tensor:
    """Mean of 1 - cos(now, start): how far embeddings have turned away from where they began. 0 at the start.

    now, start: [A, D], any length.
    """
    return (1 - F.cosine_similarity(now, start, dim=-1)).mean()


def similarity_divergence(
    text: Tensor,
    image: Tensor,
    text_start: Tensor,
    image_start: Tensor,
    temperature: float,
    own: slice = slice(None),
) -> Tensor:
    """How far a model's similarities have left those of its start: KL(start || now), the mean over both directions.

    text, image, text_start, image_start: [G, D], any length: they are normalised here; row n of all belong together.
    Each text has a softmax over all images, of cosines over `temperature`, and each image one over all texts. 0 at the
    start. own: the rows whose loss is returned, for batches that several processes share. Distillation of a matrix of
    similarities; Hinton et al. 2015 (arXiv 1503.02531).
    """
    with torch.autocast(text.device.type, enabled=False):
        text, image, text_start, image_start = (
            F.normalize(x.float(), dim=-1) for x in (text, image, text_start, image_start)
        )
        total = text.new_zeros(())
        for rows, among, start, start_among in (
            (text, image, text_start, image_start),
            (image, text, image_start, text_start),
        ):
            now = F.log_softmax(rows[own] @ among.T / temperature, dim=-1)
            before = F.log_softmax(start[own] @ start_among.T / temperature, dim=-1)
            total = total + F.kl_div(now, before, reduction="batchmean", log_target=True)
        return total / 2


def unit_differences(first: Tensor, second: Tensor) -> Tensor:
    """Unit differences of unit image embeddings: normalise(z_i - z_j).  [B, D], [B, D] -> [B, D]

    PC-CLIP (arXiv 2409.09721). Two images with equal embeddings have no difference: such a row comes out as zero,
    never NaN, but it teaches nothing and is to be left out before (see methods.pairwise).
    """
    return F.normalize(F.normalize(first, dim=-1) - F.normalize(second, dim=-1), dim=-1)


# -- preferences ---------------------------------------------------------------------------------------


def log_odds(preferred: Tensor, rejected: Tensor, logit_scale: float | Tensor) -> Tensor:
    """How strongly the first of two texts is preferred: log p(preferred) - log p(rejected).

    preferred, rejected: [B] cosines of the image with either text. p is the softmax over the two of cosines times
    logit_scale; its normaliser cancels, so that this is logit_scale * (preferred - rejected).
    """
    return logit_scale * (preferred - rejected)


def dpo(policy: Tensor, reference: Tensor | None, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """Direct preference optimisation: the mean of -log sigmoid(beta * (policy - reference)). log 2 where both agree.

    policy, reference: [B] log-odds of the preferred text, by the model and by the one it began as; None for the
    reference-free variant, which takes them to be 0. label_smoothing: the share of pairs that are the wrong way round.
    Rafailov et al. 2023 (arXiv 2305.18290), equation 7; the smoothing is "conservative DPO" (Mitchell 2023).
    """
    logits = beta * (policy if reference is None else policy - reference)
    return -((1 - label_smoothing) * F.logsigmoid(logits) + label_smoothing * F.logsigmoid(-logits)).mean()


def ipo(policy: Tensor, reference: Tensor | None, beta: float) -> Tensor:
    """Identity preference optimisation: the mean of (policy - reference - 1 / (2 beta))^2.

    policy, reference: [B] log-odds as in `dpo`. beta: the paper's tau; the odds move by 1 / (2 beta) and no further.
    Azar et al. 2023 (arXiv 2310.12036), equation 17.
    """
    return ((policy if reference is None else policy - reference) - 1 / (2 * beta)).pow(2).mean()


def bradley_terry(preferred: Tensor, rejected: Tensor, alpha: float) -> Tensor:
    """A reward model's loss: the mean of -log sigmoid(alpha * (preferred - rejected)).

    preferred, rejected: [B] rewards, here cosines of the image with either text. There is no reference.
    Bradley and Terry 1952; as a loss, Ouyang et al. 2022 (arXiv 2203.02155), equation 1.
    """
    return -F.logsigmoid(alpha * (preferred - rejected)).mean()


def info_nce_with_negatives(
    text: Tensor,
    rejected: Tensor,
    image: Tensor,
    numbers: Tensor,
    logit_scale: float | Tensor,
    own: slice = slice(None),
) -> Tensor:
    """CLIP's loss, where each image also has to tell its text from all rejected ones: hard negatives.

    text, rejected, image: [G, D], any length: they are normalised here; row n of all three belong together.
    numbers: [G, 3] int64, which image, text and rejected text each row has. Where an image or a text comes twice, one
    row's is not a negative of the other's, and a text is not a negative of itself where another image rejects it.
    own: the rows whose loss is returned, for batches that several processes share.
    Yuksekgonul et al. 2023 (arXiv 2210.01936, NegCLIP).
    """
    with torch.autocast(text.device.type, enabled=False):
        text, rejected, image = (F.normalize(z.float(), dim=-1) for z in (text, rejected, image))
        target = torch.arange(len(text), device=text.device)[own]
        owner, preferred, unpreferred = numbers.T
        same = (owner[own][:, None] == owner) | (preferred[own][:, None] == preferred)  # [B, G]
        same[torch.arange(len(target), device=text.device), target] = False
        find_text = (logit_scale * image[own] @ text.T).masked_fill(same, -torch.inf)  # [B, G]
        find_rejected = logit_scale * image[own] @ rejected.T
        find_rejected = find_rejected.masked_fill(preferred[own][:, None] == unpreferred, -torch.inf)
        find_text = torch.cat([find_text, find_rejected], dim=1)  # [B, 2 G]
        find_image = (logit_scale * text[own] @ image.T).masked_fill(same, -torch.inf)
        return (F.cross_entropy(find_text, target) + F.cross_entropy(find_image, target)) / 2


# -- over the rows of all processes -----------------------------------------------------------------------


def over_all(loss: Callable[..., Tensor], *tensors: Tensor | float) -> Tensor:
    """A loss over the rows of all processes: loss(*tensors, own), one of those above that take `own`.

    tensors: this process's rows [B, ...], embeddings or whole numbers; last a temperature or a logit scale, which is
    not gathered. Each process compares its own rows with everybody's, so the work is shared; the mean over processes
    is the loss of the whole batch, and its gradient that of one process with the whole batch (tested with two against
    one).
    """
    if distributed.world_size() == 1:
        return loss(*tensors)
    *rows, scale = tensors
    first, count = dist.get_rank() * len(rows[0]), len(rows[0])
    gathered = [distributed.gather(x) if x.is_floating_point() else torch.cat(distributed.parts(x)) for x in rows]
    return loss(*gathered, scale, slice(first, first + count))


@torch.no_grad()
def hardness(a: Tensor, b: Tensor) -> dict[str, Tensor]:
    """How hard a batch's negatives are: their mean cosine, and the mean over `a` of the nearest wrong row of `b`.

    a, b: [B, D], this process's; row n of one belongs to row n of the other, all processes' other rows are negatives.
    The mean of the results over the processes is that of the whole batch. Empty for a batch of one.
    """
    with torch.autocast(a.device.type, enabled=False):
        a, b = F.normalize(a.float(), dim=-1), distributed.gather(F.normalize(b.float(), dim=-1))
        if len(b) < 2:
            return {}
        first = dist.get_rank() * len(a) if distributed.world_size() > 1 else 0
        total, hardest = a.new_zeros(()), a.new_zeros(())
        for start in range(0, len(a), BLOCK):
            cosine = a[start : start + BLOCK] @ b.T
            rows = torch.arange(len(cosine), device=a.device)
            own = rows + first + start
            total += cosine.sum() - cosine[rows, own].sum()
            cosine[rows, own] = -torch.inf
            hardest += cosine.amax(1).sum()
    return {"mean_negative": total / (len(a) * (len(b) - 1)), "hardest_negative": hardest / len(a)}
