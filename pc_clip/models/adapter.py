"""One weight's LoRA adapter: peft's matrices, seen as a parametrization of the weight (lora.py puts them in)."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor, nn

from pc_clip.core.errors import UserError
from pc_clip.models import torchvision_compat  # noqa: F401  (before peft, which imports transformers)

_NAME = "default"  # peft's for an adapter that is the only one


class Adapter(nn.Module):
    """The low-rank update of one weight of shape [M, ...], seen as a matrix [M, N]. Initially zero."""

    def __init__(self, weight: Tensor, rank: int, alpha: float) -> None:
        """A is drawn from torch's default generator, on the CPU."""
        super().__init__()
        peft = import_peft()
        rows, columns = len(weight), weight[0].numel()
        host = nn.utils.skip_init(nn.Linear, columns, rows, bias=False)  # peft asks it for its size and its device
        config = peft.LoraConfig(r=rank, lora_alpha=alpha)
        self.layer = peft.tuners.lora.Linear(host, _NAME, config=config, r=rank, lora_alpha=alpha)
        del self.layer.base_layer
        self.to(weight.device, weight.dtype)

    def forward(self, weight: Tensor) -> Tensor:
        with torch.autocast(weight.device.type, enabled=False):  # bf16 would round small steps away
            return weight + self.layer.get_delta_weight(_NAME).view_as(weight)

    @property
    def matrices(self) -> dict[str, nn.Parameter]:
        """lora_A, [r, N], and lora_B, [M, r]"""
        return {"lora_A": self.layer.lora_A[_NAME].weight, "lora_B": self.layer.lora_B[_NAME].weight}


def is_plain(module: nn.Module) -> bool:
    """Whether reading a module's weights gives what it computes with: it has no parametrizations but adapters."""
    return not hasattr(module, "parametrizations") or len(adapters_of(module)) == len(module.parametrizations)


def adapters_of(owner: nn.Module) -> dict[str, Adapter]:
    """The adapters of a module's own weights, by the weight's name."""
    lists = getattr(owner, "parametrizations", {})
    return {short: some[0] for short, some in lists.items() if len(some) == 1 and isinstance(some[0], Adapter)}


def import_peft() -> ModuleType:
    try:
        import peft
    except ImportError as error:
        raise UserError(
            f"model.lora_rank needs the package peft, which cannot be imported ({error}): "
            "`pip install peft`, or set model.lora_rank 0"
        ) from error
    return peft
