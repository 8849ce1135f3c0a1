"""LoRA (Hu et al. 2021): W + scale * B A, where the low-rank A and B are trained.

A, B, their initialisation and their product are peft's; they are attached by torch's parametrization. peft's own way,
layers in place of others, does nothing where CLIP's towers read a layer's weights and multiply themselves, as in
nn.MultiheadAttention and the attention pool of a ResNet; its special layer for nn.MultiheadAttention (as of 0.21.2)
counts out_proj's adapter twice. A parametrized weight is right for both, fast_text.py included, at the cost of one
more thin product a step. It saves Adam's moments, but not the memory of the weights' gradients.

At the end `merge` leaves the sums under the weights' own names.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils import parametrize

from pc_clip.core.errors import UserError, check_at_least, check_choice
from pc_clip.core.random import seed_of
from pc_clip.models import torchvision_compat  # noqa: F401  (before peft, which imports transformers)
from pc_clip.models.parameters import TRAINABLE, parameters_of

_MATRICES = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight", "text_projection", "proj")
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


def check(rank: int, alpha: float | None) -> None:
    """Raise UserError for impossible settings, and where peft is not installed."""
    check_at_least("model.lora_rank", rank, 0)
    if alpha is not None and not rank:
        raise UserError(f"model.lora_alpha {alpha:g} means nothing without model.lora_rank; set that, or leave it out")
    if alpha is not None and not 0 < alpha < float("inf"):
        raise UserError(f"model.lora_alpha is {alpha:g}; it must be above 0, or null for a scale of 1")
    if rank:
        import_peft()


def weights_to_adapt(model: nn.Module, train: str, name: str) -> list[str]:
    """Which of the weights that `train` names get adapters: matrices, and convolutions without groups.

    Embeddings, norms and biases get none and stay as they are. name: of the model, for messages.
    Raises UserError where there are none.
    """
    named = parameters_of(model, train, name)
    fitting = [n for n, p in named.items() if _fits(*_owner(model, n), p)]
    if not fitting:
        raise UserError(
            f"model.train {train} names no weight of {name} that adapters fit, of {len(named)} parameters; "
            "set model.lora_rank 0, or train another part"
        )
    return fitting


def add(model: nn.Module, names: list[str], rank: int, alpha: float | None, seed: int) -> None:
    """Put adapters on weights that have none, in place. They begin as zero, so outputs stay the same.

    alpha: what adapters add is multiplied by alpha / rank; None for 1. torch's global generators are left alone.
    """
    alpha = rank if alpha is None else alpha
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed_of(seed, "adapters"))  # torch.manual_seed would seed the GPUs too
        for name in names:
            owner, short = _owner(model, name)
            adapter = Adapter(getattr(owner, short), rank, alpha)
            parametrize.register_parametrization(owner, short, adapter)


def parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The adapters' matrices as WEIGHT.lora_A and WEIGHT.lora_B; empty for a model without adapters."""
    return {
        f"{path}.{short}.{which}".removeprefix("."): matrix
        for path, owner in model.named_modules()
        for short, adapter in adapters_of(owner).items()
        for which, matrix in adapter.matrices.items()
    }


def trainable(clip: Any, which: str) -> dict[str, nn.Parameter]:
    """The parameters of a Clip that learn, by name: the adapters' where there are some, else those of `which`.

    Raises UserError for an unknown `which`, and where the model has no such parameters.
    """
    check_choice("model.train", which, TRAINABLE)
    return parameters(clip.model) or parameters_of(clip.model, which, clip.name)


def merge(model: nn.Module) -> None:
    """Add all adapters to their weights and remove them, in place: an ordinary model again, under ordinary names."""
    for owner in list(model.modules()):
        for short in adapters_of(owner):
            parametrize.remove_parametrizations(owner, short, leave_parametrized=True)


def _owner(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, short = name.rpartition(".")
    return model.get_submodule(path), short


def _fits(owner: nn.Module, short: str, weight: nn.Parameter) -> bool:
    if isinstance(owner, _ConvNd):
        return short == "weight" and owner.groups == 1
    return weight.ndim == 2 and (short in _MATRICES or (short == "weight" and isinstance(owner, nn.Linear)))


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
