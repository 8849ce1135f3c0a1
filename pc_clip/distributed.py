"""Features and losses over all processes, with gradients that are exact."""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from pc_clip import losses


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.rows = len(x)
        return torch.cat(_parts(x))

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        gradient = gradient.contiguous()
        dist.all_reduce(gradient)  # each process has the gradient of its own loss; these rows are in all of them
        start = dist.get_rank() * ctx.rows
        return gradient[start : start + ctx.rows]


def gather(x: Tensor) -> Tensor:
    """Rows of all processes, in order of rank: [B, ...] -> [B * processes, ...]; every process gives B rows.

    The gradient that reaches `x` is the sum over the processes' losses, and DistributedDataParallel then divides by
    their number: together that is the gradient of the mean of the losses.
    """
    return _Gather.apply(x) if _processes() > 1 else x


def info_nce(a: Tensor, b: Tensor, temperature: float | Tensor) -> Tensor:
    """losses.info_nce over the rows of all processes. a, b: [B, D], this process's.

    Each process compares its own rows with everybody's, so the work is shared; the mean over processes is the loss
    of the whole batch, and its gradient that of one process with the whole batch (tested with two against one).
    """
    if _processes() == 1:
        return losses.info_nce(a, b, temperature)
    return losses.info_nce(a, b, temperature, gather(a), gather(b), dist.get_rank() * len(a))


def info_nce_with_negatives(
    text: Tensor, rejected: Tensor, image: Tensor, numbers: Tensor, logit_scale: float | Tensor
) -> Tensor:
    """losses.info_nce_with_negatives over the rows of all processes. [B, D] each, numbers: [B, 3]; this process's."""
    if _processes() == 1:
        return losses.info_nce_with_negatives(text, rejected, image, numbers, logit_scale)
    first = dist.get_rank() * len(text)
    gathered = gather(text), gather(rejected), gather(image), torch.cat(_parts(numbers))
    return losses.info_nce_with_negatives(*gathered, logit_scale, slice(first, first + len(text)))


def info_nce_of_several(
    pair: Tensor, text: Tensor, said: Tensor, number: Tensor, logit_scale: float | Tensor
) -> Tensor:
    """losses.info_nce_of_several over the rows of all processes. [B, D], [B, D], [B, S], [B]; this process's."""
    if _processes() == 1:
        return losses.info_nce_of_several(pair, text, said, number, logit_scale)
    first = dist.get_rank() * len(pair)
    known = torch.cat(_parts(said)), torch.cat(_parts(number))
    return losses.info_nce_of_several(gather(pair), gather(text), *known, logit_scale, slice(first, first + len(pair)))


def mean_over_all(total: Tensor, count: Tensor) -> Tensor:
    """A sum over this process's items by the mean count of a process: its mean over processes is the mean of all items.

    total: scalar, with a gradient; count: scalar, how many items it is of.
    """
    if _processes() == 1:
        return total / count
    everywhere = count.clone().float()
    dist.all_reduce(everywhere)
    return total / (everywhere / _processes())


def _parts(x: Tensor) -> list[Tensor]:
    """What each process has, without gradients."""
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, x.contiguous())
    return parts


@torch.no_grad()
def hardness(a: Tensor, b: Tensor) -> dict[str, Tensor]:
    """How hard a batch's negatives are: their mean cosine, and the mean over `a` of the nearest wrong row of `b`.

    a, b: [B, D], this process's; row n of one belongs to row n of the other, all processes' other rows are negatives.
    The mean of the results over the processes is that of the whole batch. Empty for a batch of one.
    """
    with torch.autocast(a.device.type, enabled=False):
        a, b = F.normalize(a.float(), dim=-1), gather(F.normalize(b.float(), dim=-1))
        if len(b) < 2:
            return {}
        first = dist.get_rank() * len(a) if _processes() > 1 else 0
        total, hardest = a.new_zeros(()), a.new_zeros(())
        for start in range(0, len(a), losses.BLOCK):
            cosine = a[start : start + losses.BLOCK] @ b.T
            rows = torch.arange(len(cosine), device=a.device)
            own = rows + first + start
            total += cosine.sum() - cosine[rows, own].sum()
            cosine[rows, own] = -torch.inf
            hardest += cosine.amax(1).sum()
    return {"mean_negative": total / (len(a) * (len(b) - 1)), "hardest_negative": hardest / len(a)}


def _processes() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
