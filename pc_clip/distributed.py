"""Features of all processes, with gradients that are exact."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


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
        dist.all_reduce(gradient)  # every process computed the same loss from its own copy of the features
        start = dist.get_rank() * ctx.rows
        return gradient[start : start + ctx.rows]


def gather(x: Tensor) -> Tensor:
    """Rows of all processes, in order of rank: [B, ...] -> [B * processes, ...]; every process gives B rows.

    Used for a loss over the global batch that each process computes whole. The gradient that reaches `x`
    is the sum over processes, and DistributedDataParallel then divides by their number: together that is
    the gradient of one process with the whole batch (tested with two processes against one).
    """
    return _Gather.apply(x) if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1 else x
