"""Optimizer, learning-rate schedule and precision; Adam with compensated summation.

At lr 1e-8 a plain addition loses a sizeable part of each step, and all of it where a weight is 0.25 or more, as gains
are: half the distance between two float32 numbers there is 1.5e-8. Kahan's compensated summation carries the lost
part along (Kahan 1965; for training: Zamirai et al. 2020, "Revisiting BFloat16 Training"). torch-optimi does this for
bfloat16 and float16 weights only, hence CompensatedAdam around torch's own fused step.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from accelerate.tracking import get_available_trackers
from torch import Tensor, nn
from torch.optim.adam import adam

from pc_clip.core.config.train import TrainConfig
from pc_clip.core.errors import UserError, check_at_least, check_choice

log = logging.getLogger(__name__)

CPU_BF16 = ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16")  # as torch calls what multiplies bf16, x86-64 and Arm
CHUNK = 1 << 17  # numbers added at a time on a CPU, so that the three tensors stay in its cache


def check_settings(train: TrainConfig) -> None:
    """Raise UserError for settings of the loop that mean nothing."""
    for name in ("batch_size", "epochs", "log_every", "save_every"):
        check_at_least(f"train.{name}", getattr(train, name), 1)
    if train.steps is not None:
        check_at_least("train.steps", train.steps, 1)
    check_choice("train.precision", train.precision, ("no", "bf16", "auto"))  # of products; weights are float32
    check_choice("train.optimizer", train.optimizer, ("adam", "adamw"))
    check_choice("train.schedule", train.schedule, ("constant", "exponential", "cosine"))
    if not 0 <= train.warmup_share < 1 or (train.warmup_share and train.warmup_steps):
        raise UserError(
            f"train.warmup_share is {train.warmup_share:g}; a share of all steps, from 0 to below 1, in the place "
            "of train.warmup_steps"
        )
    if len(train.betas) != 2 or not all(0 <= beta < 1 for beta in train.betas):
        raise UserError(f"train.betas is {train.betas}; it takes two numbers from 0 up to, but not, 1")
    if train.tracker and train.tracker not in map(str, get_available_trackers()):  # accelerate would pass over it
        raise UserError(f"train.tracker {train.tracker!r} is not installed; pip install it")


def make_optimizer(
    train: TrainConfig, parameters: list[nn.Parameter], rates: Sequence[float] | None = None
) -> torch.optim.Optimizer:
    """Adam or AdamW with torch's fused step. Weight decay spares vectors: gains, biases.

    rates: for each parameter what its learning rate is multiplied by, kept in its group as "rate"; 1 unless given.
    Raises UserError for weights that are not float32.
    """
    if other := {str(p.dtype) for p in parameters if p.dtype != torch.float32}:
        raise UserError(
            f"weights that learn must be float32, found {', '.join(sorted(other))}: at small learning rates most steps "
            "are lost in anything shorter. train.precision bf16 multiplies in bf16 and keeps the weights in float32."
        )
    kinds: dict[tuple[bool, float], list[nn.Parameter]] = {}
    for p, rate in zip(parameters, rates or [1.0] * len(parameters)):
        kinds.setdefault((p.ndim <= 1, rate), []).append(p)
    groups = [
        {"params": kinds[kind], "weight_decay": 0.0 if kind[0] else train.weight_decay, "rate": kind[1]}
        for kind in sorted(kinds, key=lambda kind: (kind[0], -kind[1]))
    ]
    how = {"lr": train.lr, "betas": tuple(train.betas), "eps": train.eps}
    if train.compensated:
        return CompensatedAdam(groups, decoupled=train.optimizer == "adamw", **how)
    kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[train.optimizer]
    return kind(groups, fused=True, **how)


def learning_rate(train: TrainConfig, step: int, steps_per_epoch: int, total: int) -> float:
    """The rate of step `step` (from 0): linear warm-up, then the schedule."""
    warmup = train.warmup_steps or round(train.warmup_share * total)
    if step < warmup:
        return train.lr * (step + 1) / warmup
    if train.schedule == "exponential":
        return train.lr * train.decay ** (step // steps_per_epoch)
    if train.schedule == "cosine":
        progress = (step - warmup) / max(1, total - warmup)
        return train.lr * 0.5 * (1 + math.cos(math.pi * progress))
    return train.lr


def resolve_precision(asked: str, device: torch.device) -> str:
    """Resolve train.precision to "no" (float32) or "bf16".

    A CPU that emulates bf16 is several times slower than in float32 (nine times, on a training step of the example's
    captioner on AVX2): `auto` takes float32 there, and bf16 by name logs a warning.
    """
    quick = multiplies_bf16(device)
    if asked == "bf16" and not quick:
        log.warning("train.precision bf16: this %s has no instructions for it; no (or auto) is quicker", device)
    return ("bf16" if quick else "no") if asked == "auto" else asked


def multiplies_bf16(device: torch.device) -> bool:
    """Whether a device has instructions for it."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        return any(torch.cpu.get_capabilities().get(name, False) for name in CPU_BF16)
    return False


class CompensatedAdam(torch.optim.Optimizer):
    """Adam, or AdamW with `decoupled`, with a carry of what each weight still owes.

    The fused step of torch is applied to the carry, which is small and so keeps all its digits; then the carry is
    added to the weight and what the addition rounded off stays in it. Memory: one more tensor a weight. Weights are
    float32: a carry does not recover what lower precisions lose.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        decoupled: bool = False,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "fused": True}
        super().__init__(params, defaults)
        self.decoupled = decoupled

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # accelerate gives one, always None
        for group in self.param_groups:
            if weights := [p for p in group["params"] if p.grad is not None]:
                self._step(weights, group)

    def _step(self, weights: list[nn.Parameter], group: dict[str, Any]) -> None:
        for p in weights:
            if not self.state[p]:
                self.state[p] = {name: torch.zeros_like(p) for name in ("carry", "exp_avg", "exp_avg_sq")}
                self.state[p]["step"] = torch.zeros((), device=p.device)
        states, gradients = [self.state[p] for p in weights], [p.grad for p in weights]
        carries = [state["carry"] for state in states]
        if group["weight_decay"]:  # torch's step would decay the carry; the weights are what it is about
            if self.decoupled:
                torch._foreach_add_(carries, weights, alpha=-group["lr"] * group["weight_decay"])
            else:
                gradients = torch._foreach_add(gradients, weights, alpha=group["weight_decay"])
        adam(
            carries,
            gradients,
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            fused=True,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=0.0,
            eps=group["eps"],
            maximize=False,
        )
        for p, carry in zip(weights, carries):
            add_compensated(p, carry)


def add_compensated(weight: Tensor, carry: Tensor) -> None:
    """weight += carry, in place; what the addition rounded off is left in `carry`. Both of one shape and layout."""
    at_once = weight.is_cuda or not (weight.is_contiguous() and carry.is_contiguous())
    pieces = [(weight, carry)] if at_once else zip(*(t.view(-1).split(CHUNK) for t in (weight, carry)))
    for w, c in pieces:
        new = w + c
        c.sub_(new - w)  # new - w is exact where |c| <= |w| (Dekker's fast two-sum), else off by an ulp of c at most
        w.copy_(new)
