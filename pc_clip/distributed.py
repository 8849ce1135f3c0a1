"""Features and losses over all processes, with gradients that are exact."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from pc_clip import losses


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.rows = len(x)
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts)

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


def _processes() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
