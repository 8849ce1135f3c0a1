"""Several processes: gather with exact gradients, slices of batches, work divided among them."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from accelerate import PartialState
from torch import Tensor

from pc_clip.core.errors import UserError


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.rows = len(x)
        return torch.cat(parts(x))

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
    return _Gather.apply(x) if world_size() > 1 else x


def mean_over_all(total: Tensor, count: Tensor) -> Tensor:
    """A sum over this process's items by the mean count of a process: its mean over processes is the mean of all items.

    total: scalar, with a gradient; count: scalar, how many items it is of.
    """
    if world_size() == 1:
        return total / count
    everywhere = count.clone().float()
    dist.all_reduce(everywhere)
    return total / (everywhere / world_size())


def parts(x: Tensor) -> list[Tensor]:
    """Each process's tensor, without gradients."""
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, x.contiguous())
    return parts


def world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


@dataclass(frozen=True)
class Processes:
    """The processes of one launch, which share the work; as it stands, one alone.

    rank, size: which of how many this is. local_rank: which on its machine. barrier: returns when all have called it.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    barrier: Callable[[], object] = lambda: None

    @classmethod
    def here(cls) -> Processes:
        """The processes that `accelerate launch` or torchrun started. No GPU is used: they only synchronise."""
        if int(os.environ.get("WORLD_SIZE") or 1) < 2:
            return cls()  # without accelerate, whose state would keep whatever device it was first asked for
        state = PartialState(cpu=True, timeout=timedelta(days=30))  # the fastest waits for the slowest
        return cls(state.process_index, state.num_processes, state.local_process_index, state.wait_for_everyone)

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def wait(self) -> None:
        """Until all are here. Raises UserError when one of them will never be."""
        try:
            self.barrier()
        except RuntimeError as error:  # torch.distributed, when the connection breaks
            raise UserError(
                "another process of this run has stopped (its own message says why); what is done is kept, "
                "and the same command continues"
            ) from error


def process_slice(setting: str, batch_size: int) -> slice:
    """Which part of each global batch this process takes. Raises UserError when it cannot be dealt out evenly."""
    state = PartialState()
    if batch_size % state.num_processes:
        raise UserError(f"{setting} {batch_size} cannot be dealt out to {state.num_processes} processes")
    each = batch_size // state.num_processes
    return slice(state.process_index * each, (state.process_index + 1) * each)
